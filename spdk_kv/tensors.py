"""Tensors as bytes, and bytes as tensors; copied only where it cannot be avoided."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spdk_kv._native.holding import Export
from spdk_kv.errors import ShapeMismatch
from spdk_kv.scattered import Scattered
from spdk_kv.types import PLAIN_DTYPES, dtype_itemsize, dtype_name, movable, torch_dtypes

if TYPE_CHECKING:
    import torch


class ByteView(NamedTuple):
    """A tensor's bytes where they lie; valid while ``keep`` is alive. ``pieces``: of one that lies
    in several places, the bytes in each, and their addresses; ``address`` is then 0."""

    address: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    keep: Any
    pieces: tuple[tuple[int, int], ...] = ()


def byte_view(tensor: Any, *, on_cpu: bool = True) -> ByteView:
    """The bytes of a torch tensor or numpy array in C order: in host memory, or (without
    ``on_cpu``) where the tensor is.

    Copies only what is not contiguous, elsewhere, or a lazy conjugate. Raises ShapeMismatch for
    what has no plain bytes (sparse, nested, quantised, objects, foreign byte order), or more than
    them (a mask).
    """
    if isinstance(tensor, np.ndarray):
        return _array_view(tensor, _numpy_name(tensor))
    if isinstance(tensor, Scattered):
        return _scattered_view(tensor)
    if not is_tensor(tensor):
        raise ShapeMismatch(f"a torch tensor or numpy array is stored, not {type(tensor).__name__}")
    check_dense(tensor, "the tensor")
    name = dtype_name(tensor.dtype)
    if (
        (not on_cpu or tensor.is_cpu)
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        # The alias keeps the memory alive even if the caller points `tensor` elsewhere meanwhile.
        address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        return ByteView(address, nbytes, name, tuple(tensor.shape), tensor.detach())
    plain = movable(tensor).contiguous()
    if on_cpu:
        plain = plain.cpu()
    nbytes = plain.numel() * plain.element_size()
    return ByteView(plain.data_ptr(), nbytes, name, tuple(tensor.shape), plain)


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor. Nothing is before somebody imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _array_view(tensor: np.ndarray[Any, Any], name: str) -> ByteView:
    array = tensor if tensor.flags.c_contiguous else np.ascontiguousarray(tensor)
    # ascontiguousarray makes 0-d arrays 1-d; the shape recorded is the caller's. While the view
    # holds the export, numpy refuses to resize the array under a running transfer.
    export = Export(array)
    return ByteView(export.address, export.nbytes, name, tensor.shape, export)


def _scattered_view(value: Scattered) -> ByteView:
    exports = [Export(piece) for piece in value.pieces]
    pieces = tuple((export.nbytes, export.address) for export in exports)
    return ByteView(0, value.nbytes, "uint8", value.shape, exports, pieces)


def check_dense(tensor: torch.Tensor, what: str) -> None:
    """Raises ShapeMismatch unless all that ``tensor`` is can be kept as bytes in C order. ``what``
    names it in the message."""
    import torch

    why = ""
    # Asked first: of a nested or jagged tensor hardly anything else may be asked.
    if tensor.is_nested:
        why = "is nested: pad it (torch.nested.to_padded_tensor), or put its parts one by one"
    elif tensor.layout is not torch.strided:
        why = f"has the layout {tensor.layout}, not a dense one: pass x.to_dense()"
    elif tensor.is_quantized:
        why = "is quantised: pass x.int_repr(), and keep its scale and zero point beside it"
    elif tensor.is_meta:
        why = "is on the device meta, where it has no elements"
    elif (kind := type(tensor)) is not torch.Tensor and (
        kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    ):
        why = f"is a {kind.__name__}, which is more than its bytes: pass the plain tensors in it"
    elif not _has_memory(tensor):
        why = "has no memory (it is a lazy zero, or inside of torch.func): pass x.clone()"
    if why:
        raise ShapeMismatch(f"{what} {why}")


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # torch.func's wrappers have none of their own
        return False


def _numpy_name(array: np.ndarray[Any, Any]) -> str:
    if isinstance(array, np.ma.MaskedArray):
        raise ShapeMismatch(
            "a masked array would lose its mask: pass numpy.ma.getdata(x), and "
            "numpy.ma.getmaskarray(x) under another key, or x.filled()"
        )
    return _name_of(array.dtype)


@lru_cache(maxsize=256)
def _name_of(dtype: np.dtype[Any]) -> str:
    """The name of an array's dtype. ShapeMismatch where its bytes are not kept."""
    why = ""
    if dtype.names:
        why = "has fields: put them one by one (x['name'])"
    elif dtype.hasobject:
        why = "refers to Python objects, which are not kept: convert it to numbers"
    elif not dtype.isnative:
        why = "is in foreign byte order: pass x.astype(x.dtype.newbyteorder('='))"
    if why:
        raise ShapeMismatch(f"an array of dtype {dtype} {why}")
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
    flat = torch.frombuffer(buffer, dtype=kind, count=count, offset=offset)
    return flat if len(shape) == 1 else flat.view(shape)


def array_from(buffer: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A numpy array over ``buffer``. Raises ShapeMismatch for dtypes that numpy lacks."""
    if dtype not in PLAIN_DTYPES:
        raise ShapeMismatch(f"numpy has no dtype {dtype}; get it as a torch tensor")
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return np.empty(shape, dtype=dtype)
    flat = np.frombuffer(buffer, dtype=dtype, count=count)
    return flat if len(shape) == 1 else flat.reshape(shape)


class Destination(NamedTuple):
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
            # Viewed as integers where numpy has the dtype from elsewhere only (ml_dtypes).
            plain = movable(tensor).numpy().view(self.out.dtype)
            self.out[...] = plain.reshape(self.out.shape)
        elif self.out.is_conj() or self.out.is_neg():
            self.out.copy_(tensor)
        else:
            movable(self.out).copy_(movable(tensor))
        return self.out


def destination(out: Any, dtype: str, shape: tuple[int, ...], block_nbytes: int = 1) -> Destination:
    """Checks ``out`` against what is stored, on a drive with blocks of ``block_nbytes``. Raises
    ShapeMismatch."""
    if isinstance(out, np.ndarray):
        name = _numpy_name(out)
        _check_same(name, out.shape, dtype, shape)
        flags = out.flags
        if not flags.writeable:
            raise ShapeMismatch("out is read-only")
        if flags.c_contiguous:
            return Destination(out, _array_view(out, name), True)
        _check_distinct(out.shape, out.strides)
        return Destination(out, None, False)
    if isinstance(out, Scattered):
        _check_same("uint8", out.shape, dtype, shape)
        if not out.writable:
            raise ShapeMismatch("out is read-only")
        whole = out.is_whole(block_nbytes)
        return Destination(out, _scattered_view(out) if whole else None, False)
    if not is_tensor(out):
        raise ShapeMismatch(f"out is a torch tensor or numpy array, not {type(out).__name__}")
    import torch

    # Nearly all are plain, which takes less than a microsecond to see.
    if (
        type(out) is not torch.Tensor
        or out.is_nested
        or out.layout is not torch.strided
        or out.is_quantized
        or not (address := out.data_ptr())
    ):
        check_dense(out, "out")
        address = out.data_ptr()
    _check_same(dtype_name(out.dtype), tuple(out.shape), dtype, shape)
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
    return Destination(out, ByteView(address, nbytes, dtype, shape, out.detach()), plain)


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
