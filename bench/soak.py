"""A store in daily life, shortened: threads, interrupts and kills at 95 % fill, every byte checked.

    python bench/soak.py [--dir DIR] [--minutes 30] [--engine NAME] [--seed N] [--json FILE]

One process after the other opens the same store. Its threads put, get, delete and flush blobs, and
create, append to, read, truncate and delete sequences, until the process is stopped: in order, by
a kill, or after a storm of Ctrl-C. What was begun, done and flushed stands in a file that outlives
the process, so that the next one knows what must be there, and every read knows what it may see: a
version that had been begun, and none older than what was done before. Contents are computed from
the key, the version and the position, so a byte of anything else is noticed.

Prints a line per life and a table. The exit status is 1 for a wrong byte, a lost one, an error that
is not one of spdk_kv's, a close or an opening that fails, or memory or descriptors that grow.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from soaking.ledger import Ledger
from soaking.life import CLOSE_S, run_life

MIB = 1 << 20
WARM_UP_S = 20.0
# What a process may hold more at its end than after its warm-up: the allocator's fragments.
GROWTH_NBYTES = 48 * MIB
GROWTH_FDS = 8


def _growth(samples: list[list[float]]) -> tuple[int, int] | None:
    """Bytes and descriptors held more at the end than after the warm-up; None: too short."""
    warm = [sample for sample in samples if sample[0] > WARM_UP_S]
    if len(warm) < 20:
        return None
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    return tuple(  # type: ignore[return-value]
        int(median(s[n] for s in last) - median(s[n] for s in first)) for n in (1, 2)
    )


def _one_life(
    folder: Path, arguments: argparse.Namespace, rng: random.Random, seed: int
) -> dict[str, Any]:
    how = rng.choices(("kill", "stop", "interrupts"), (0.4, 0.2, 0.4))[0]
    seconds = rng.uniform(1, 15) if how == "kill" else rng.uniform(30, 120)
    command = [sys.executable, __file__, "--life", str(folder), "--seed", str(seed)]
    if arguments.engine:
        command += ["--engine", arguments.engine]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    if said != "ready\n":
        return {"how": how, "faults": [f"no life: exit status {child.wait()}"], "counts": {}}
    until = time.monotonic() + min(seconds, max(1.0, arguments.until - time.monotonic()))
    while time.monotonic() < until and child.poll() is None:
        if how == "interrupts":
            time.sleep(rng.expovariate(5))
            child.send_signal(signal.SIGINT)
        else:
            time.sleep(0.05)
    child.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
    try:
        rest = child.communicate(timeout=CLOSE_S * 2)[0]
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        child.communicate()
        return {"how": how, "faults": ["it does not stop"], "counts": {}}
    if how == "kill":
        return {"how": how, "faults": [], "counts": {"kills": 1}}
    if child.returncode:
        return {"how": how, "faults": [f"exit status {child.returncode}"], "counts": {}}
    report = json.loads(rest.splitlines()[-1])
    growth = _growth(report.pop("samples"))
    if growth and growth[0] > GROWTH_NBYTES:
        report["faults"].append(f"memory grew by {growth[0] / MIB:.0f} MiB")
    if growth and growth[1] > GROWTH_FDS:
        report["faults"].append(f"{growth[1]} descriptors more")
    fill = report.pop("fill")
    report |= {"how": how, "growth": growth, "fill": median(fill) if fill else None}
    return dict(report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a folder on the drive; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life:
        run_life(arguments.life, arguments.engine, arguments.seed)
        return 0
    arguments.until = time.monotonic() + 60 * arguments.minutes
    rng = random.Random(arguments.seed)
    total: Counter[str] = Counter()
    lives: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="spdk_kv-soak-", dir=arguments.dir) as name:
        folder = Path(name)
        Ledger(folder / "ledger", create=True)
        while time.monotonic() < arguments.until:
            life = _one_life(folder, arguments, rng, arguments.seed * 10_000 + len(lives))
            lives.append(life)
            total.update(life["counts"])
            grew = life.get("growth")
            print(
                f"{len(lives):4} {life['how']:10} steps {life['counts'].get('steps', 0):8,}"
                + (f"  fill {life['fill']:.3f}" if life.get("fill") else "")
                + (f"  memory {grew[0] / MIB:+.0f} MiB, descriptors {grew[1]:+}" if grew else "")
                + "".join(f"\n     FAULT {fault}" for fault in life["faults"]),
                flush=True,
            )
    faults = [fault for life in lives for fault in life["faults"]]
    print("\n| what | count |\n|---|---|")
    for what, count in sorted(total.items()):
        print(f"| {what} | {count:,} |")
    print(f"| lives | {len(lives):,} |\n| faults | {len(faults):,} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"counts": total, "lives": lives}, indent=1) + "\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
