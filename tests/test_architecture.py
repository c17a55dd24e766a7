"""The house of DESIGN section 3, enforced: imports go strictly downward between floors.

Read from the source with `ast`, so that imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spdk_kv"

FLOORS = (
    ("errors", "units", "config", "types"),
    ("_native",),
    ("engines", "devices"),
    ("index", "allocator", "layout", "link", "staging", "superblock", "lock", "tensors"),
    ("orchestrator", "residency", "memory"),
    ("store", "sequence", "sparse"),
    ("cli", "integrations"),
    # The front door and `python -m spdk_kv`: they may open any room, and no room imports them.
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that may spread over several files beside each other: store_index.py is part of store.
SPREAD = ("store", "sequence", "index", "memory", "residency", "orchestrator", "link")
# The arrows that are meant: the store opens sequences, the demo shows an integration, the
# orchestrator asks a policy with the numbers that memory reads, and an engine that the kernel does
# not guard asks who uses the drive.
ARROWS = {
    ("store", "sequence"),
    ("cli", "integrations"),
    ("orchestrator", "residency"),
    ("orchestrator", "memory"),
    ("engines", "devices"),
}

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve"}
MAX_LINES = 450
TOP_LEVEL = {
    *("pyproject.toml", "spdk_kv", "cython_src", "scripts", "tests", "bench", "vagrant"),
    *("README.md", ".ci", "docs", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore"),
}


def room_of(parts: tuple[str, ...]) -> str:
    """The room that the module ``spdk_kv.<parts>`` is in; the package itself is ``__init__``."""
    if not parts:
        return "__init__"
    for room in SPREAD:
        if parts[0].startswith(f"{room}_"):
            return room
    return parts[0]


def module_parts(path: Path, package: Path) -> tuple[str, ...]:
    """``engines/uring.py`` as ("engines", "uring"); ``engines/__init__.py`` as ("engines",)."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_import_call(node: ast.AST) -> bool:
    """Whether ``node`` is ``import_module(...)`` or ``__import__(...)``, however it is reached."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name in ("import_module", "__import__")


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in ``source``, a file of the package ``package``.

    ``from a import b`` gives ``a.b``, which may be a module or a name in one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            dotted = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((node.lineno, ".".join((*dotted, alias.name))) for alias in node.names)
        elif is_import_call(node):
            assert isinstance(node, ast.Call)
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def offences(package: Path) -> list[str]:
    """Everything in ``package`` (a folder called spdk_kv) that breaks the rules of the house."""
    found = []
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        name = path.relative_to(package.parent)
        source = path.read_text(encoding="utf-8")
        parts = module_parts(path, package)
        room = room_of(parts)
        lines = source.count("\n")
        if lines > MAX_LINES:
            found.append(f"{name}: {lines} lines, more than {MAX_LINES}: split it by idea")
        if room not in FLOOR_OF:
            found.append(
                f"{name}: in no room of the house. Put it into a package of the floor that it "
                f"belongs to (engines, devices, sparse, cli, integrations ...), or add the room "
                f"'{room}' to DESIGN section 3 and to FLOORS in {Path(__file__).name}"
            )
            continue
        inside = ("spdk_kv", *(parts if path.stem == "__init__" else parts[:-1]))
        for line, dotted in imports(source, inside):
            top, *rest = dotted.split(".")
            if top in PICKLES:
                found.append(f"{name}:{line}: imports {top}: no pickle anywhere (DESIGN 4.4)")
            if top != "spdk_kv":
                continue
            target = room_of(tuple(rest))
            if len(rest) == 1 and not exists(package, target, rest[0]):
                target = "__init__"  # a name that the front door gives out
            if complaint := arrow_complaint(room, target):
                found.append(f"{name}:{line}: {complaint}")
    return list(dict.fromkeys(found))  # one line may import several names of a room


def exists(package: Path, room: str, module: str) -> bool:
    """Whether ``module`` is one of the package's own, rather than a name in its __init__."""
    return (
        room in FLOOR_OF
        or (package / module).is_dir()
        or any((package / f"{module}{suffix}").exists() for suffix in (".py", ".pyi"))
    )


def arrow_complaint(room: str, target: str) -> str | None:
    """Why ``room`` may not import ``target``, or None if it may."""
    # errors stands below its own floor: every room raises them, and they need nothing.
    if target in (room, "errors") or (room, target) in ARROWS:
        return None
    if target not in FLOOR_OF:
        return f"{room} imports {target}, which is in no room of the house"
    here, there = FLOOR_OF[room], FLOOR_OF[target]
    if there < here:
        return None
    if target == "__init__":
        return f"{room} imports from the front door spdk_kv; import from the room that holds it"
    if there == here:
        return f"{room} imports {target}, a room on its own floor {here}; only lower ones"
    return f"{room} (floor {here}) imports {target} (floor {there}); imports go downward"


def test_package_keeps_the_rules_of_the_house() -> None:
    found = offences(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_compiled_extensions_import_only_from_below() -> None:
    # ast cannot read Cython, but its import lines look the same.
    pattern = re.compile(r"^\s*(?:from|c?import)\s+spdk_kv\b\.?(\w*)", re.MULTILINE)
    found = []
    for path in sorted((ROOT / "cython_src").glob("*.p[xy]*")):
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            complaint = arrow_complaint("_native", match[1] or "__init__")
            if complaint:
                found.append(f"{path.name}: {complaint}")
    assert not found, "\n" + "\n".join(found)


def test_top_level_holds_only_what_was_agreed() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so tracked files cannot be told from others")
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    entries = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    extra = sorted(entries - TOP_LEVEL)
    assert not extra, f"not agreed on for the top level (DESIGN section 3): {extra}"


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("errors.py", "import spdk_kv.store", "errors (floor 0) imports store (floor 5)"),
        ("layout.py", "from .store import open", "layout (floor 3) imports store (floor 5)"),
        ("layout.py", "from spdk_kv import sequence", "layout (floor 3) imports sequence"),
        ("index.py", "def f():\n    from . import allocator", "a room on its own floor 3"),
        ("sequence.py", "from spdk_kv.store import KVStore", "a room on its own floor 5"),
        ("sequence_io.py", "from spdk_kv.store_put import x", "a room on its own floor 5"),
        ("sparse/tuner.py", "from ..store import KVStore", "sparse imports store"),
        ("integrations/vllm.py", "from ..cli import demo", "integrations imports cli"),
        ("cli/demo.py", "from spdk_kv import open", "the front door"),
        ("cli/demo.py", "import spdk_kv", "the front door"),
        ("units.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import store",
         "units (floor 0) imports store"),
        ("memory.py", "import importlib as i\ni.import_module('spdk_kv.cli')", "(floor 6)"),
        ("engines/ram.py", "import spdk_kv.helpers.x", "helpers, which is in no room"),
        ("helpers.py", "", "'helpers' to DESIGN section 3"),
        ("tools/deep/a.py", "", "'tools' to DESIGN section 3"),
        ("index.py", "import pickle", "no pickle anywhere"),
        ("index.py", "from marshal import loads", "no pickle anywhere"),
        ("store.py", "\n" * 451, "451 lines"),
    ],
)  # fmt: skip
def test_checker_finds(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    package = write_package(tmp_path, {path: source})
    found = offences(package)
    assert len(found) == 1, found
    assert complaint in found[0]
    assert path.split("/")[-1] in found[0]


def test_checker_lets_pass_what_is_meant(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {
            "__init__.py": "from spdk_kv.store import open",
            "__main__.py": "from spdk_kv.cli import main",
            "store.py": "from spdk_kv.sequence import Sequence\nfrom . import store_put, units",
            "store_put.py": "from spdk_kv.sequence_io import x\nimport spdk_kv.store",
            "sequence.py": "from spdk_kv import errors\nfrom spdk_kv.sequence_io import x",
            "cli/demo.py": "from . import doctor\nfrom .. import store\nimport torch.spdk_kv",
            "engines/uring.py": "from .base import Engine\nfrom .._native import transfer",
            "_native/transfer.pyi": "from ..types import KVShape",
        },
    )
    assert offences(package) == []


def write_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "spdk_kv"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package
