"""Timesteps per token in Wan 2.2 TI2V: two distinct ones in image-to-video, one in text-to-video.

Stock embeds one timestep for each token, and each block adds its table to a row per token. Here the pipeline, which
knows where the first frame ends, passes only the distinct timesteps to the model. CLOSE: elementwise operations keep
their bits, but a matmul of two rows may round differently from one of all rows.
"""

from __future__ import annotations

from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.fingerprints import IMAGE_TO_VIDEO, relied_on
from wan_patches.patching.registry import Known, Patch, Target
from wan_patches.patching.rewrite import Replace

_FLATTEN, EMBED = "_wan_patches_flattened_timesteps", "_wan_patches_embed_timesteps"
_OF_OUTPUT = "_wan_patches_output_modulations"
_OF_IMAGE, _OF_TEXT = "_wan_patches_image_timesteps", "_wan_patches_text_timesteps"
_STOCK = "temp_ts.unsqueeze(0).expand(latents.shape[0], -1)"
_ONES = "torch.ones(latents.shape, dtype=torch.float32, device=device)"


def _patch(module: str, target: Target, requires: tuple[Known, ...] = ()) -> Patch:
    names = (_FLATTEN, EMBED, _OF_OUTPUT, _OF_IMAGE, _OF_TEXT)
    return Patch(
        name="timesteps",
        module=f"diffusers.{module}",
        targets=(target,),
        calls={name: f"wan_patches.bindings.timesteps:{name.removeprefix('_wan_patches_')}" for name in names},
        fidelity=Fidelity.CLOSE,
        implementations={"all devices": "two timesteps embedded instead of one for each token"},
        requires=requires,
    )


# the construction of the first frame's mask in `prepare_latents`, from diffusers 0.35 to 0.42
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
                    f"{EMBED}(self.condition_embedder, timestep, TEXT, IMAGE, ts_seq_len)",
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
                Replace(_ONES, _ONES),  # the mask multiplied with the timestep
                Replace(_STOCK, f"{_OF_TEXT}(self, current_model, temp_ts, latents)"),
            ),
        ),
    ),
)
