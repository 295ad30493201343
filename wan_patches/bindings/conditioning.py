"""Condition mask and condition video of image-to-video pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wan_patches.bindings.forwards import runs_only_library_code
from wan_patches.bindings.stock_functions import are_torch_functions, has_library_methods, is_watched
from wan_patches.ops.conditioning import ConditionVideo
from wan_patches.ops.conditioning import condition_mask as op
from wan_patches.patching import tally


def condition_mask(
    batch: int, frames: int, height: int, width: int, temporal: int, device: torch.device | str, last_frame: bool
) -> torch.Tensor:
    """Builds the condition mask; see `wan_patches.ops.conditioning`."""
    args = (batch, frames, height, width, temporal, torch.device(device), last_frame)
    if not are_torch_functions(torch.repeat_interleave, torch.concat):
        return op.stock("torch's functions are not its own", *args)
    return op(*args)


def condition_video(
    vae: Any, first: torch.Tensor, last: torch.Tensor | None, *zeros: int
) -> torch.Tensor | ConditionVideo:
    """Joins the condition frames with zeros of shape `zeros`, as a `ConditionVideo` if `vae` can read it in slices.

    That requires an `AutoencoderKLWan` in which no foreign code runs between `encode` and the encoder's last layer. Any
    other VAE gets the tensor.
    """
    if (reason := _reason_against(vae, first, last, *zeros)) is not None:
        tally.note("condition video", "", reason)
        return torch.cat([first, first.new_zeros(*zeros), *([] if last is None else [last])], dim=2)
    tally.note("condition video", "never built")
    return ConditionVideo(first, zeros[2], last)


def _reason_against(vae: Any, first: torch.Tensor, last: torch.Tensor | None, *zeros: int) -> str | None:
    """Why the condition video has to be built as in stock, or None."""
    kind: type = type(vae)
    if kind is not AutoencoderKLWan:
        return "the VAE is not AutoencoderKLWan"
    given = [frame for frame in (first, last) if frame is not None]
    if any(type(frame) is not torch.Tensor or frame.requires_grad for frame in given):
        return "the frames are not plain tensors"
    if is_watched() or not are_torch_functions(torch.cat):
        return "something looks into the operations"
    if not has_library_methods(vae, "encode", "_encode", "tiled_encode") or not runs_only_library_code(vae.encoder):
        return "somebody looks on between encode and the encoder's layers"
    batch, channels, frames, height, width = zeros
    shape = (batch, channels, 1, height, width)
    if frames < 0 or any(frame.shape != shape for frame in given):
        return "the frames do not fit one another"
    return None if vae.config.patch_size is None else "the VAE takes patches"
