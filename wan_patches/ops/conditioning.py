"""The image-to-video condition mask: which frames of the latent video are given by an image."""

from __future__ import annotations

import torch

from wan_patches.fidelity import gate


def condition_mask(
    batch: int,
    frames: int,
    height: int,
    width: int,
    temporal: int,
    device: torch.device,
    last_frame: bool = False,
) -> torch.Tensor:
    """The mask that Wan's image-to-video models get beside the condition latents.

    Latent frame 0 stands for pixel frame 0, each later one for `temporal` pixel frames; a channel of the
    mask is one for a pixel frame that an image gives, zero otherwise. Built in latent frames on `device`:
    no pixel-frame tensor, no list indexing, no upload.

    Args:
        batch, height, width: of the latents.
        frames: pixel frames; `(frames - 1) % temporal` must be 0.
        temporal: pixel frames per latent frame.
        last_frame: whether the last pixel frame is given as well.

    Returns:
        `(batch, temporal, latent_frames, height, width)` of torch's default dtype, which keeps the
        concatenation with half-precision latents in fp32, as in stock; an expanded view. EXACT.

    Raises:
        RuntimeError: where `frames` does not fit `temporal`, or there is nothing to mask, as in stock.
    """
    args = (batch, frames, height, width, temporal, device, last_frame)
    if (frames - 1) % temporal != 0 or min(batch, height, width) < 1:
        return reference(*args)
    if torch.device(device).type == "cpu":
        return in_latent_frames(*args)
    return gate("condition mask", (*args, torch.get_default_dtype()), in_latent_frames, reference, *args)


def reference(
    batch: int, frames: int, height: int, width: int, temporal: int, device: torch.device, last_frame: bool
) -> torch.Tensor:
    """The plain formulation: a mask of pixel frames, its first frame repeated, folded into latent frames."""
    given = torch.zeros(batch, 1, frames, height, width)
    given[:, :, 0] = 1
    if last_frame:
        given[:, :, -1] = 1
    padded = torch.cat([given[:, :, :1].repeat_interleave(temporal, dim=2), given[:, :, 1:]], dim=2)
    return padded.view(batch, -1, temporal, height, width).transpose(1, 2).to(device)


def in_latent_frames(
    batch: int, frames: int, height: int, width: int, temporal: int, device: torch.device, last_frame: bool
) -> torch.Tensor:
    """The same values, built where and in the size in which they are needed."""
    mask = torch.zeros((1, temporal, (frames - 1) // temporal + 1, 1, 1), device=device)
    mask[:, :, 0] = 1
    if last_frame:
        mask[:, -1, -1] = 1
    return mask.expand(batch, -1, -1, height, width)
