"""Conditions of a denoiser: the image-to-video mask and video, and the tokens of several prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wan_patches.ops.dispatch import ACCELERATOR, Key, op


def _key(*args: Any) -> Key | None:
    return (*args, torch.get_default_dtype())


@op("condition mask", key=_key, autocasts=False)
def condition_mask(
    batch: int,
    frames: int,
    height: int,
    width: int,
    temporal: int,
    device: torch.device,
    last_frame: bool = False,
) -> torch.Tensor:
    """Builds the mask that Wan's image-to-video models receive along with the condition latents.

    Latent frame 0 represents pixel frame 0, each later one `temporal` pixel frames. A channel of the mask is one for a
    pixel frame provided by an image, zero otherwise.

    Args:
        batch, height, width: of the latents.
        frames: pixel frames; `(frames - 1) % temporal` must be 0.
        temporal: pixel frames per latent frame.
        last_frame: whether the last pixel frame is provided as well.

    Returns:
        `(batch, temporal, latent_frames, height, width)` of torch's default dtype, which keeps the concatenation with
        half-precision latents in fp32, as in stock; an expanded view.

    Raises:
        RuntimeError: `frames` does not fit `temporal`, or there is nothing to mask, as in stock.
    """
    given = torch.ones(batch, 1, frames, height, width)
    given[:, :, 1 : frames - last_frame] = 0
    first = torch.repeat_interleave(given[:, :, :1], dim=2, repeats=temporal)
    padded = torch.concat([first, given[:, :, 1:]], dim=2)
    return padded.view(batch, -1, temporal, height, width).transpose(1, 2).to(device)


@condition_mask.form("built in latent frames")
def in_latent_frames(
    batch: int, frames: int, height: int, width: int, temporal: int, device: torch.device, last_frame: bool = False
) -> torch.Tensor:
    """Builds the same values directly on the device at latent size: no list indexing, no upload."""
    mask = torch.zeros((1, temporal, (frames - 1) // temporal + 1, 1, 1), device=device)
    mask[:, :, 0] = 1
    if last_frame:
        mask[:, -1, -1] = 1
    return mask.expand(batch, -1, -1, height, width)


@in_latent_frames.refuses
def _(
    batch: int, frames: int, height: int, width: int, temporal: int, device: torch.device, last_frame: bool = False
) -> str | None:
    if (frames - 1) % temporal != 0 or min(batch, frames, height, width) < 1:
        return "there is nothing to mask, or the frames do not fit"
    return None


@op("order of prompt tokens")
def valid_first(tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the valid tokens of each sample to the front. Valid and invalid tokens each keep their order.

    Args:
        tokens: `(batch, seq, dim)`, any dtype.
        valid: `(batch, seq)`, bool.

    Returns:
        New tensors of these shapes: the tokens, and which are valid.
    """
    ordered = [torch.cat((row[is_valid], row[~is_valid])) for row, is_valid in zip(tokens, valid)]
    masks = [torch.cat((is_valid[is_valid], is_valid[~is_valid])) for is_valid in valid]
    return torch.stack(ordered), torch.stack(masks)


# on CPUs it takes two to four times as long as stock's operations
@valid_first.form("sorted, without a wait for the number of valid tokens", device=ACCELERATOR)
def sorted_by_validity(tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return tokens.gather(1, order.unsqueeze(2).expand_as(tokens)), valid.gather(1, order)


@sorted_by_validity.refuses
def _(tokens: torch.Tensor, valid: torch.Tensor) -> str | None:
    if tokens.dim() != 3 or valid.dtype != torch.bool or valid.shape != tokens.shape[:2]:
        return "they are not tokens, with one bool for each"
    return None


class ConditionVideo:
    """The pixel video that image-to-video encodes, never built: the first and perhaps last frame, with zeros between.

    Represents `(batch, channels, frames, height, width)` for an autoencoder's encode that takes slices: each slice is a
    tensor with the bits, the dtype and the strides of one that was cut out and made contiguous.
    """

    def __init__(self, first: torch.Tensor, zeros: int, last: torch.Tensor | None = None) -> None:
        """Takes frames of shape `(batch, channels, 1, height, width)` and the number of zero frames between them."""
        self._first, self._zeros, self._last = first, zeros, last

    @property
    def shape(self) -> torch.Size:
        batch, channels, _, height, width = self._first.shape
        return torch.Size((batch, channels, 1 + self._zeros + (self._last is not None), height, width))

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    def to(self, *args: Any, **kwargs: Any) -> ConditionVideo:
        """Converts device or dtype; takes the arguments of `torch.Tensor.to`."""
        return self._map(lambda frame: frame.to(*args, **kwargs))

    def split(self, size: int) -> list[ConditionVideo]:
        """Splits the batch."""
        return [
            self._map(lambda frame, start=start: frame[start : start + size])  # type: ignore[misc]
            for start in range(0, self.shape[0], size)
        ]

    def __getitem__(self, key: tuple[slice, ...]) -> torch.Tensor:
        """Returns the frames `key[2]` as a tensor; the other slices apply to each frame."""
        batch, channels, frames, *area = key
        wanted = range(self.shape[2])[frames]
        index = (batch, channels, slice(None), *area)
        given = {0: self._first[index]}
        if self._last is not None:
            given[self.shape[2] - 1] = self._last[index]
        out = given[0].new_zeros((*given[0].shape[:2], len(wanted), *given[0].shape[3:]))
        for nth, frame in enumerate(wanted):
            if frame in given:
                out[:, :, nth : nth + 1] = given[frame]
        return out

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ConditionVideo:
        last = None if self._last is None else change(self._last)
        return ConditionVideo(change(self._first), self._zeros, last)
