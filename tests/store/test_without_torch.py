"""What needs no torch does not import it: that takes longer than the rest of a small program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spdk_kv.types import PLAIN_DTYPES, dtype_name, torch_dtypes

CODE = """
import sys
import numpy as np
import spdk_kv

arrays = {
    name: np.arange(-3, 9).reshape(3, 4).astype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}


def same(found, wanted):
    return (found.dtype, found.shape, found.tobytes()) == (
        wanted.dtype, wanted.shape, wanted.tobytes(),
    )


with spdk_kv.open(sys.argv[1], capacity="16 MiB") as store:
    for name, array in arrays.items():
        store.put(name, array)
        assert same(store.get(name, as_numpy=True), array), name
        out = np.empty_like(array)
        assert store.get(name, out=out) is out and same(out, array), name
    store.put_many({f"{name} again": array for name, array in arrays.items()})
    found = store.get_many([f"{name} again" for name in arrays], as_numpy=True)
    assert all(map(same, found, arrays.values()))
    store.put_async("later", out).result()
    assert same(store.get_async("later", as_numpy=True).result(), out)
    for wrong in (b"bytes", [1.0]):
        for call in (store.put, lambda key, out: store.get("bool", out=out)):
            try:
                call("wrong", wrong)
            except spdk_kv.ShapeMismatch as refused:
                assert "torch tensor or numpy array" in str(refused)
            else:
                raise AssertionError(wrong)
    store.put("empty", np.empty((0, 3), np.float32))
    assert store.get("empty", as_numpy=True).shape == (0, 3)
    store.flush()
    store.stats()
    store.delete("later")
    spdk_kv.KVShape(2, 2, 64, "float16")
with spdk_kv.open(sys.argv[1]) as store:
    assert same(store.get("complex64", as_numpy=True), arrays["complex64"])
assert "torch" not in sys.modules
"""


def test_numpy_arrays_need_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"file://{tmp_path}/kv"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PLAIN_DTYPES)
def test_what_is_known_of_a_dtype_is_true(name: str) -> None:
    assert PLAIN_DTYPES[name] == torch_dtypes()[name].itemsize == np.dtype(name).itemsize
    assert dtype_name(np.dtype(name)) == dtype_name(torch_dtypes()[name]) == name
