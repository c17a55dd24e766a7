"""fio as the yardstick: one io_uring job with O_DIRECT on a given file, and what it reports.

    python bench/fio.py FILE --rw read --bs 1MiB --depth 16 [--seconds 5] [--plain] [--huge]

The file has to exist and to have been written before: fio leaves its size as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class FioResult:
    """``cpu_s_per_gib``: usr + sys of the job, as fio counts them (its one thread)."""

    gib_s: float
    iops: float
    cpu_s_per_gib: float
    lat_us_p50: float
    lat_us_p99: float
    lat_us_p999: float


def version() -> str:
    """``fio-3.33``; RuntimeError where there is none."""
    if shutil.which("fio") is None:
        raise RuntimeError("fio is not installed: apt install fio")
    return subprocess.run(
        ["fio", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run_fio(
    path: str | os.PathLike[str],
    rw: str,
    segment_nbytes: int,
    depth: int,
    seconds: float,
    *,
    size_nbytes: int | None = None,
    registered: bool = True,
    huge: bool = False,
) -> FioResult:
    """One job. ``rw``: read, write, randread; ``registered``: buffers and file registered with the
    ring, as our engine does it. ``huge``: buffers on transparent hugepages (glibc 2.35 or newer):
    fewer and larger pieces for the driver. WRITE DESTROYS what is in the file. RuntimeError."""
    version()
    size = size_nbytes or os.path.getsize(path)
    words = [
        "fio",
        "--name=yardstick",
        f"--filename={os.fspath(path)}",
        f"--rw={rw}",
        f"--bs={segment_nbytes}",
        f"--iodepth={depth}",
        f"--size={size}",
        "--ioengine=io_uring",
        "--direct=1",
        # A run-time of zero would mean "once over the file".
        "--time_based",
        f"--runtime={max(1, round(seconds * 1000))}ms",
        # The file stays as it was laid out, and is not thrown out of any cache first.
        "--fallocate=none",
        "--overwrite=1",
        "--invalidate=0",
        "--norandommap",
        "--randrepeat=0",
        # Costs fio CPU time for every buffer written; we do nothing of the kind.
        "--scramble_buffers=0",
        "--output-format=json",
    ]
    if registered:
        words += ["--fixedbufs=1", "--registerfiles=1"]
    environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge else {})
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"fio: {(done.stderr or done.stdout).strip()}")
    # Notes may stand before the object.
    return parse(done.stdout[done.stdout.index("{") :], rw)


def parse(report: str, rw: str) -> FioResult:
    """The figures in fio's JSON."""
    job = json.loads(report)["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    side = job["write" if rw.endswith("write") else "read"]
    nbytes = side["io_bytes"]
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    latency = side["clat_ns"]["percentile"]
    return FioResult(
        gib_s=side["bw_bytes"] / GIB,
        iops=side["iops"],
        cpu_s_per_gib=cpu_s / (nbytes / GIB),
        lat_us_p50=latency["50.000000"] / 1e3,
        lat_us_p99=latency["99.000000"] / 1e3,
        lat_us_p999=latency["99.900000"] / 1e3,
    )


def main() -> None:
    from spdk_kv.units import parse_nbytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--rw", choices=("read", "write", "randread", "randwrite"), default="read")
    parser.add_argument("--bs", type=parse_nbytes, default=1 << 20)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--plain", action="store_true", help="nothing registered with the ring")
    parser.add_argument("--huge", action="store_true", help="buffers on transparent hugepages")
    words = parser.parse_args()
    try:
        result = run_fio(
            words.file,
            words.rw,
            words.bs,
            words.depth,
            words.seconds,
            registered=not words.plain,
            huge=words.huge,
        )
    except (OSError, RuntimeError) as failed:
        sys.exit(f"error: {failed}")
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
