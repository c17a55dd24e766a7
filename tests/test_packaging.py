"""The package as a user gets it: sdist, wheel from the sdist, and that wheel at work elsewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support.rounds import LONG

for needed in ("build", "scikit_build_core", "Cython"):
    pytest.importorskip(needed, reason=f"building needs {needed}: pip install -e '.[test]'")

# A build compiles everything.
pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parent.parent
URING = "spdk_kv/_native/engines/uring"

# Puts and gets through the public interface; argv: the venv that it must run from, a store's URI.
USE = """
import sys
from importlib.metadata import version

import torch

import spdk_kv

home, uri = sys.argv[1:]
assert spdk_kv.__file__.startswith(home), spdk_kv.__file__
assert spdk_kv.__version__ == version("spdk_kv") != "0.0.0+uninstalled"
tensor = torch.arange(300_000, dtype=torch.float32).reshape(3, -1)
store = spdk_kv.open(uri, capacity="64 MiB")
store.put("k", tensor)
assert torch.equal(store.get("k"), tensor)
store.close()
natives = [m.__file__ for name, m in sys.modules.items() if name.startswith("spdk_kv._native.")]
assert natives, "no compiled extension was used"
assert all(path.startswith(home) for path in natives), natives
"""


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` with this environment, changed by ``env``, and nothing of the checkout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # Options of somebody's own build would make another wheel than the one asked for.
    for key in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE"):
        clean.pop(key, None)
    return subprocess.run(
        [str(word) for word in command],
        env=clean | env,
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def build(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "build", "--no-isolation", *arguments, **env)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    done = build("--sdist", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stdout
    return only(out, "*.tar.gz")


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked: what every wheel here is built from."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)  # 3.10 and 3.11 before the filters came
    return only(folder, "*")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one wheel that the tests look at. Optimizing takes half of the time of a build."""
    out = tmp_path_factory.mktemp("wheel")
    kind = "Release" if LONG else "Debug"
    done = build("--wheel", "--outdir", out, source, "-C", f"cmake.build-type={kind}")
    assert done.returncode == 0, done.stdout
    return only(out, "*.whl")


@pytest.fixture
def use(tmp_path: Path) -> Callable[[Path], Path]:
    """Installs a wheel into a new venv, uses it there, and returns the venv."""

    def install_and_use(wheel: Path) -> Path:
        home = tmp_path / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        python = home / "bin/python"
        done = run(
            *(sys.executable, "-m", "pip", "--python", python, "install"),
            *("--no-deps", "--no-index", wheel),
        )
        assert done.returncode == 0, done.stdout
        see_dependencies(home)
        done = run(python, "-I", "-c", USE, home, f"file://{tmp_path}/store")
        assert done.returncode == 0, done.stdout
        return home

    return install_and_use


def see_dependencies(home: Path) -> None:
    """Lets the venv ``home`` import our dependencies from where this interpreter has them.

    Installing torch anew would take minutes. Folders named in a .pth file come last on sys.path,
    and .pth files within them are not read, so an editable spdk_kv there stays out of sight.
    """
    folders = set()
    for module in ("torch", "numpy", "click", "rich"):
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        folders.add(str(Path(spec.origin).parent.parent))
    site_packages = only(home, "lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(folders)) + "\n")


def test_sdist_holds_what_building_and_testing_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "cython_src/CMakeLists.txt"}
    wanted |= {"scripts/test.sh", "tests/test_packaging.py", "spdk_kv/py.typed"}
    wanted |= {f"cython_src/{path.name}" for path in (ROOT / "cython_src").glob("*.[chp]*")}
    assert wanted <= found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_its_extensions_and_nothing_else(wheel: Path) -> None:
    found = names(wheel)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "spdk_kv").rglob("*.py")}
    assert sources <= set(found)
    assert "spdk_kv/py.typed" in found
    extensions = [name for name in found if name.endswith(".so")]
    assert "spdk_kv/_native/transfer" in {name.partition(".")[0] for name in extensions}
    # One compiled in place in the checkout must not come along.
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    assert all(name.endswith(suffix) for name in extensions), extensions
    unstubbed = [name for name in extensions if f"{name.partition('.')[0]}.pyi" not in found]
    assert not unstubbed, "extensions without a .pyi"
    strays = [name for name in found if not name.startswith(("spdk_kv/", "spdk_kv-"))]
    assert not strays
    assert not [name for name in found if name.endswith((".pyx", ".pxd", ".c", ".h", ".pyc"))]


def test_wheel_has_the_uring_engine_where_liburing_is(wheel: Path) -> None:
    try:
        done = run("pkg-config", "--atleast-version=2.2", "liburing")
    except FileNotFoundError:
        pytest.skip("pkg-config is not installed: the wheel without io_uring has its own test")
    has_uring = any(name.startswith(URING) for name in names(wheel) if name.endswith(".so"))
    assert has_uring == (done.returncode == 0)


def test_wheel_works_in_a_clean_venv(wheel: Path, use: Callable[[Path], Path]) -> None:
    home = use(wheel)
    done = run(home / "bin/spdk-kv", "--help")
    assert done.returncode == 0, done.stdout
    assert "Usage:" in done.stdout


@pytest.mark.long
def test_wheel_without_uring_and_pkg_config_works(
    source: Path, tmp_path: Path, use: Callable[[Path], Path]
) -> None:
    done = build(
        *("--wheel", "--outdir", tmp_path, source),
        *("-C", f"build-dir={tmp_path}/build"),
        *("-C", "cmake.define.SPDK_KV_URING=OFF"),
        *("-C", "cmake.build-type=Debug"),
        # As where pkg-config is not installed; CMake looks for it beyond PATH.
        *("-C", "cmake.define.CMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON"),
    )
    assert done.returncode == 0, done.stdout
    wheel = only(tmp_path, "*.whl")
    assert not [name for name in names(wheel) if name.startswith(URING) and ".so" in name]
    use(wheel)


@pytest.mark.long
def test_asking_for_uring_without_liburing_names_the_package(source: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = build(
        *("--wheel", "--outdir", tmp_path, source),
        *("-C", f"build-dir={tmp_path}/build"),
        *("-C", "cmake.define.SPDK_KV_URING=ON"),
        PKG_CONFIG_LIBDIR=str(empty),
        PKG_CONFIG_PATH="",
    )
    assert done.returncode != 0
    # CMake wraps its messages.
    assert "apt install liburing-dev pkg-config" in " ".join(done.stdout.split()), done.stdout
