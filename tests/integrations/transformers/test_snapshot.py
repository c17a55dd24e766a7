"""Snapshots of states: the same attributes come back, or nothing does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spdk_kv.integrations.transformers import snapshot

CPU = torch.device("cpu")


def back(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return snapshot.decode(snapshot.encode("mine", layers), lambda device: device)


def test_attributes_come_back_as_they_were() -> None:
    layer = {
        "flags": {0: True, 1: False},
        "none": None,
        "sizes": [3, (4, 5)],
        "name": "ü",
        "dtype": torch.bfloat16,
        "device": CPU,
        "states": {0: torch.randn(2, 3, 5).to(torch.bfloat16), 1: None},
        "empty": torch.tensor([]),
        "bits": torch.tensor([True, False]),
        "number": torch.tensor(7),
        "wide": torch.randn(3, 2).to(torch.complex64),
    }
    (found,) = back([layer])
    assert list(found) == list(layer)
    for name in ("flags", "none", "sizes", "name", "dtype", "device"):
        assert found[name] == layer[name]
    for name in ("empty", "bits", "number", "wide"):
        assert torch.equal(found[name], layer[name])
    assert torch.equal(found["states"][0], layer["states"][0])
    assert found["states"][1] is None


def test_strides_come_back_without_what_lies_between() -> None:
    turned = torch.randn(2, 3, 4).transpose(1, 2)
    cut = torch.randn(2, 9)[:, 3:7]
    (found,) = back([{"turned": turned, "cut": cut, "repeated": torch.ones(1).expand(5)}])
    assert torch.equal(found["turned"], turned)
    assert found["turned"].stride() == turned.stride()
    assert torch.equal(found["cut"], cut)
    assert found["cut"].stride() == (4, 1)
    assert found["repeated"].tolist() == [1] * 5


def test_it_is_a_copy() -> None:
    state = torch.zeros(4)
    whole = snapshot.encode("mine", [{"state": state}])
    state += 1
    (found,) = snapshot.decode(whole, lambda device: device)
    found["state"] += 2
    assert snapshot.decode(whole, lambda device: device)[0]["state"].tolist() == [0] * 4
    assert snapshot.whose(whole) == "mine"


def test_what_is_none_is_unreadable() -> None:
    whole = snapshot.encode("mine", [{"state": torch.randn(100)}])
    damaged = whole.clone()
    damaged[30] ^= 1
    for other in (whole[:10], whole[:40], damaged, whole.float(), whole[:0], whole[None]):
        with pytest.raises(snapshot.Unreadable):
            snapshot.whose(other)
    with pytest.raises(snapshot.Unreadable, match="ends before"):
        snapshot.decode(whole[:-64], lambda device: device)
    with pytest.raises(snapshot.NotStorable, match="a set"):
        snapshot.encode("mine", [{"what": {1}}])
