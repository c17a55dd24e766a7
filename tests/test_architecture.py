"""The house of docs/architecture.md, enforced: rooms on floors, imports strictly downward.

Read from the source with `ast`, so that imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.places import ROOT

PACKAGE = ROOT / "spdk_kv"

FLOORS = (
    "errors units terminal",
    "_native",
    "residency devices metrics types scattered deadline",
    "index placement engines memory binding tensors",
    "paths link",
    "sequence",
    "store sparse",
    "integrations measure testing",
    "demo",
    "cli",
    # The front door and `python -m spdk_kv`: they open any room, and no room imports them.
    "__init__ __main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
# Their modules have no common face: extensions are compiled one by one, and each integration
# imports the engine that it is for.
FACELESS = ("_native", "integrations")

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve"}
MAX_LINES = 450
TOP_LEVEL = {
    *("pyproject.toml", "spdk_kv", "cython_src", "scripts", "tests", "bench", "vagrant"),
    *("README.md", ".ci", "docs", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    ".gitignore",
}


def module_of(path: Path, package: Path) -> str:
    """``engines/uring.py`` as "engines.uring", ``engines/__init__.py`` as "engines"."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import in ``source``, a file of the package ``package``; the
    name is empty where a module is imported as a whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            dotted = ".".join((*base, *([node.module] if node.module else ())))
            yield from ((node.lineno, dotted, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(given, ast.Constant):
                yield node.lineno, str(given.value), ""


def writes(source: str, *, only_looks: bool = False) -> Iterator[int]:
    """Lines of ``source`` that open something for writing, or write to it.

    Unless the file ``only_looks``, they count where /sys or /proc is named as well: in the same
    function for a descriptor, which may be that of a drive, in the same file for text.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and opens_text_to_write(node):
            if only_looks or names_kernel_files(tree):
                yield node.lineno
        elif isinstance(node, ast.FunctionDef) and (only_looks or names_kernel_files(node)):
            yield from (
                inner.lineno
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute)
                and inner.attr in ("O_WRONLY", "O_RDWR", "O_APPEND", "O_CREAT")
            )


def opens_text_to_write(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "write":
        return getattr(getattr(call.func, "value", None), "id", "") == "os"
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [arg.value for arg in given if isinstance(arg, ast.Constant)]
    return name in ("write_text", "write_bytes") or (
        name in ("open", "fdopen")
        and any(re.fullmatch(r"[rwxabt+]*[wxa+][rwxabt+]*", str(mode)) for mode in modes)
    )


def names_kernel_files(tree: ast.AST) -> bool:
    # A docstring may name them; what is opened stands at the beginning of a string.
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return any(isinstance(s, str) and re.match(r"/?(sys|proc)(/|$)", s) for s in strings)


class House:
    """A package called spdk_kv, and what in it breaks the rules."""

    def __init__(self, package: Path) -> None:
        self.package = package
        paths = sorted([*package.rglob("*.py"), *package.rglob("*.pyi")])
        self.modules = {module_of(path, package): path for path in paths}
        self.arrows: dict[str, set[str]] = {}

    def offences(self) -> list[str]:
        found = []
        for module, path in self.modules.items():
            name = path.relative_to(self.package.parent)
            source = path.read_text(encoding="utf-8")
            if (lines := source.count("\n")) > MAX_LINES:
                found.append(f"{name}: {lines} lines, more than {MAX_LINES}: split it by idea")
            if room_of(module) not in FLOOR_OF:
                found.append(
                    f"{name}: in no room of the house. Put it into a room of the floor that it "
                    f"belongs to, or give it a room in FLOORS of {Path(__file__).name} and in "
                    "docs/architecture.md"
                )
                continue
            inside = path.relative_to(self.package.parent).parts[:-1]
            for line, target, given in imported(source, inside):
                if complaint := self.complaint(module, target, given):
                    found.append(f"{name}:{line}: {complaint}")
        return list(dict.fromkeys(found)) + self.circles()

    def complaint(self, module: str, target: str, given: str) -> str | None:
        """Why ``module`` may not import ``given`` of ``target``, or None if it may."""
        top, *rest = target.split(".")
        if top in PICKLES:
            return f"imports {top}: no pickle anywhere (docs/architecture.md)"
        if top != "spdk_kv":
            return None
        dotted = ".".join(rest)
        whole = ".".join((*rest, given)) if given else dotted
        # `from spdk_kv.engines import ng` may name a module or something that the face gives out.
        is_module = whole in self.modules or (not dotted and given in FLOOR_OF)
        aimed = whole if is_module else dotted
        self.arrows.setdefault(module, set()).add(aimed or "__init__")
        room = room_of(aimed) if aimed else "__init__"
        # A package within a room has a face of its own, which other rooms may import.
        face = aimed in self.modules and self.modules[aimed].stem == "__init__"
        return complain(room_of(module), room, aimed, face=face)

    def circles(self) -> list[str]:
        """The modules that import each other, however far around."""
        found, done = [], set()

        def visit(module: str, trail: list[str]) -> None:
            if module in trail:
                found.append("a circle: " + " -> ".join([*trail[trail.index(module) :], module]))
            elif module not in done:
                for target in sorted(self.arrows.get(module, ())):
                    visit(target, [*trail, module])
                done.add(module)

        for module in self.modules:
            visit(module, [])
        return found


def complain(room: str, target: str, aimed: str, *, face: bool = False) -> str | None:
    """Why ``room`` may not import ``aimed``, a module or a package's ``face``, of ``target``."""
    if target == room:
        own = aimed == room and room not in FACELESS
        return f"{room} imports its own face; import the file that holds it" if own else None
    if target not in FLOOR_OF:
        return f"{room} imports {target}, which is in no room of the house"
    here, there = FLOOR_OF[room], FLOOR_OF[target]
    if target == "__init__":
        return f"{room} imports from the front door spdk_kv; import from the room that holds it"
    if there == here and target != "errors":
        return f"{room} imports {target}, a room on its own floor {here}; only lower ones"
    if there > here:
        return f"{room} (floor {here}) imports {target} (floor {there}); imports go downward"
    deep = "." in aimed and not face
    if deep and target not in FACELESS and room not in ("__init__", "__main__"):
        return f"{room} imports past the face of {target} ({aimed}); its __init__ gives out names"
    return None


def test_package_keeps_the_rules_of_the_house() -> None:
    found = House(PACKAGE).offences()
    assert not found, "\n" + "\n".join(found)


def test_only_binding_writes_to_sysfs_and_procfs() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(module_of(path, PACKAGE))
        if room != "binding":
            source = path.read_text(encoding="utf-8")
            name = path.relative_to(PACKAGE.parent)
            found += [f"{name}:{line}" for line in writes(source, only_looks=room == "devices")]
    assert not found, f"what changes the machine belongs into spdk_kv/binding/: {found}"


def test_compiled_extensions_import_only_from_below() -> None:
    # ast cannot read Cython, but its import lines look the same.
    pattern = re.compile(r"^\s*(?:from|c?import)\s+spdk_kv\b\.?(\w*)", re.MULTILINE)
    found = []
    for path in sorted((ROOT / "cython_src").rglob("*.p[xy]*")):
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            target = match[1] or "__init__"
            if complaint := complain("_native", target, target):
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
    assert not extra, f"not agreed on for the top level (docs/architecture.md): {extra}"


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("errors.py", "import spdk_kv.store", "errors (floor 0) imports store (floor 6)"),
        ("index/a.py", "from ..store import open", "index (floor 3) imports store (floor 6)"),
        ("index/a.py", "from spdk_kv import sequence", "index (floor 3) imports sequence"),
        ("index/a.py", "def f():\n    from .. import placement", "a room on its own floor 3"),
        ("paths/a.py", "from spdk_kv.link import x", "a room on its own floor 4"),
        ("sparse/tuner.py", "from ..store import KVStore", "a room on its own floor 6"),
        ("integrations/vllm.py", "from ..cli import demo", "integrations (floor 7) imports cli"),
        ("cli/demo.py", "from spdk_kv import open", "the front door"),
        ("cli/demo.py", "import spdk_kv", "the front door"),
        ("units.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import store",
         "units (floor 0) imports store"),
        ("memory/a.py", "import importlib as i\ni.import_module('spdk_kv.cli')", "(floor 9)"),
        ("engines/ram.py", "import spdk_kv.helpers.x", "helpers, which is in no room"),
        ("helpers.py", "", "in no room of the house"),
        ("tools/deep/a.py", "", "in no room of the house"),
        ("index/a.py", "import pickle", "no pickle anywhere"),
        ("index/a.py", "from marshal import loads", "no pickle anywhere"),
        ("store/a.py", "\n" * 451, "451 lines"),
        ("store/a.py", "from spdk_kv.store import open", "imports its own face"),
        ("store/a.py", "from spdk_kv.index.records import X", "past the face of index"),
        ("store/a.py", "import spdk_kv.devices.use.facts", "past the face of devices"),
        ("store/a.py", "import spdk_kv.store.a", "a circle: store.a -> store.a"),
    ],
)  # fmt: skip
def test_checker_finds(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    found = House(write_package(tmp_path, {path: source})).offences()
    assert len(found) == 1, found
    assert complaint in found[0]


def test_checker_finds_circles_within_a_room(tmp_path: Path) -> None:
    files = {
        "store/a.py": "from spdk_kv.store.b import x",
        "store/b.py": "from spdk_kv.store import c",
        "store/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a",
    }
    found = House(write_package(tmp_path, files)).offences()
    assert found == ["a circle: store.a -> store.b -> store.c -> store.a"]


def test_checker_lets_pass_what_is_meant(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from spdk_kv.store.store import open",
        "__main__.py": "from spdk_kv.cli import main",
        "store/__init__.py": "from spdk_kv.store.store import open",
        "store/store.py": "from spdk_kv.sequence import Sequence\nfrom . import put\nimport torch",
        "store/put.py": "from spdk_kv import units\nfrom spdk_kv.errors import SpdkKvError",
        "sequence/__init__.py": "from spdk_kv.sequence.sequence import Sequence",
        "sequence/sequence.py": "from spdk_kv._native.transfer import Transfer",
        "demo/run.py": "from spdk_kv.integrations.transformers import OffloadedKVCache",
        "units.py": "from spdk_kv import errors",
        "devices/inspection/__init__.py": "from spdk_kv.devices.inspection.facts import read",
        "devices/inspection/facts.py": "from spdk_kv.devices.sysfs import read_text",
        "devices/sysfs.py": "",
        "index/a.py": "from spdk_kv.devices.inspection import read",
        "cli/doctor.py": "",
        "cli/demo.py": "from . import doctor\nfrom .. import store\nimport torch.spdk_kv",
    }
    assert House(write_package(tmp_path, files)).offences() == []


@pytest.mark.parametrize(
    "source",
    [
        "from pathlib import Path\nPath('/proc/sys/vm/drop_caches').write_text('3')",
        "def f(root):\n    (root / 'sys/bus').open('w').write('x')",
        "open('/sys/power/state', mode='r+')",
        "import os\ndef f():\n    fd = os.open('/sys/power/state', os.O_WRONLY)",
        "import os\nPLACE = '/sys/power/state'\ndef f(fd):\n    os.write(fd, PLACE)",
    ],
)
def test_checker_finds_writes_to_the_kernel(source: str) -> None:
    assert list(writes(source))


def test_checker_finds_any_write_where_files_only_look() -> None:
    source = "import os\ndef f(path):\n    os.open(path, os.O_RDWR)\n    path.write_text('x')"
    assert not list(writes(source))
    assert sorted(writes(source, only_looks=True)) == [3, 4]


def write_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "spdk_kv"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package
