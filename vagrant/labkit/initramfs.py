"""The guest's first file system: busybox, some modules, and a script that mounts the real root.

The real root is the host's, read-only over virtio-9p, under an overlay in memory: what the guest
writes is gone with it, and the host's files cannot change.
"""

from __future__ import annotations

import gzip
import lzma
import stat
import subprocess
from pathlib import Path

from labkit.needs import EARLY_MODULES, Host, module_files

INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod "/modules/$module"; done
# Loose caching: nobody is meant to change the host's files while the guest looks at them.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro hostroot /host || exit 1
mount -t tmpfs -o mode=0755 over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /new || exit 1
for system in dev proc sys; do mount --move /$system /new/$system; done
mount -t tmpfs -o mode=0755 run /new/run
mkdir /new/run/lab
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none labshare /new/run/lab
exec switch_root /new {command}
"""


def _module(path: Path) -> bytes:
    """A module's plain bytes: busybox cannot load the compressed ones of newer releases."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        shown = subprocess.run(["zstd", "-dcq", path], stdout=subprocess.PIPE, check=True)
        return shown.stdout
    return path.read_bytes()


def _entry(name: str, mode: int, content: bytes, number: int) -> bytes:
    """One file of a `newc` cpio archive (Linux: Documentation/driver-api/early-userspace)."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    head += b"\0" * (-len(head) % 4)
    return head + content + b"\0" * (-len(content) % 4)


def build(host: Host, target: Path, command: str) -> None:
    """Writes the initramfs; ``command`` is what the guest's root is started with."""
    modules: dict[str, bytes] = {}
    for wanted in EARLY_MODULES:
        for file in module_files(host.release, wanted) or ():
            name = Path(file).name.split(".ko")[0] + ".ko"
            if name not in modules:
                modules[name] = _module(Path(file))
    script = INIT.format(modules=" ".join(modules), command=command)
    folders = ("bin", "dev", "proc", "sys", "modules", "host", "over", "new")
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, Path(host.busybox).read_bytes()))
    entries.append(("init", stat.S_IFREG | 0o755, script.encode()))
    entries += [
        (f"modules/{name}", stat.S_IFREG | 0o644, content) for name, content in modules.items()
    ]
    entries.append(("TRAILER!!!", 0, b""))
    with target.open("wb") as archive:
        for number, (name, mode, content) in enumerate(entries, 1):
            archive.write(_entry(name, mode, content, number))
