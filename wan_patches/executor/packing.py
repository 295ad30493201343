"""Pickles values without copying their tensors, arrays and images until they are sent."""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import Any

import numpy as np
import torch
from PIL import Image

from wan_patches.executor.images import MODES, Frame

_STAGING = 32 << 20  # bytes of pinned memory for copies of NPU tensors


class Payload:
    """A buffer of `nbytes` bytes that a pickle refers to, still in the memory of its owner."""

    nbytes: int

    def dense(self) -> np.ndarray | None:
        """Returns the bytes as a one-dimensional view; None if they are not contiguous in CPU memory."""
        return None

    def copy_to(self, target: np.ndarray, pinned: bool = False) -> None:
        """Fills `target`. If `pinned`, a device may write to it asynchronously; synchronize afterwards."""
        source = self.dense()
        assert source is not None
        np.copyto(target, source)

    def bytes(self) -> np.ndarray:
        """Returns the bytes, copied only if necessary."""
        found = self.dense()
        if found is None:
            found = np.empty(self.nbytes, np.uint8)
            self.copy_to(found)
        return found


class _BufferPayload(Payload):
    """The buffer of an object that pickles out of band by itself."""

    def __init__(self, buffer: pickle.PickleBuffer) -> None:
        self._bytes = np.frombuffer(view, np.uint8) if (view := buffer.raw()).nbytes else np.empty(0, np.uint8)
        self.nbytes = self._bytes.nbytes

    def dense(self) -> np.ndarray:
        return self._bytes


class _ArrayPayload(Payload):
    """The bytes of a numpy array in the given order, `C` or `F`."""

    def __init__(self, array: np.ndarray, order: Any) -> None:
        self._array, self._order = array, order
        self.nbytes = array.nbytes

    def dense(self) -> np.ndarray | None:
        array = self._array.T if self._order == "F" else self._array
        return array.reshape(-1).view(np.uint8) if array.flags.c_contiguous else None

    def copy_to(self, target: np.ndarray, pinned: bool = False) -> None:
        np.copyto(_array(target, self._array.dtype, self._array.shape, self._order), self._array)


class TensorPayload(Payload):
    """The bytes of a strided tensor, on any device, laid out with the given strides."""

    def __init__(self, tensor: torch.Tensor, stride: tuple[int, ...]) -> None:
        self._tensor, self._stride = tensor, stride
        self.nbytes = tensor.numel() * tensor.element_size()

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    def dense(self) -> np.ndarray | None:
        tensor = self._tensor
        if tensor.device.type != "cpu" or tensor.stride() != self._stride:
            return None
        return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()

    def copy_to(self, target: np.ndarray, pinned: bool = False) -> None:
        if (source := self.dense()) is not None:
            np.copyto(target, source)
        elif self.device.type == "npu":
            self._copy_through_pinned_memory(target)
        else:
            tensor = self._tensor
            make_tensor(target, tensor.dtype, tuple(tensor.shape), self._stride).copy_(tensor, non_blocking=pinned)

    def _copy_through_pinned_memory(self, target: np.ndarray) -> None:
        """Copies in pieces through pinned memory, for devices that cannot register the target. Limits pinned memory."""
        tensor = self._tensor
        if tensor.stride() != self._stride:
            tensor = torch.empty_strided(tensor.shape, self._stride, dtype=tensor.dtype, device=tensor.device)
            tensor.copy_(self._tensor)
        source = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        staging = torch.empty(min(_STAGING, self.nbytes), dtype=torch.uint8, device="cpu")
        with contextlib.suppress(RuntimeError):  # works without, but slower
            staging = staging.pin_memory()
        for start in range(0, self.nbytes, _STAGING):
            piece = staging[: self.nbytes - start]
            piece.copy_(source[start : start + _STAGING])
            np.copyto(target[start : start + _STAGING], piece.numpy())


class _ImagePayload(Payload):
    """The pixels of an image; Pillow encodes them during the copy."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self.nbytes = image.width * image.height * len(image.getbands())

    def dense(self) -> np.ndarray | None:
        array = self._image.array if isinstance(self._image, Frame) else None
        return None if array is None else array.reshape(-1)

    def copy_to(self, target: np.ndarray, pinned: bool = False) -> None:
        np.copyto(target, np.asarray(self._image).reshape(-1))


class _Aside:
    """Collects payloads in the order in which the pickle refers to them.

    Separate from the pickler, which would otherwise refer to itself and keep payloads until a garbage collection.
    """

    def __init__(self) -> None:
        self.payloads: list[Payload] = []
        self._waiting: dict[int, tuple[pickle.PickleBuffer, Payload]] = {}

    def put(self, payload: Payload) -> pickle.PickleBuffer:
        """Returns a placeholder for the payload in the pickle, without reading its bytes."""
        stand_in = pickle.PickleBuffer(bytearray(1))
        self._waiting[id(stand_in)] = stand_in, payload  # keeps the id unique
        return stand_in

    def collect(self, buffer: pickle.PickleBuffer) -> None:
        """The pickler's `buffer_callback`."""
        found = self._waiting.pop(id(buffer), None)
        self.payloads.append(found[1] if found else _BufferPayload(buffer))


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, aside: _Aside) -> None:
        super().__init__(file, protocol=5, buffer_callback=aside.collect)
        self._aside = aside

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is torch.Tensor and _is_plain(value):
            return self._reduce_tensor(value)
        if kind is np.ndarray and not value.dtype.hasobject:
            order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
            return _array, (self._aside.put(_ArrayPayload(value, order)), value.dtype, value.shape, order)
        if (kind is Image.Image or kind is Frame) and value.mode in MODES:
            shape = (value.height, value.width, *MODES[value.mode])
            return _frame, (self._aside.put(_ImagePayload(value)), shape, value.info)
        return NotImplemented

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        stride = tensor.stride()
        if not tensor.is_contiguous():
            dense = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
            if dense != stride:
                stride = torch.empty(tensor.shape, device="meta").stride()
        payload = TensorPayload(tensor, stride)
        return make_tensor, (self._aside.put(payload), tensor.dtype, tuple(tensor.shape), stride)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes fully describe the tensor."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and not any(getattr(tensor, "names", ()))  # not available in every torch version
        and not tensor.__dict__
    )


class Packed:
    """A pickled value. Its tensors, arrays and images are copied each time it is sent."""

    def __init__(self, stream: bytes, payloads: list[Payload]) -> None:
        self.stream = stream
        self.payloads = payloads

    @property
    def nbytes(self) -> int:
        """The number of bytes to send."""
        return len(self.stream) + sum(payload.nbytes for payload in self.payloads)

    def parts(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the pickle and its buffers as uint8 arrays for other transports, copied only if necessary.

        A `Message` of `[parts]` loads the value; the buffers must then be writable.
        """
        return np.frombuffer(self.stream, np.uint8), [payload.bytes() for payload in self.payloads]


def pack(value: Any) -> Packed:
    """Pickles a value without copying the bytes of its tensors, arrays and images until it is sent.

    Strided tensors of any dtype and device arrive as detached CPU tensors: dense ones with their strides, others
    contiguous. PIL images of modes L, RGB and RGBA arrive as `Frame`. All arrive writable and independent of one
    another; repeated references to an object arrive as one object. Other objects are pickled as usual.

    Raises:
        Exception: pickling failed, usually with `pickle.PicklingError`, `TypeError` or `AttributeError`.
    """
    aside, file = _Aside(), io.BytesIO()
    _Pickler(file, aside).dump(value)
    return Packed(file.getvalue(), aside.payloads)


# Called during unpickling, with the buffers in place


def make_tensor(
    buffer: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    if not len(buffer):
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    return torch.from_numpy(buffer).view(dtype).as_strided(shape, stride)


def _array(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.ndarray(shape, dtype, buffer, order=order)


def _frame(buffer: np.ndarray, shape: tuple[int, ...], info: dict[Any, Any]) -> Frame:
    return Frame(buffer.reshape(shape), info)
