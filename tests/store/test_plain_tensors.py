"""What is not plain bytes in C order is refused by name, and nothing is lost on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import spdk_kv
from spdk_kv import KVShape, ShapeMismatch
from spdk_kv.store import KVStore
from support.waiting import PATIENCE_S

Make = Callable[[], Any]


class Tagged(torch.Tensor):
    """A subclass that adds nothing to its elements."""


def masked_tensor() -> Any:
    from torch.masked import masked_tensor as make

    return make(torch.ones(3), torch.tensor([True, False, True]))


def fake_tensor() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def nested(**layout: Any) -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], **layout)


# Name -> (what makes it, what the message names).
TENSORS: dict[str, tuple[Make, str]] = {
    "nested": (nested, "nested"),
    "jagged": (lambda: nested(layout=torch.jagged), "nested"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo.*to_dense"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr.*to_dense"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "quantised.*int_repr",
    ),
    "meta": (lambda: torch.ones(3, device="meta"), "meta"),
    "masked": (masked_tensor, "MaskedTensor"),
    "traced": (fake_tensor, "FakeTensor"),
    "lazy zero": (lambda: torch._efficientzerotensor(3), "no memory"),
}
ARRAYS: dict[str, tuple[Make, str]] = {
    "masked": (lambda: np.ma.array([1, 2, 3], mask=[0, 1, 0]), "mask.*getmaskarray"),
    "masked without a mask": (lambda: np.ma.array([1, 2, 3]), "mask"),
    "of objects": (lambda: np.array([object()]), "Python objects"),
    "structured": (lambda: np.zeros(3, [("a", int), ("b", float)]), "fields"),
    "records": (lambda: np.rec.array([(1, 2.0)]), "fields"),
    "of foreign byte order": (lambda: np.arange(3).astype(">i8"), "byte order.*astype"),
    "of raw bytes": (lambda: np.zeros(2, "V8"), "void64"),
    "of text": (lambda: np.array(["a"]), "cannot be stored"),
    "of dates": (lambda: np.array(["2020-01-01"], "M8[D]"), "datetime64"),
    "list": (lambda: [1, 2], "not list"),
    "number": (lambda: np.float32(3), "not float32"),
}


@pytest.fixture
def store() -> Iterator[KVStore]:
    # torch warns that nested and masked tensors are prototypes.
    with warnings.catch_warnings(), spdk_kv.open("ram://", capacity="1 MiB") as opened:
        warnings.simplefilter("ignore", UserWarning)
        yield opened


@pytest.mark.parametrize("name", [*TENSORS, *(f"array {name}" for name in ARRAYS)])
def test_what_is_more_or_less_than_its_bytes_is_not_stored(store: KVStore, name: str) -> None:
    make, why = TENSORS[name] if name in TENSORS else ARRAYS[name.removeprefix("array ")]
    store.put("k", torch.arange(3))
    for put in (store.put, store.put_async):
        with pytest.raises(ShapeMismatch, match=why):
            put("k", make())
        with pytest.raises(ShapeMismatch, match=why):
            store.put_many({"other": torch.ones(3), "k": make()})
    assert store.keys() == ["k"]
    assert store.get("k").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [*TENSORS, "array masked", "array masked without a mask"])
def test_nothing_is_read_into_such_a_tensor(store: KVStore, name: str) -> None:
    make, why = TENSORS[name] if name in TENSORS else ARRAYS[name.removeprefix("array ")]
    stored = np.arange(3) if name.startswith("array") else torch.arange(3.0)
    store.put("k", stored)
    for get in (store.get, store.get_async):
        with pytest.raises(ShapeMismatch, match=why):
            get("k", out=make())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_sequence_refuses_them_too_and_is_unchanged(store: KVStore, name: str, side: str) -> None:
    shape = KVShape(layers=1, kv_heads=1, head_dim=2, dtype="float32", max_tokens=8)
    sequence = store.sequence("s", shape)
    good = torch.arange(6.0).view(1, 1, 3, 2)
    sequence.append(0, good, good)
    make, why = TENSORS[name]
    pair = (make(), good) if side == "k" else (good, make())
    with pytest.raises(ShapeMismatch, match=rf"^{side} .*{why}"):
        sequence.append(0, *pair)
    with pytest.raises(ShapeMismatch, match=rf"^{side} .*{why}"):
        sequence.append_async(0, *pair).result(PATIENCE_S)
    assert sequence.tokens(0) == 3
    assert torch.equal(sequence.read(0)[0], good)


@pytest.mark.parametrize("given", [np.ones((1, 1, 3, 2), np.float32), [1.0], None])
def test_a_sequence_takes_torch_tensors_only_and_says_so(store: KVStore, given: Any) -> None:
    shape = KVShape(layers=1, kv_heads=1, head_dim=2, dtype="float32", max_tokens=8)
    with pytest.raises(ShapeMismatch, match=f"k is a torch tensor, not {type(given).__name__}"):
        store.sequence("s", shape).append(0, given, torch.ones(1, 1, 3, 2))


def test_a_tensor_inside_of_vmap_is_refused(store: KVStore) -> None:
    with pytest.raises(ShapeMismatch, match=r"torch\.func"):
        torch.vmap(lambda row: store.put("k", row) or row)(torch.ones(2, 3))


def test_views_are_stored_as_what_they_show(store: KVStore) -> None:
    grid = np.arange(12).reshape(3, 4)
    pair = torch.tensor([1 + 2j, 3 - 1j])
    views: dict[str, Any] = {
        "reversed": grid[::-1, ::-2],
        "transposed": grid.T,
        "broadcast": np.broadcast_to(np.arange(3), (2, 3)),
        "matrix": np.matrix([[1, 2]]),
        "zero-dimensional": np.array(5),
        "conjugated": pair.conj(),
        "negated": pair.conj().imag,
        "expanded": torch.ones(1).expand(4),
        "subclass": torch.ones(3).as_subclass(Tagged),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "lazy zero, copied": torch._efficientzerotensor(3).clone(),
    }
    for name, view in views.items():
        store.put(name, view)
    for name, view in views.items():
        found = store.get(name)
        assert type(found) is torch.Tensor
        assert (tuple(found.shape), found.tolist()) == (tuple(view.shape), view.tolist()), name


def test_numpy_arrays_of_foreign_dtypes_are_read_into_where_they_lie(store: KVStore) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    store.put("k", torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    out = np.zeros((3, 2), ml_dtypes.bfloat16).T
    assert store.get("k", out=out) is out
    assert out.astype(float).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_out_that_runs_backwards_is_filled(store: KVStore) -> None:
    store.put("k", np.arange(6).reshape(2, 3))
    out = np.zeros((2, 3), int)[::-1, ::-1]
    store.get("k", out=out)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5]]
