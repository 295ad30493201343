"""Timesteps per token in Wan 2.2 TI2V: passes two distinct timesteps where stock embeds one for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_patches.bindings.forwards import runs, runs_only_library_code
from wan_patches.bindings.modulation import reason_against_segments
from wan_patches.bindings.stock_functions import has_library_methods
from wan_patches.ops.modulation import SegmentedModulation, SegmentedTimesteps
from wan_patches.patches.timesteps import EMBED
from wan_patches.patching import tally


def image_timesteps(
    pipe: Any, model: Any, of_tokens: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor | SegmentedTimesteps:
    """Returns the model's timesteps if the first latent frame's tokens have timestep 0 and all others share another.

    of_tokens: `(seq,)`; latents: `(batch, channels, latent frames, height, width)`.
    """
    if (reason := _reason_against(pipe, model)) is not None:
        tally.note("timesteps of tokens", "", reason)
        return of_tokens.unsqueeze(0).expand(latents.shape[0], -1)
    tally.note("timesteps of tokens", "one for each kind of tokens")
    batch, _, frames, *_ = latents.shape
    seq = of_tokens.shape[0]
    return SegmentedTimesteps(torch.stack((of_tokens[0], of_tokens[-1])), seq // frames, (batch, seq))


def text_timesteps(
    pipe: Any, model: Any, of_tokens: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor | SegmentedTimesteps:
    """Returns the model's timesteps if all tokens share one: one for each sample."""
    if (reason := _reason_against(pipe, model)) is not None:
        tally.note("timesteps of tokens", "", reason)
        return of_tokens.unsqueeze(0).expand(latents.shape[0], -1)
    tally.note("timesteps of tokens", "one for all tokens")
    return of_tokens[-1:].expand(latents.shape[0])


def flattened_timesteps(timestep: torch.Tensor | SegmentedTimesteps) -> torch.Tensor | SegmentedTimesteps:
    """Flattens the timesteps; `SegmentedTimesteps` are returned unchanged."""
    return timestep if isinstance(timestep, SegmentedTimesteps) else timestep.flatten()


def embed_timesteps(
    embedder: nn.Module,
    timestep: torch.Tensor | SegmentedTimesteps,
    text: torch.Tensor,
    image: torch.Tensor | None,
    seq: int | None,
) -> Any:
    """Embeds timesteps, text and image; `SegmentedTimesteps` become `SegmentedModulation`."""
    if not isinstance(timestep, SegmentedTimesteps):
        return embedder(timestep, text, image, timestep_seq_len=seq)
    temb, projected, *others = embedder(timestep.values, text, image)
    return *(
        SegmentedModulation(rows.unsqueeze(0), timestep.split_index, timestep.shape[1]) for rows in (temb, projected)
    ), *others


def output_modulations(
    table: torch.Tensor, temb: torch.Tensor | SegmentedModulation
) -> tuple[torch.Tensor | SegmentedModulation, ...]:
    """Returns shift and scale of the output norm, like `temb`: `(batch, seq, dim)`, or its `SegmentedModulation`."""
    if isinstance(temb, SegmentedModulation):
        return temb._replace(rows=temb.rows.unsqueeze(2)).added_to(table.to(temb.rows.device))
    modulations = (table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).chunk(2, dim=2)
    return tuple(modulation.squeeze(2) for modulation in modulations)


def _reason_against(pipe: Any, model: Any) -> str | None:
    """Why a pipeline has to pass one timestep for each token as in stock, or None."""
    known = type(pipe).__name__ in ("WanImageToVideoPipeline", "WanPipeline")
    if (
        not known
        or not type(pipe).__module__.startswith("diffusers.")
        or not has_library_methods(pipe, "prepare_latents")
    ):
        return "the pipeline is another, or makes latents in its own way"
    if type(model).__name__ != "WanTransformer3DModel" or model._compiled_call_impl is not None:
        return "the model is another, or is compiled"
    if getattr(model, "_parallel_config", None) is not None:
        return "devices share the sequence"
    if (reason := reason_against_segments(model, "WanTransformerBlock")) is not None:
        return reason
    if not runs(model, EMBED) or not runs_only_library_code(model.condition_embedder):
        return "the model does not run what is patched here alone, or its embedder what diffusers has"
    return None
