"""What surrounds the causal convolutions of Wan's video autoencoder: their frame caches, padding and upsampling.

Nothing here computes what a convolution or a norm computes; it decides where their inputs lie. A causal
convolution sees the two frames before its own and a border of zeros. Stock joins, pads and clones them into new
tensors for each; here they are put together once, in memory that all convolutions of a pass share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

HISTORY = 2  # frames that a causal convolution with three taps in time looks back
_IN_CACHE = 1 << 20  # bytes of activations that a processor's cache holds beside a few intermediate results of them


class FrameCaches(list):
    """The frames that each causal convolution has to remember, in the order in which the convolutions run.

    Takes the place of stock's list for one pass over a video. An entry is None until its convolution has run,
    and `(batch, channels, 2, height, width)` from then on; frames before the first are zero. Stock code, where patches
    come or go during the pass, reads those frames as its own; what it leaves is understood here.
    """

    def __init__(self, convolutions: int) -> None:
        super().__init__([None] * convolutions)
        self.divided = False  # whether convolutions may see a part of their rows at a time
        self.declined = False  # whether the pass is stock's, which takes this for its own list
        self._memory: torch.Tensor | None = None

    def __reduce__(self) -> Any:
        return list, (list(self),)  # whoever loads an autoencoder need not have this package

    def divide(self) -> None:
        """From now on convolutions see a part of their rows at a time; memory for whole frames is given back."""
        self.divided = True
        self._memory = None

    def shared(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Contiguous memory of this shape, with the dtype and device of `like`: valid until the next call."""
        size = math.prod(shape)
        memory = self._memory
        if memory is None or memory.numel() < size or memory.dtype != like.dtype or memory.device != like.device:
            self._memory = memory = None  # the old goes before the new comes
            self._memory = memory = torch.empty(size, dtype=like.dtype, device=like.device)
        return memory[:size].view(tuple(shape))

    def history(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The two frames that convolution number `index` of `x` remembers, `(batch, channels, 2, height, width)`."""
        entry = self[index]
        if not isinstance(entry, torch.Tensor) or entry.shape[2] != HISTORY:
            batch, channels, _, height, width = x.shape
            self[index] = x.new_zeros((batch, channels, HISTORY, height, width))
            if isinstance(entry, torch.Tensor):  # stock's, of a single frame; or a word for none
                self[index][:, :, -entry.shape[2] :] = entry
        return self[index]

    def convolve(
        self,
        index: int,
        x: torch.Tensor,
        convolution: Callable[[torch.Tensor], torch.Tensor],
        padding: tuple[int, int],
        *,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        add: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Causal convolution number `index` over `x` and the frames before it, of which it remembers the last two.

        Args:
            x: `(batch, channels, frames, height, width)`, any strides.
            convolution: takes `(batch, channels, 2 + frames, rows + 2 * padding[0], width + 2 * padding[1])`,
                contiguous, in memory that is used again, to `(batch, channels', frames, rows, width)`, a new tensor.
                Of all rows, this input is bit for bit what stock joins and pads.
            padding: zeros above and below, left and right.
            activation: applied to `x` first; gives each position from its own channels alone, in a new tensor of
                the dtype of `x`.
            add: added to the result.
            overwrite: `x` is not needed any more; the result may take its place.
        """
        batch, channels, frames, height, width = x.shape
        above, left = padding
        before = self.history(index, x)
        edges = bands(height, least_rows(batch * channels * (HISTORY + frames)) if self.divided and above else height)
        carried = out = None
        loaded = 0
        for top, bottom in itertools.pairwise(edges):
            window = self.shared((batch, channels, HISTORY + frames, bottom - top + 2 * above, width + 2 * left), x)
            _zero_border(window, above * (top == 0), above * (bottom == height), left)
            if carried is not None:
                window[..., : 2 * above, :] = carried
            until = min(bottom + above, height)
            rows = slice(loaded, until)
            inner = window[..., loaded - top + above : until - top + above, left : left + width]
            _fill(inner, x[..., rows, :], before[..., rows, :], activation)
            loaded = until
            if bottom < height:
                carried = window[..., window.shape[3] - 2 * above :, :].clone()
            y = convolution(window)
            if add is not None:
                y += add[..., top:bottom, :]
            if len(edges) == 2:
                return y
            if out is None:
                fits = overwrite and y.shape[1] == channels
                out = x if fits else y.new_empty((*y.shape[:3], height, y.shape[4]))
            out[..., top:bottom, :] = y
        assert out is not None
        return out


def least_rows(elements: int) -> int:
    """Rows that give ATen as good a reason as whole frames do to choose oneDNN for a float convolution.

    elements: batch x channels x frames of its input.
    """
    return _LARGE // max(1, elements) + 1


_LARGE = 20480  # batch x channels x frames x rows above which it does


def bands(height: int, least: int) -> list[int]:
    """Borders of bands of `least` rows or somewhat more, from 0 to `height`."""
    count = max(1, height // max(1, least))
    return [height * i // count for i in range(count + 1)]


def _fill(
    inner: torch.Tensor,
    x: torch.Tensor,
    before: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    """Writes two remembered frames and those of `x` to `inner`, and the last two of them to `before`."""
    frames = x.shape[2]
    inner[:, :, :HISTORY] = before
    if frames == 1:
        before[:, :, 0] = inner[:, :, 1]
    for frame, rows in _pieces(x) if activation else [(slice(0, frames), slice(None))]:
        piece = x[:, :, frame, rows]
        if activation is not None:
            piece = activation(piece)
        inner[:, :, HISTORY + frame.start : HISTORY + frame.stop, rows] = piece
        kept = max(frame.start, frames - HISTORY)
        if kept < frame.stop:
            slot = HISTORY - frames
            before[:, :, slot + kept : slot + frame.stop, rows] = piece[:, :, kept - frame.start :]


def _pieces(x: torch.Tensor) -> list[tuple[slice, slice]]:
    """Frames and rows to take at a time: on CPUs as many as stay in cache, elsewhere all."""
    batch, channels, frames, height, width = x.shape
    rows = height * frames
    if x.is_cpu:
        rows = max(1, _IN_CACHE // max(1, batch * channels * width * x.element_size()))
    if rows >= height * frames:
        return [(slice(0, frames), slice(0, height))]
    return [
        (slice(frame, frame + 1), slice(start, min(start + rows, height)))
        for frame in range(frames)
        for start in range(0, height, rows)
    ]


def _zero_border(window: torch.Tensor, above: int, below: int, left: int) -> None:
    if above:
        window[..., :above, :] = 0
    if below:
        window[..., -below:, :] = 0
    if left:
        window[..., :left] = 0
        window[..., -left:] = 0


def upsample(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Repeats every pixel twice in height and width: nearest neighbours, in the dtype of `x`.

    Args:
        x: `(..., height, width)`, any strides.
        out: `(..., 2 * height, 2 * width)`.

    Returns:
        `out`. EXACT: only copies.
    """
    upper = out[..., 0::2, :]
    upper[..., 0::2] = x
    upper[..., 1::2] = x
    out[..., 1::2, :] = upper
    return out


def upsampled_bands(x: torch.Tensor, rows: int, caches: FrameCaches) -> Iterator[tuple[slice, torch.Tensor]]:
    """`upsample(x)` in bands, each with the row above and the one below it, which are zero outside of the frame.

    Args:
        x: `(images, channels, height, width)`, any strides.
        rows: of `x` that make a band.
        caches: whose shared memory holds a band, until the next.

    Yields:
        Which rows of the upsampled images these are, and `(images, channels, that many + 2, 2 * width)`.
    """
    images, channels, height, width = x.shape
    for top, bottom in itertools.pairwise(bands(height, rows)):
        band = caches.shared((images, channels, 2 * (bottom - top) + 2, 2 * width), x)
        upsample(x[..., top:bottom, :], band[..., 1:-1, :])
        for row, neighbour in ((0, top - 1), (-1, bottom)):
            if 0 <= neighbour < height:
                band[..., row, 0::2] = band[..., row, 1::2] = x[..., neighbour, :]
            else:
                band[..., row, :] = 0
        yield slice(2 * top, 2 * bottom), band


def interleave(x: torch.Tensor) -> torch.Tensor:
    """Twice as many frames from twice as many channels: `(b, 2c, t, h, w)` seen as `(b, t, 2, c, h, w)`."""
    return x.unflatten(1, (2, -1)).permute(0, 3, 1, 2, 4, 5)


def in_steps(
    layers: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, frames: int, rewind: Callable[[], None]
) -> torch.Tensor:
    """`layers(x)`, so many frames at a time: causal layers with caches need no more at once.

    Args:
        layers: keeps the number of frames; gives a new tensor.
        x: `(batch, channels, frames, height, width)`.
        frames: of a step.
        rewind: called before every step but the first.
    """
    total = x.shape[2]
    if total <= frames:
        return layers(x)
    out: torch.Tensor | None = None
    for start in range(0, total, frames):
        if start:
            rewind()
        y = layers(x[:, :, start : start + frames])
        if out is None:
            out = y.new_empty((*y.shape[:2], total, *y.shape[3:]))
        out[:, :, start : start + frames] = y
    assert out is not None
    return out
