"""Dtypes by name, and the shape of a sequence's KV cache."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from spdk_kv.errors import ShapeMismatch

if TYPE_CHECKING:
    import torch

Granularity = Literal["layer", "head", "token"]
"""What lies contiguously: a layer's K and its V, those of one KV head, or K and V of each token."""

PLAIN_DTYPES: Mapping[str, int] = {
    "bool": 1,
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": bits // 8 for bits in (16, 32, 64)},
    **{f"complex{bits}": bits // 8 for bits in (64, 128)},
}
"""Bytes per element of the dtypes that numpy and every supported torch have, by name. To know them
takes no torch, whose import takes longer than most programs' work with arrays."""


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """Every dtype of the installed torch with whole, unquantised elements, by name."""
    import torch

    # Quantised dtypes carry a scale beside their bytes, and torch cannot view a buffer as the
    # sub-byte ones (bits1x8, int4 ...).
    found: dict[str, torch.dtype] = {}
    for name in sorted(vars(torch)):
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or str(dtype) != f"torch.{name}":
            continue
        if name.startswith(("q", "bits")):
            continue
        try:
            torch.frombuffer(bytearray(dtype.itemsize), dtype=dtype)
        except (RuntimeError, ValueError, TypeError):
            continue
        found[name] = dtype
    return found


@lru_cache(maxsize=256)
def dtype_name(dtype: Hashable) -> str:
    """The name under which ``dtype`` (torch, numpy or text) is recorded.

    ShapeMismatch for numpy dtypes that torch does not have (``float128``, strings ...).
    """
    text = str(dtype).removeprefix("torch.")
    if text not in PLAIN_DTYPES and text not in torch_dtypes():
        raise ShapeMismatch(
            f"dtype {dtype!s} cannot be stored; the ones that can are {', '.join(torch_dtypes())}"
        )
    return text


def dtype_itemsize(name: str) -> int:
    """Bytes per element of the dtype called ``name``."""
    return PLAIN_DTYPES.get(name) or torch_dtypes()[name].itemsize


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` viewed as a dtype of equal element size that torch can copy, which it cannot do
    for every dtype. Lazy values (conjugates) are resolved."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg()
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return plain.view(sizes[plain.element_size()])


@dataclass(frozen=True)
class LayerShape:
    """The shape of one layer's K and V.

    Attributes:
        kv_heads: Key and value heads.
        head_dim: Elements of one head's key.
        dtype: Of the keys; a torch or numpy dtype, or its name, kept as the name.
        value_dim: Elements of one head's value, which may be none; None, as many as of its key.
        value_dtype: Of the values; None, the keys'.

    Raises:
        ShapeMismatch: A size is not a positive int, or a dtype cannot be stored.
    """

    kv_heads: int
    head_dim: int
    dtype: Any
    value_dim: int | None = None
    value_dtype: Any = None

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        for field in ("kv_heads", "head_dim"):
            _check_size("LayerShape", field, getattr(self, field))
        if self.value_dim != 0:  # some models keep no values beside their keys
            _check_size("LayerShape", "value_dim", self.value_dim)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        values = self.dtype if self.value_dtype is None else dtype_name(self.value_dtype)
        object.__setattr__(self, "value_dtype", values)

    @property
    def is_even(self) -> bool:
        """Whether K and V are alike."""
        return (self.head_dim, self.dtype) == (self.value_dim, self.value_dtype)

    @property
    def key_nbytes(self) -> int:
        """Bytes of one token's keys in one row of a batch."""
        return self.kv_heads * self.head_dim * dtype_itemsize(self.dtype)

    @property
    def value_nbytes(self) -> int:
        """Bytes of one token's values in one row of a batch."""
        return self.kv_heads * (self.value_dim or 0) * dtype_itemsize(self.value_dtype)


@dataclass(frozen=True)
class KVShape:
    """The shape of one sequence's KV cache; fixed when the sequence is created.

    Attributes:
        layers: Layers that have a KV cache, as in the model's configuration.
        kv_heads: Key and value heads of a layer (fewer than its attention heads under GQA).
        head_dim: Elements of one head's key or value.
        dtype: A torch or numpy dtype, or its name; kept as the name.
        max_tokens: Capacity in tokens, reserved when the sequence is created, in one piece. None
            reserves none: it grows as tokens come, by pieces as large as all before.
        batch: Batch rows, which decode together. Default 1.
        per_layer: Where layers, or a layer's K and V, are unlike: the shape of each
            (:meth:`of_layers`). The fields above are then those of the first layer's keys.

    Raises:
        ShapeMismatch: A size is not a positive int, or the dtype cannot be stored.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Any
    max_tokens: int | None = None
    batch: int = 1
    per_layer: tuple[LayerShape, ...] = ()

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim", "batch"):
            _check_size("KVShape", field, getattr(self, field))
        if self.max_tokens is not None:
            _check_size("KVShape", "max_tokens", self.max_tokens)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.per_layer:
            self._check_per_layer()

    def _check_per_layer(self) -> None:
        first = self.per_layer[0]
        fields = (self.layers, self.kv_heads, self.head_dim, self.dtype)
        if fields != (len(self.per_layer), first.kv_heads, first.head_dim, first.dtype):
            raise ShapeMismatch(
                f"KVShape has {fields}, but per_layer {len(self.per_layer)} layers, the first of "
                f"{first}: make it with KVShape.of_layers()"
            )
        if all(layer == first for layer in self.per_layer) and first.is_even:
            object.__setattr__(self, "per_layer", ())  # equal shapes are equal, however made

    @classmethod
    def of_layers(
        cls, layers: Iterable[LayerShape], max_tokens: int | None = None, batch: int = 1
    ) -> KVShape:
        """A shape whose layers, or their K and V, may be unlike.

        Args:
            layers: The shape of each layer, at least one.
            max_tokens: As in :class:`KVShape`.
            batch: As in :class:`KVShape`.

        Raises:
            ShapeMismatch: There is no layer, or a size is not a positive int.
        """
        each = tuple(layers)
        if not each:
            raise ShapeMismatch("a sequence has at least one layer")
        first = each[0]
        return cls(len(each), first.kv_heads, first.head_dim, first.dtype, max_tokens, batch, each)

    def layer(self, number: int) -> LayerShape:
        """The shape of one layer."""
        if self.per_layer:
            return self.per_layer[number]
        return LayerShape(self.kv_heads, self.head_dim, self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the first layer's keys."""
        return dtype_itemsize(self.dtype)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token adds to one unit: batch x kv_heads x head_dim elements. Where layers
        are unlike, to the first layer's keys."""
        return self.batch * self.kv_heads * self.head_dim * self.itemsize

    @property
    def all_layers_token_nbytes(self) -> int:
        """Bytes that one token adds to K and V of all layers."""
        if not self.per_layer:
            return 2 * self.layers * self.token_nbytes
        return self.batch * sum(each.key_nbytes + each.value_nbytes for each in self.per_layer)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache when it is full (K and V of all layers); 0 where it grows
        without end."""
        return (self.max_tokens or 0) * self.all_layers_token_nbytes


def _check_size(kind: str, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ShapeMismatch(f"{kind}.{field} is a positive int, not {value!r}")
