"""Images that stay arrays until somebody looks at them.

A pipeline's frames come out of shared memory as one array each; Pillow keeps pixels in memory of its own, in
another layout. Making 81 images of 720 x 1280 takes longer than moving them, and many are never looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

MODES = {"L": (), "RGB": (3,), "RGBA": (4,)}  # the modes that are plain bytes, and what these add to the shape


class Frame(Image.Image):
    """A PIL image over a uint8 array `(height, width)`, `(height, width, 3)` or `(height, width, 4)`.

    The pixels move into Pillow's own memory at the first use that needs them there, and the array is let go.
    Until then the array must not be written by others. Equal to an ordinary image with the same pixels;
    copies, pickles and what its methods return are ordinary images.

    Raises:
        ValueError: the array has another dtype or shape.
    """

    def __init__(self, array: np.ndarray, info: dict[Any, Any] | None = None) -> None:
        mode = next((mode for mode, pixel in MODES.items() if array.shape[2:] == pixel), None)
        if mode is None or array.ndim < 2 or array.dtype != np.uint8:
            raise ValueError(f"No image is made of {array.dtype} {array.shape}.")
        self._array: np.ndarray | None = None
        self._decoded: dict[str, Any] = {}
        super().__init__()
        # a plain attribute up to Pillow 10.0, a property over the other name since
        self.__dict__["_mode" if hasattr(Image.Image, "mode") else "mode"] = mode
        self._size = (array.shape[1], array.shape[0])
        self.info = dict(info or {})
        self._array = np.ascontiguousarray(array)

    @property
    def array(self) -> np.ndarray | None:
        """The pixels, not to be written; None once Pillow has them."""
        return self._array

    # All of Pillow reads an image's pixels through one of these two names; `_im` since Pillow 11.

    @property
    def _im(self) -> Any:
        array = self._array  # before the look below: it is let go after the pixels are there
        if "core" not in self._decoded and array is not None:
            # Pillow 10.0 decodes nothing into nothing with an error
            image = Image.frombytes(self.mode, self.size, array.data) if array.size else Image.new(self.mode, self.size)
            self._decoded.setdefault("core", image.im)  # threads that came at once all get the first one's
            self._array = None
        return self._decoded.get("core")

    @_im.setter
    def _im(self, core: Any) -> None:
        if core is not None:  # Pillow's own constructor sets None
            self._decoded["core"] = core
            self._array = None

    if not hasattr(Image.Image, "im"):
        im = _im

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """For numpy: the array itself, read-only as any image's."""
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
        """As `PIL.Image.Image.tobytes`."""
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

    __hash__ = None  # type: ignore[assignment]  # as any image's

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """An ordinary image's pickle, which needs no more than Pillow to load."""
        return Image.Image, (), [self.info, self.mode, self.size, None, self.tobytes()]
