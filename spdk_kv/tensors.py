"""Tensors as bytes, and bytes as tensors; copied only where it cannot be avoided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv.errors import ShapeMismatch
from spdk_kv.types import dtype_itemsize, dtype_name, movable, torch_dtypes

if TYPE_CHECKING:
    import torch

_NUMPY_ALONE = frozenset(
    name for name in ("bool", "complex64", "complex128", "float16", "float32", "float64")
) | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, slots=True)
class ByteView:
    """A tensor's bytes where they lie; valid while ``keep`` is alive."""

    address: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    keep: Any


def byte_view(tensor: Any, *, on_cpu: bool = True) -> ByteView:
    """The bytes of a torch tensor or numpy array in C order: in host memory, or (without
    ``on_cpu``) where the tensor is.

    Copies only what is not contiguous, elsewhere, or a lazy conjugate. Raises ShapeMismatch for
    what has no plain bytes (sparse, quantised, objects, foreign byte order).
    """
    if isinstance(tensor, np.ndarray):
        name = _numpy_name(tensor.dtype)
        array = np.ascontiguousarray(tensor)
        # ascontiguousarray makes 0-d arrays 1-d; the shape recorded is the caller's. While the view
        # holds the export, numpy refuses to resize the array under a running transfer.
        export = array.reshape(-1).view(np.uint8).data if array.size else None
        return ByteView(array.ctypes.data, array.nbytes, name, tensor.shape, (array, export))
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ShapeMismatch(f"a torch tensor or numpy array is stored, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ShapeMismatch(
            f"only dense tensors with plain elements are stored, not {tensor.type()}"
        )
    name = dtype_name(tensor.dtype)
    plain = movable(tensor).contiguous()
    if on_cpu:
        plain = plain.cpu()
    return ByteView(
        plain.data_ptr(), plain.numel() * plain.element_size(), name, tuple(tensor.shape), plain
    )


def _numpy_name(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject or dtype.names or not dtype.isnative:
        raise ShapeMismatch(f"numpy dtype {dtype!r} has no plain bytes in this machine's order")
    return dtype_name(dtype.name)


def tensor_from(buffer: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    """A torch tensor over ``buffer`` from byte ``offset``; it keeps the buffer alive."""
    import torch

    count = 1
    for size in shape:
        count *= size
    kind = torch_dtypes()[dtype]
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(buffer, dtype=kind, count=count, offset=offset).view(shape)


def array_from(buffer: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A numpy array over ``buffer``. Raises ShapeMismatch for dtypes that numpy lacks."""
    if dtype not in _NUMPY_ALONE:
        raise ShapeMismatch(f"numpy has no dtype {dtype}; get it as a torch tensor")
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return np.empty(shape, dtype=dtype)
    return np.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a get puts its bytes when the caller gave ``out``.

    ``view``: the bytes of ``out``, if the drive may write there; otherwise ``out`` is filled by a
    copy. ``plain``: its bytes are the stored ones, in order, on whatever device.
    """

    out: Any
    view: ByteView | None
    plain: bool

    @property
    def direct(self) -> bool:
        """Whether the drive may write to ``out`` itself."""
        return self.view is not None

    def fill(self, tensor: torch.Tensor) -> Any:
        """Copies ``tensor`` into ``out`` and returns it; blocks until a GPU has the bytes."""
        if isinstance(self.out, np.ndarray):
            self.out[...] = tensor.numpy()
        elif self.out.is_conj() or self.out.is_neg():
            self.out.copy_(tensor)
        else:
            movable(self.out).copy_(movable(tensor))
        return self.out


def destination(out: Any, dtype: str, shape: tuple[int, ...]) -> Destination:
    """Checks ``out`` against what is stored. Raises ShapeMismatch."""
    if isinstance(out, np.ndarray):
        _check_same(_numpy_name(out.dtype), out.shape, dtype, shape)
        if not out.flags.writeable:
            raise ShapeMismatch("out is read-only")
        _check_distinct(out.shape, out.strides)
        plain = out.flags.c_contiguous
        return Destination(out, byte_view(out) if plain else None, plain)
    import torch

    if not isinstance(out, torch.Tensor):
        raise ShapeMismatch(f"out is a torch tensor or numpy array, not {type(out).__name__}")
    _check_same(dtype_name(out.dtype), tuple(out.shape), dtype, shape)
    if out.layout is not torch.strided or out.is_quantized or out.is_meta:
        raise ShapeMismatch(f"out is a dense tensor, not {out.type()}")
    if out.requires_grad:
        raise ShapeMismatch("out requires grad; pass out.detach()")
    contiguous = out.is_contiguous()
    if not contiguous:
        _check_distinct(out.shape, out.stride())
    plain = contiguous and not (out.is_conj() or out.is_neg())
    if not plain or out.device.type != "cpu":
        return Destination(out, None, plain)
    # byte_view would find the same by six torch operations. The alias keeps the memory alive even
    # if the caller points `out` elsewhere meanwhile.
    nbytes = out.numel() * out.element_size()
    return Destination(out, ByteView(out.data_ptr(), nbytes, dtype, shape, out.detach()), plain)


def _check_distinct(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if 0 not in shape and any(
        size > 1 and not stride for size, stride in zip(shape, strides, strict=True)
    ):
        raise ShapeMismatch("out has elements that share memory (it was expanded)")


def _check_same(
    dtype: str, shape: tuple[int, ...], stored_dtype: str, stored_shape: tuple[int, ...]
) -> None:
    if dtype != stored_dtype or shape != stored_shape:
        raise ShapeMismatch(
            f"out is {dtype}{list(shape)}, but {stored_dtype}{list(stored_shape)} is stored"
        )


def shape_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    count = dtype_itemsize(dtype)
    for size in shape:
        count *= size
    return count
