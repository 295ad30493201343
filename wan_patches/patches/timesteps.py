"""Wan 2.2 TI2V gives each token a timestep, of which there are two in image-to-video and one in text-to-video.

Stock embeds them all, and each block adds its table to a row for every token. Here the pipeline, which knows where the
first frame ends, hands the model what it knows. CLOSE: what is elementwise keeps its bits, but a matmul of two rows may
round otherwise than one of all.
"""

from __future__ import annotations

from typing import Any

from wan_patches.bindings.forwards import hands_on, runs
from wan_patches.bindings.originals import has_librarys
from wan_patches.patches.modulation import reason_against_two_kinds
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.fingerprints import IMAGE_TO_VIDEO, relied_on
from wan_patches.patching.registry import Known, Patch, Target
from wan_patches.patching.rewrite import Replace

_FLATTEN, _EMBED = "_wan_patches_flattened_timesteps", "_wan_patches_embed_timesteps"
_OF_OUTPUT = "_wan_patches_output_modulations"
_OF_IMAGE, _OF_TEXT = "_wan_patches_image_timesteps", "_wan_patches_text_timesteps"
_STOCK = "temp_ts.unsqueeze(0).expand(latents.shape[0], -1)"
_ONES = "torch.ones(latents.shape, dtype=torch.float32, device=device)"


def _patch(module: str, target: Target, requires: tuple[Known, ...] = ()) -> Patch:
    names = (_FLATTEN, _EMBED, _OF_OUTPUT, _OF_IMAGE, _OF_TEXT)
    return Patch(
        name="timesteps",
        module=f"diffusers.{module}",
        targets=(target,),
        calls={name: f"{__name__}:{name.removeprefix('_wan_patches_')}" for name in names},
        fidelity=Fidelity.CLOSE,
        implementations={"all devices": "two timesteps embedded instead of one for each token"},
        requires=requires,
    )


# how `prepare_latents` makes the mask of the first frame, from diffusers 0.35 to 0.42
_MASK = relied_on(IMAGE_TO_VIDEO, "WanImageToVideoPipeline.prepare_latents")

PATCHES = (
    _patch(
        "models.transformers.transformer_wan",
        Target(
            "WanTransformer3DModel.forward",
            (
                Replace("timestep.flatten()", f"{_FLATTEN}(timestep)"),
                Replace(
                    "self.condition_embedder(timestep, TEXT, IMAGE, timestep_seq_len=ts_seq_len)",
                    f"{_EMBED}(self.condition_embedder, timestep, TEXT, IMAGE, ts_seq_len)",
                ),
                Replace(
                    "(self.scale_shift_table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).chunk(2, dim=2)",
                    f"{_OF_OUTPUT}(self.scale_shift_table, temb)",
                ),
                Replace("MODULATION.squeeze(2)", "MODULATION", 2),
            ),
        ),
    ),
    _patch(
        "pipelines.wan.pipeline_wan_i2v",
        Target(
            "WanImageToVideoPipeline.__call__",
            (Replace(_STOCK, f"{_OF_IMAGE}(self, current_model, temp_ts, latents)"),),
        ),
        requires=_MASK,
    ),
    _patch(
        "pipelines.wan.pipeline_wan",
        Target(
            "WanPipeline.__call__",
            (
                Replace(_ONES, _ONES),  # the mask that is multiplied with the timestep
                Replace(_STOCK, f"{_OF_TEXT}(self, current_model, temp_ts, latents)"),
            ),
        ),
    ),
)


def image_timesteps(pipe: Any, model: Any, of_tokens: Any, latents: Any) -> Any:
    """What the model gets where the tokens of the first latent frame have timestep 0, and the others another.

    of_tokens: `(seq,)`; latents: `(batch, channels, latent frames, height, width)`.
    """
    import torch

    from wan_patches.ops.modulation import TwoTimesteps

    if (reason := _reason_against(pipe, model)) is not None:
        tally.note("timesteps of tokens", "", reason)
        return of_tokens.unsqueeze(0).expand(latents.shape[0], -1)
    tally.note("timesteps of tokens", "one for each kind of tokens")
    batch, _, frames, *_ = latents.shape
    seq = of_tokens.shape[0]
    return TwoTimesteps(torch.stack((of_tokens[0], of_tokens[-1])), seq // frames, (batch, seq))


def text_timesteps(pipe: Any, model: Any, of_tokens: Any, latents: Any) -> Any:
    """What the model gets where all tokens have one timestep: one for each sample."""
    if (reason := _reason_against(pipe, model)) is not None:
        tally.note("timesteps of tokens", "", reason)
        return of_tokens.unsqueeze(0).expand(latents.shape[0], -1)
    tally.note("timesteps of tokens", "one for all tokens")
    return of_tokens[-1:].expand(latents.shape[0])


def flattened_timesteps(timestep: Any) -> Any:
    """One timestep after another; `TwoTimesteps` remain what they are."""
    from wan_patches.ops.modulation import TwoTimesteps

    return timestep if isinstance(timestep, TwoTimesteps) else timestep.flatten()


def embed_timesteps(embedder: Any, timestep: Any, text: Any, image: Any, seq: int | None) -> Any:
    """The embeddings of timesteps, text and image; of `TwoTimesteps` those of the timesteps are `TwoRows`."""
    from wan_patches.ops.modulation import TwoRows, TwoTimesteps

    if not isinstance(timestep, TwoTimesteps):
        return embedder(timestep, text, image, timestep_seq_len=seq)
    temb, projected, *others = embedder(timestep.values, text, image)
    return *(TwoRows(rows.unsqueeze(0), timestep.border, timestep.shape[1]) for rows in (temb, projected)), *others


def output_modulations(table: Any, temb: Any) -> Any:
    """Shift and scale of the output norm; `temb` is `(batch, seq, dim)`, or `TwoRows` of it, and so are they."""
    from wan_patches.ops.modulation import TwoRows

    if isinstance(temb, TwoRows):
        return temb._replace(rows=temb.rows.unsqueeze(2)).added_to(table.to(temb.rows.device))
    modulations = (table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).chunk(2, dim=2)
    return tuple(modulation.squeeze(2) for modulation in modulations)


def _reason_against(pipe: Any, model: Any) -> str | None:
    """Why a pipeline gives each token its timestep, as stock does; None where it need not."""
    known = type(pipe).__name__ in ("WanImageToVideoPipeline", "WanPipeline")
    if not known or not type(pipe).__module__.startswith("diffusers.") or not has_librarys(pipe, "prepare_latents"):
        return "the pipeline is another, or makes latents in its own way"
    if type(model).__name__ != "WanTransformer3DModel" or model._compiled_call_impl is not None:
        return "the model is another, or is compiled"
    if getattr(model, "_parallel_config", None) is not None:
        return "devices share the sequence"
    if (reason := reason_against_two_kinds(model, "WanTransformerBlock")) is not None:
        return reason
    if not runs(model, _EMBED) or not hands_on(model.condition_embedder):
        return "the model does not run what is patched here alone, or its embedder what diffusers has"
    return None
