"""The operations around the causal convolutions of Wan's video autoencoder: frame caches, padding and upsampling.

This module computes no convolutions or norms; it only decides where their inputs lie in memory. A causal convolution
sees the two frames before its own and a border of zeros. Stock concatenates, pads and clones them into new tensors for
each convolution. Here they are assembled once, in memory that all convolutions of a pass share.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

HISTORY = 2  # preceding frames that a causal convolution with three taps in time reads

#: Takes some frames, memory for the result, and for its last frames or None. Returns a new tensor of their dtype, or
#: that memory after writing both.
Activation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

_IN_CACHE = 1 << 20  # bytes of activations that fit a processor's cache together with a few intermediate results


class FrameCaches(list):
    """The frames that each causal convolution has to remember, in the order in which the convolutions run.

    Replaces stock's list for one pass over a video, with the same entries: None, a marker string before the first
    temporal upsampling, or the last frames of a convolution's input, `(batch, channels, 1 or 2, height, width)`. An
    entry is a value: its memory is overwritten only if nothing else holds it.
    """

    def __init__(self, convolutions: int) -> None:
        super().__init__([None] * convolutions)
        self.divided = False  # whether convolutions may process some of their rows at a time
        self.continues = False  # whether they continue with frames whose first ones they have processed
        self.ends = False  # whether no frames follow in this pass, so that none have to be remembered
        self.declined = False  # whether the pass falls back to stock, which uses this as its own list
        self._memory: torch.Tensor | None = None
        self._channels_last = [False] * convolutions  # of each convolution's last window

    def __reduce__(self) -> Any:
        return list, (list(self),)  # an autoencoder can be loaded without this package

    @property
    def forgets(self) -> bool:
        """Whether convolutions need to remember nothing, because no step of this chunk and no chunk follows."""
        return self.ends and not self.divided

    def divide(self) -> None:
        """From now on, convolutions process some of their rows at a time; frees the memory for whole frames."""
        self.divided = True
        self._memory = None

    def unite(self) -> None:
        """Ends `divide`."""
        self.divided = self.continues = False

    def shared(self, shape: Sequence[int], like: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
        """Returns shared contiguous memory of this shape, valid until the next call.

        It has the dtype and device of `like`.
        """
        size = math.prod(shape)
        memory = self._memory
        if memory is None or memory.numel() < size or not _takes(memory, like):
            self._memory = memory = None  # frees the old memory before allocating
            self._memory = memory = torch.empty(size, dtype=like.dtype, device=like.device)
        if not channels_last:
            return memory[:size].view(tuple(shape))
        batch, channels, *space = shape
        return memory[:size].view(batch, *space, channels).movedim(-1, 1)

    def _renewed(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the frames that convolution number `index` remembers, and memory for those it remembers after `x`."""
        is_first, is_free = self[index] is None, isinstance(self[index], torch.Tensor) and not _is_held(self, index)
        before = self[index] if isinstance(self[index], torch.Tensor) else None
        if self.forgets:
            return before, None
        batch, channels, frames, height, width = x.shape
        shape = (batch, channels, 1 if is_first and frames == 1 else HISTORY, height, width)
        last = is_channels_last(x) and (frames >= HISTORY or before is None or is_channels_last(before))
        if before is not None and is_free and _takes(before, x) and _is_like(before, shape, last):
            return before, before
        return before, _empty(shape, x, last)

    def _window_format(self, index: int, x: torch.Tensor, before: torch.Tensor | None) -> bool:
        """Whether the tensor that stock concatenates and pads is channels-last, which requires all its parts to be.

        The first frames of a divided input decide for all of it.
        """
        if not self.continues:
            self._channels_last[index] = is_channels_last(x) and (before is None or is_channels_last(before))
        return self._channels_last[index]

    def convolve(
        self,
        index: int,
        x: torch.Tensor,
        convolution: Callable[[torch.Tensor], torch.Tensor],
        padding: tuple[int, int],
        *,
        history: int = HISTORY,
        activation: Activation | None = None,
        add: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Causal convolution number `index` over `x` and the frames before it, of which it remembers the last two.

        Args:
            x: `(batch, channels, frames, height, width)`, any strides.
            convolution: maps `(batch, channels, history + frames, rows + 2 * padding[0], width + 2 * padding[1])`, in
                reused memory, to `(batch, channels', frames, rows, width)`, a new tensor. With a history and for all
                rows, this input is bit for bit the tensor that stock concatenates and pads, in the same memory format.
            padding: zeros above and below, left and right.
            history: 0 for a first frame whose convolution needs no frames of zeros before it.
            activation: applied to `x` first; computes each position from its own channels only.
            add: added to the result.
            overwrite: whether the result may overwrite `x`.
        """
        batch, channels, frames, height, width = x.shape
        above, left = padding
        before, after = self._renewed(index, x)
        channels_last = self._window_format(index, x, before)
        edges = bands(height, least_rows(batch * channels * (history + frames)) if self.divided and above else height)
        carried = out = None
        loaded = 0
        for top, bottom in itertools.pairwise(edges):
            shape = (batch, channels, history + frames, bottom - top + 2 * above, width + 2 * left)
            window = self.shared(shape, x, channels_last)
            _zero_border(window, above * (top == 0), above * (bottom == height), left)
            if carried is not None:
                window[..., : 2 * above, :] = carried
            until = min(bottom + above, height)
            rows = slice(loaded, until)
            inner = window[..., loaded - top + above : until - top + above, left : left + width]
            _fill(
                inner,
                x[..., rows, :],
                None if before is None else before[..., rows, :],
                None if after is None else after[..., rows, :],
                activation,
            )
            loaded = until
            if bottom < height:
                carried = window[..., window.shape[3] - 2 * above :, :].clone()
            y = convolution(window)
            if add is not None:
                y += add[..., top:bottom, :]
            if len(edges) == 2:
                out = y
                break
            if out is None:
                last = is_channels_last(y)
                fits = overwrite and y.shape[1] == channels and is_channels_last(x) == last
                out = x if fits else _empty((*y.shape[:3], height, y.shape[4]), y, last)
            out[..., top:bottom, :] = y
        assert out is not None
        self[index] = after
        return out


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether ATen treats a tensor of four or five axes as channels-last, and keeps that format in its results."""
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1)):
        if x.stride(axis) < least or x.shape[axis] == 0:
            return False
        least = x.stride(axis) * x.shape[axis]
    return least != x.stride(1) and x.stride(0) >= least


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _empty(shape: Sequence[int], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    memory_format = _format(channels_last)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _is_like(before: torch.Tensor, shape: tuple[int, ...], channels_last: bool) -> bool:
    is_whole = before.is_contiguous(memory_format=_format(channels_last))
    return before.shape == shape and is_whole and is_channels_last(before) == channels_last


def _takes(memory: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a tensor like `x` can be written to `memory` now."""
    is_open = torch.is_inference_mode_enabled() or not memory.is_inference()
    return is_open and (memory.dtype, memory.device) == (x.dtype, x.device)


def _holders(items: list[Any], index: int) -> tuple[int, ...]:
    """Returns the reference counts of a tensor of a list, of its views and of its memory."""
    storage = items[index].untyped_storage()
    return (
        sys.getrefcount(items[index]),
        items[index]._use_count(),  # DLPack
        torch._C._storage_Use_Count(storage._cdata),  # views, numpy's too
        sys.getrefcount(storage),
    )


@functools.lru_cache(maxsize=1)
def _counts_if_unshared() -> tuple[int, ...]:
    """Returns `_holders` of a tensor held only by its list; interpreters count their own references differently."""
    return _holders([torch.empty(1)], 0)


def _is_held(items: list[Any], index: int) -> bool:
    """Whether anything else holds a tensor of a list, or its memory, and would see writes to it."""
    try:
        return _holders(items, index) != _counts_if_unshared()
    except AttributeError:  # a torch version without these counts
        return True


def least_rows(elements: int) -> int:
    """Returns the number of rows from which ATen chooses oneDNN for a float convolution, as it does for whole frames.

    elements: batch x channels x frames of its input.
    """
    return _LARGE // max(1, elements) + 1


_LARGE = 20480  # batch x channels x frames x rows above which it does so


def bands(height: int, least: int) -> list[int]:
    """Returns the borders of bands of `least` rows or slightly more, from 0 to `height`."""
    count = max(1, height // max(1, least))
    return [height * i // count for i in range(count + 1)]


def _fill(
    inner: torch.Tensor,
    x: torch.Tensor,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
    activation: Activation | None,
) -> None:
    """Writes the remembered frames and those of `x` to `inner`, and the last of them to `after`.

    before: one frame or two, or None. `after` may be the same memory; it gets all frames, or only those of `x`.
    """
    frames = x.shape[2]
    remembered = 0 if after is None else after.shape[2]
    history = inner.shape[2] - frames
    given = 0 if before is None else before.shape[2]
    inner[:, :, : history - given] = 0
    if before is not None:
        inner[:, :, history - given : history] = before
    if after is not None and frames < remembered:
        after[:, :, 0] = inner[:, :, 1]
    for frame, rows in _pieces(x) if activation else [(slice(0, frames), slice(None))]:
        piece = x[:, :, frame, rows]
        place = inner[:, :, history + frame.start : history + frame.stop, rows]
        kept = max(frame.start, frames - remembered)
        slot = remembered - frames
        last = None
        if after is not None and kept < frame.stop:
            last = after[:, :, slot + kept : slot + frame.stop, rows]
        if activation is not None:
            piece = activation(piece, place, last)
        if piece is place:
            continue
        place.copy_(piece)
        if last is not None:
            last.copy_(piece[:, :, kept - frame.start :])


def _pieces(x: torch.Tensor) -> list[tuple[slice, slice]]:
    """Returns the frames and rows to process at a time: on CPUs as many as fit the cache, elsewhere all."""
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
    return (_upsample_by_rows if x.is_cpu else _upsample_at_once)(x, out)


def _upsample_at_once(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Reads a pixel where it is written."""
    pixels = out.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    pixels.copy_(x[..., :, None, :, None].expand_as(pixels))
    return out


def _upsample_by_rows(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copies long rows: several times faster on a CPU."""
    upper = out[..., 0::2, :]
    upper[..., 0::2] = x
    upper[..., 1::2] = x
    out[..., 1::2, :] = upper
    return out


def upsampled_bands(x: torch.Tensor, rows: int, caches: FrameCaches) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields `upsample(x)` in bands, each with the row above and below it, which are zero outside of the frame.

    Args:
        x: `(images, channels, height, width)`, any strides.
        rows: rows of `x` per band.
        caches: provides the shared memory of a band, valid until the next one.

    Yields:
        The slice of rows of the upsampled images, and `(images, channels, that many + 2, 2 * width)`.
    """
    images, channels, height, width = x.shape
    for top, bottom in itertools.pairwise(bands(height, rows)):
        band = caches.shared((images, channels, 2 * (bottom - top) + 2, 2 * width), x, is_channels_last(x))
        upsample(x[..., top:bottom, :], band[..., 1:-1, :])
        for row, neighbour in ((0, top - 1), (-1, bottom)):
            if 0 <= neighbour < height:
                band[..., row, 0::2] = band[..., row, 1::2] = x[..., neighbour, :]
            else:
                band[..., row, :] = 0
        yield slice(2 * top, 2 * bottom), band


def interleave(x: torch.Tensor) -> torch.Tensor:
    """Doubles frames by halving channels: a view of `(b, 2c, t, h, w)` as `(b, t, 2, c, h, w)`."""
    return x.unflatten(1, (2, -1)).permute(0, 3, 1, 2, 4, 5)


def in_steps(
    layers: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, frames: int, rewind: Callable[[], None]
) -> torch.Tensor:
    """Returns `layers(x)`, computed for `frames` frames at a time: causal layers with caches need no more at once.

    Args:
        layers: keeps the number of frames; returns a new tensor.
        x: `(batch, channels, frames, height, width)`.
        frames: frames per step.
        rewind: called before every step except the first.
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
            out = _empty((*y.shape[:2], total, *y.shape[3:]), y, is_channels_last(y))
        out[:, :, start : start + frames] = y
    assert out is not None
    return out
