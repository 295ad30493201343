"""Condition mask and condition video of image-to-video pipelines, and the tokens of several prompts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wan_patches.bindings.forwards import runs_only_library_code
from wan_patches.bindings.step_loop import is_accelerator, noted
from wan_patches.bindings.stock_functions import are_torch_functions, has_library_methods, is_watched
from wan_patches.ops.conditioning import ConditionVideo, valid_first
from wan_patches.ops.conditioning import condition_mask as op
from wan_patches.ops.tracing import is_observed
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


def prompt_tokens(*parts: tuple[torch.Tensor, torch.Tensor], zeroed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the tokens of several prompts, the valid ones first; see `wan_patches.ops.conditioning.valid_first`.

    Args:
        parts: tokens `(batch, seq, dim)` and their masks `(batch, seq)`, bool; samples have the same lengths.
        zeroed: how many of the last parts have zeros for their invalid tokens.
    """
    tokens, masks = zip(*parts)
    kept = len(parts) - zeroed
    cleared = [part.masked_fill(~mask.unsqueeze(2), 0) for part, mask in zip(tokens[kept:], masks[kept:])]
    return valid_first(torch.cat((*tokens[:kept], *cleared), dim=1), torch.cat(masks, dim=1))


def image_tokens(tokens: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplies the tokens by zero, all invalid, if `image` is zero everywhere: the model has no image.

    Args:
        tokens: `(batch, seq, dim)`, embedded from `image`, of any shape.
        mask: of another prompt, for the dtype and device of the mask returned.

    Returns:
        The tokens, and their mask `(batch, seq)`: one for valid tokens, else zero.
    """
    is_absent = torch.all(image == 0)
    if noted("tokens of the image", is_accelerator(tokens.device) and not is_observed(tokens, image, mask)):
        tokens = torch.where(is_absent, tokens * 0.0, tokens)
        return tokens, (~is_absent).to(mask).expand(tokens.shape[:2])
    if is_absent:
        tokens = tokens * 0.0
    return tokens, mask.new_full(tokens.shape[:2], 0 if is_absent else 1)


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
