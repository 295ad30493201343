"""PIL images that remain numpy arrays until their pixels are used.

Each frame of a pipeline arrives from shared memory as an array, but Pillow stores pixels in its own memory and layout.
Creating 81 images of 720 x 1280 takes longer than transferring them, and many are never used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

MODES = {"L": (), "RGB": (3,), "RGBA": (4,)}  # modes stored as plain bytes, with their trailing dimensions


class Frame(Image.Image):
    """A PIL image over a uint8 array `(height, width)`, `(height, width, 3)` or `(height, width, 4)`.

    The first operation that needs Pillow's own memory copies the pixels there and releases the array. Until then,
    nothing else may write to the array. A frame equals an ordinary image with the same pixels; copies, pickles and
    results of methods are ordinary images.

    Raises:
        ValueError: the array has another dtype or shape.
    """

    def __init__(self, array: np.ndarray, info: dict[Any, Any] | None = None) -> None:
        mode = next((mode for mode, pixel in MODES.items() if array.shape[2:] == pixel), None)
        if mode is None or array.ndim < 2 or array.dtype != np.uint8:
            raise ValueError(f"No image mode fits an array of {array.dtype} {array.shape}.")
        self._array: np.ndarray | None = None
        self._decoded: dict[str, Any] = {}
        super().__init__()
        # a plain attribute up to Pillow 10.0; since then, a property that reads `_mode`
        self.__dict__["_mode" if hasattr(Image.Image, "mode") else "mode"] = mode
        self._size = (array.shape[1], array.shape[0])
        self.info = dict(info or {})
        self._array = np.ascontiguousarray(array)

    @property
    def array(self) -> np.ndarray | None:
        """The pixels, which must not be modified; None once Pillow has copied them."""
        return self._array

    # Pillow reads an image's pixels only through one of these two names; through `_im` since Pillow 11.

    @property
    def _im(self) -> Any:
        array = self._array  # read before the check below: it is released only after the pixels are stored
        if "core" not in self._decoded and array is not None:
            # Pillow 10.0 fails to decode empty images
            image = Image.frombytes(self.mode, self.size, array.data) if array.size else Image.new(self.mode, self.size)
            self._decoded.setdefault("core", image.im)  # concurrent threads share the first result
            self._array = None
        return self._decoded.get("core")

    @_im.setter
    def _im(self, core: Any) -> None:
        if core is not None:  # Pillow's constructor sets None
            self._decoded["core"] = core
            self._array = None

    if not hasattr(Image.Image, "im"):
        im = _im

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The array interface for numpy; read-only, as for any image."""
        array = self._array
        if array is None:
            return super().__array_interface__
        return {
            "version": 3,
            "shape": array.shape,
            "typestr": "|u1",
            "data": array.reshape(-1).data.toreadonly(),
        }

    def tobytes(self, encoder_name: str = "raw", *args: Any) -> bytes:
        """Returns the pixels as bytes, like `PIL.Image.Image.tobytes`."""
        array = self._array
        if array is not None and encoder_name == "raw" and not args:
            return array.tobytes()
        return super().tobytes(encoder_name, *args)

    def __eq__(self, other: object) -> bool:
        if type(other) not in (Frame, Image.Image):
            return False
        assert isinstance(other, Image.Image)
        same = (self.mode, self.size, self.info) == (other.mode, other.size, other.info)
        return same and self.tobytes() == other.tobytes()

    __hash__ = None  # type: ignore[assignment]  # as for any image

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles as an ordinary image, which only needs Pillow to load."""
        return Image.Image, (), [self.info, self.mode, self.size, None, self.tobytes()]
