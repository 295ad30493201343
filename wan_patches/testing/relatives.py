"""Builds small models outside of the Wan family that rotate queries and keys like Wan, or decode with its autoencoder.

    from wan_patches.testing.relatives import RELATIVES, available

    relative = RELATIVES["flux"]
    model = relative.build(dtype=torch.bfloat16)
    result = relative.run(model, dtype=torch.bfloat16)

They start from drawn embeddings of the prompt, because text encoders are not patched. Most are whole pipelines; of some
it is the transformer alone, called once. The result is latents, or a picture or a video if the autoencoder is Wan's or
Qwen-Image's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from wan_patches.testing.families import TEXT_DIM, _Make, _seeded, images, is_installed, masks, tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from wan_patches.testing.families import Options

__all__ = ["RELATIVES", "Relative", "available"]

TOKENS = 7  # of a prompt
HEIGHT, WIDTH = 64, 96  # pixels: not square, so that no patch may swap them

#: The values of those of these parameters that a transformer has.
_SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("num_heads", "dit_heads", "text_num_attention_heads", "text_num_key_value_heads"), 2),
    **dict.fromkeys(("num_layers", "num_hidden_layers", "num_visual_blocks", "n_layers", "depth", "dit_depth"), 2),
    **dict.fromkeys(("num_single_layers", "num_refiner_layers", "n_refiner_layers", "num_text_blocks"), 1),
    **dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks", "perceiver_num_layers"), 1),
    **dict.fromkeys(("attention_head_dim", "head_dim"), 64),
    **dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dims", "axes_dim_rope", "rope_dim_list"), (16, 24, 24)),
    **dict.fromkeys(("dim", "hidden_size", "model_dim", "dit_dim", "cross_attention_dim"), 128),
    **dict.fromkeys(("ff_dim", "intermediate_size", "text_intermediate_size", "moe_intermediate_dim"), 64),
    **dict.fromkeys(("text_embed_dim", "text_embed_2_dim", "text_encoder_dim", "text_dim", "dit_text_dim"), TEXT_DIM),
    **dict.fromkeys(("in_text_dim", "in_text_dim2", "text_emb_dim", "text_hidden_dim", "caption_channels"), TEXT_DIM),
    **dict.fromkeys(("joint_attention_dim", "context_in_dim", "cap_feat_dim", "pooled_projection_dim"), TEXT_DIM),
    **dict.fromkeys(("time_embed_dim", "time_dim", "condition_dim"), 32),
}


class _Parts(_Make):
    """Makes the components of these pipelines."""

    def small(self, name: str, **config: Any) -> Any:
        """Builds the named transformer, small but for what `config` says."""
        cls = getattr(diffusers, name)
        known = inspect.signature(cls.__init__).parameters
        config = {**{key: value for key, value in _SMALL.items() if key in known}, **config}
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # what a constructor leaves uninitialized is NaN
        try:
            model = self.build(cls, **config)
        finally:
            torch.use_deterministic_algorithms(before)
        with _seeded(self.seed), torch.no_grad():
            for parameter in model.parameters():
                if parameter.isnan().any():
                    parameter.normal_(std=0.1)
        return model

    def qwen_vae(self, **config: Any) -> Any:
        """Builds Qwen-Image's VAE, with 4 latent channels."""
        config = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4, "dim_mult": [1, 2, 4, 4], **config}
        return self.build(diffusers.AutoencoderKLQwenImage, base_dim=8, num_res_blocks=1, z_dim=4, **config)

    def small_wan_vae(self) -> Any:
        """Builds Wan's VAE in the dtype of the transformer."""
        return self.build(diffusers.AutoencoderKLWan, base_dim=8, num_res_blocks=1)

    def whole(self, name: str, **components: Any) -> Any:
        """Builds the named pipeline of the given components, without the others."""
        cls = getattr(diffusers, name)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
        pipe = cls(**{**absent, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **components})
        pipe.set_progress_bar_config(disable=True)
        return pipe


_Makes: TypeAlias = Callable[[_Parts], Any]


def _pipeline(name: str, **components: _Makes) -> _Makes:
    return lambda make: make.whole(name, **{part: build(make) for part, build in components.items()})


def _small(name: str, **config: Any) -> _Makes:
    return lambda make: make.small(name, **config)


def _whole(name: str, **config: Any) -> _Makes:
    return lambda make: make.build(getattr(diffusers, name), **config)


def _autoencoder(name: str = "AutoencoderKL", **config: Any) -> _Makes:
    """Makes an autoencoder of pictures, for pipelines that need one though they end with latents."""
    usual: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4}
    usual["norm_num_groups"] = 4
    if name == "AutoencoderKL":
        usual["down_block_types"], usual["up_block_types"] = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return lambda make: make.build(getattr(diffusers, name), **{**usual, **config})


def _scheduler(name: str, **config: Any) -> _Makes:
    return lambda make: getattr(diffusers, name)(**config)


def _guider(make: _Parts) -> Any:
    return diffusers.ClassifierFreeGuidance()


def _vae_of_hunyuan_video_15(make: _Parts) -> Any:
    config: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (32,) * 5, "layers_per_block": 1}
    return make.build(diffusers.AutoencoderKLHunyuanVideo15, **config)


class _Unchecked:
    """In place of the safety checker of Cosmos, which only sees prompts and decoded videos."""

    def to(self, device: torch.device) -> None:
        pass

    def check_video_safety(self, video: Any) -> Any:
        return video


def _hidream(make: _Parts) -> Any:
    dit = make.small(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, caption_channels=[TEXT_DIM] * 2,
        llama_layers=[0, 1], axes_dims_rope=(32, 16, 16), max_resolution=(16, 16),
    )  # fmt: skip
    pipe = make.whole("HiDreamImagePipeline", transformer=dit)
    pipe.default_sample_size = 8  # sizes are scaled to the area of its square
    return pipe


class _Normal(tuple[int, ...]):
    """The shape of an argument that is drawn."""

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self, generator=generator).to(dtype)


class _EmptyCache:
    """The keys and values that Wan-Animate 2 takes from a reference, before there are any."""

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Any:
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

        return WanAnimate2KVCache(num_layers=2)


@dataclass(frozen=True)
class Relative:
    """A pipeline, or a transformer alone, and its arguments for a small run."""

    name: str
    since: tuple[int, int]  # the first minor version of diffusers that has it, or the oldest supported one
    make: _Makes
    call: Mapping[str, Any]  # arguments, or None for one not to give
    alone: bool = False  # whether it is a transformer
    slow: bool = False  # whether it only takes large pictures, and seconds for them

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has it."""
        return is_installed(self.since)

    def build(self, **options: Unpack[Options]) -> Any:
        """Returns the pipeline or the transformer."""
        return self.make(_Parts(**options))

    def inputs(self, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> dict[str, Any]:
        """Returns the arguments of one call, drawn from `seed`, for a model of `dtype`."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def drawn(value: Any) -> Any:
            if isinstance(value, list):
                return [drawn(item) for item in value]
            return value.draw(dtype, generator) if isinstance(value, (_Normal, _EmptyCache)) else value

        arguments = {key: drawn(value) for key, value in self.call.items()}
        if not self.alone:
            usual = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
            arguments = {**usual, "generator": generator, **arguments}
        return {key: value for key, value in {**arguments, **more}.items() if value is not None}

    @property
    def decodes(self) -> bool:
        """Whether the result is a picture or a video."""
        return "output_type" in self.call

    def run(self, model: Any, *, dtype: torch.dtype = torch.float32, **more: Any) -> torch.Tensor:
        """Calls what `build` returned, and returns the latents, or the picture or video."""
        with _seeded(0), torch.no_grad():
            result = model(**self.inputs(dtype=dtype, **more), return_dict=False)[0]
        if self.alone and isinstance(result, list):  # a tensor for each sample
            result = torch.stack(result)
        return torch.as_tensor(result)


def _guided(**arguments: Any) -> dict[str, Any]:
    """Returns the arguments for a prompt and the same for a negative one."""
    return {**arguments, **{f"negative_{name}": value for name, value in arguments.items()}}


_PROMPT, _POOLED, _MASK = _Normal((1, TOKENS, TEXT_DIM)), _Normal((1, TEXT_DIM)), torch.ones(1, TOKENS).long()
_TEXT, _TEXT_MASK = {"encoder_hidden_states": _PROMPT}, {"encoder_attention_mask": _MASK}
_TIME, _NOISE_LEVEL = torch.full((1,), 500.0), torch.full((1,), 0.5)
_GUIDED = _guided(prompt_embeds=_PROMPT)
_MASKED = _guided(prompt_embeds=_PROMPT, prompt_embeds_mask=_MASK)
_ATTENDED = _guided(prompt_embeds=_PROMPT, prompt_attention_mask=_MASK)
_BY_BOOL = _guided(prompt_embeds=_PROMPT, prompt_attention_mask=_MASK.bool())
_SECOND = {"prompt_embeds_2": _PROMPT, "prompt_embeds_mask_2": _MASK}
_LISTED = _guided(prompt_embeds=[_Normal((TOKENS, TEXT_DIM))])
_CLIP = {"num_frames": 5}
_HISTORY = {"clean": 1, "history_2x": 2, "history_4x": 4}  # frames of FramePack


def _packed(axes: int) -> dict[str, Any]:
    """Arguments of a transformer of packed latents, whose tokens have positions along `axes`."""
    positions = {"img_ids": torch.arange(24.0)[:, None].repeat(1, axes), "txt_ids": torch.zeros(TOKENS, axes)}
    return {"hidden_states": _Normal((1, 24, 16)), **_TEXT, "timestep": _NOISE_LEVEL, **positions}


_LATENTS = {"in_channels": 4, "out_channels": 4}
_SHORT: dict[str, Any] = {"in_channels": 4, "axes_lens": (64, 64, 64)}
_AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64}
_DECODED = {"output_type": "np"}
_QWEN_IMAGE = _small("QwenImageTransformer2DModel", in_channels=16, out_channels=4)
_COSMOS: dict[str, Any] = {
    "concat_padding_mask": False,
    "adaln_lora_dim": 16,
    "max_size": (8, 16, 16),
    "extra_pos_embed_type": None,
}
_EDIT = {"prompt": '{"edit_instruction": "a red fox"}', "negative_prompt": '{"edit_instruction": ""}'}
_PICTURE, _BOX = images(size=(WIDTH, HEIGHT))[0], masks(size=(WIDTH, HEIGHT))[0]
_LARGER = {"image": images(size=(160, 112))[0]}
_FRAMES = images(count=9, size=(160, 112))
_FOUR: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4}
_COGVIDEOX_VAE = _whole(
    "AutoencoderKLCogVideoX", down_block_types=("CogVideoXDownBlock3D",) * 4,
    up_block_types=("CogVideoXUpBlock3D",) * 4, norm_num_groups=2, **_FOUR,
)  # fmt: skip
_LTX_VAE = _whole(
    "AutoencoderKLLTXVideo", latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
    layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    **dict.fromkeys(("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True, True, True, False)),
)  # fmt: skip
_LTX = _small("LTXVideoTransformer3DModel", in_channels=8, out_channels=8)
_HUNYUAN_VAE = _whole("AutoencoderKLHunyuanVideo", norm_num_groups=4, **_FOUR)
_PROMPT_OF_HUNYUAN = {"prompt_embeds": _PROMPT, "prompt_attention_mask": _MASK, "pooled_prompt_embeds": _POOLED}
_PROMPT_OF_KANDINSKY = _guided(
    prompt_embeds_qwen=_PROMPT, prompt_embeds_clip=_POOLED, prompt_cu_seqlens=torch.tensor([0, TOKENS]).int()
)


def _cogvideox(pipeline: str, channels: int = 4, scheduler: str = "CogVideoXDDIMScheduler") -> _Makes:
    dit = _small("CogVideoXTransformer3DModel", use_rotary_positional_embeddings=True, max_text_seq_length=TOKENS,
                 sample_width=12, sample_height=8, in_channels=channels, out_channels=4)  # fmt: skip
    return _pipeline(
        f"CogVideoX{pipeline}Pipeline", scheduler=_scheduler(scheduler), vae=_COGVIDEOX_VAE, transformer=dit
    )


_Z_IMAGE = _small("ZImageTransformer2DModel", **_SHORT)

RELATIVES: Mapping[str, Relative] = {
    relative.name: relative
    for relative in (
        # The shared function
        Relative("flux", (0, 33),
                 _pipeline("FluxPipeline", transformer=_small("FluxTransformer2DModel", in_channels=16)),
                 {"prompt_embeds": _PROMPT, "pooled_prompt_embeds": _POOLED}),
        Relative("flux2", (0, 37),
                 _pipeline("Flux2KleinPipeline", vae=_autoencoder("AutoencoderKLFlux2"), transformer=_small(
                     "Flux2Transformer2DModel", in_channels=16, axes_dims_rope=(16,) * 4, guidance_embeds=False)),
                 _GUIDED),
        Relative("flux3", (0, 42), _small("Flux3Transformer2DModel", in_channels=16, axes_dims_rope=(16,) * 4),
                 _packed(4), alone=True),
        Relative("chroma", (0, 34),
                 _pipeline("ChromaPipeline", transformer=_small(
                     "ChromaTransformer2DModel", in_channels=16, approximator_hidden_dim=64, approximator_layers=1)),
                 _BY_BOOL),
        Relative("ovis_image", (0, 36),
                 _pipeline("OvisImagePipeline", transformer=_small(
                     "OvisImageTransformer2DModel", in_channels=16, out_channels=16)),
                 {"prompt_embeds": _PROMPT, "guidance_scale": 1.0}),
        Relative("longcat_image", (0, 37), _small("LongCatImageTransformer2DModel", in_channels=16), _packed(3),
                 alone=True),
        Relative("bria", (0, 36),
                 _pipeline("BriaPipeline", vae=_autoencoder(),
                           transformer=_small("BriaTransformer2DModel", in_channels=16)),
                 _GUIDED),
        *(
            Relative(name, since,
                     _pipeline(pipeline, tokenizer=lambda make: tokenizer(),
                               text_encoder=_Parts.umt5, vae=_Parts.small_wan_vae, transformer=_small(
                                   "BriaFiboTransformer2DModel", in_channels=16, joint_attention_dim=2 * TEXT_DIM)),
                     {**_EDIT, **_DECODED, **more})
            for name, since, pipeline, more in (
                ("bria_fibo", (0, 36), "BriaFiboPipeline", {}),
                ("bria_fibo_edit", (0, 37), "BriaFiboEditPipeline", {"image": _PICTURE, "_auto_resize": False}),
            )
        ),
        Relative("hunyuan_video", (0, 33),
                 _pipeline("HunyuanVideoPipeline", transformer=_small("HunyuanVideoTransformer3DModel", **_LATENTS)),
                 {**_PROMPT_OF_HUNYUAN, **_CLIP}),
        Relative("hunyuan_video_i2v", (0, 33),
                 _pipeline("HunyuanVideoImageToVideoPipeline", vae=_HUNYUAN_VAE, transformer=_small(
                     "HunyuanVideoTransformer3DModel", in_channels=9, out_channels=4,
                     image_condition_type="latent_concat")),
                 {**_PROMPT_OF_HUNYUAN, **_CLIP, **_LARGER}),
        Relative("framepack", (0, 34),
                 _small("HunyuanVideoFramepackTransformer3DModel", has_clean_x_embedder=True, has_image_proj=True,
                        image_proj_dim=TEXT_DIM, **_LATENTS),
                 {"hidden_states": _Normal((1, 4, 2, 8, 12)), "indices_latents": torch.arange(19, 21), **_TEXT,
                  **_TEXT_MASK, "pooled_projections": _POOLED, "image_embeds": _PROMPT, "timestep": _TIME,
                  "guidance": _TIME,
                  **{f"latents_{part}": _Normal((1, 4, frames, 8, 12)) for part, frames in _HISTORY.items()},
                  **{f"indices_latents_{part}": torch.arange(frames) for part, frames in _HISTORY.items()}},
                 alone=True),
        Relative("hunyuan_video_1.5", (0, 36),
                 _pipeline("HunyuanVideo15Pipeline", guider=_guider, vae=_vae_of_hunyuan_video_15, transformer=_small(
                     "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, image_embed_dim=1152)),
                 {**_MASKED, **_guided(**_SECOND), **_CLIP}),
        Relative("hunyuan_image", (0, 36),
                 _pipeline("HunyuanImagePipeline", transformer=_small(
                     "HunyuanImageTransformer2DModel", rope_axes_dim=(32, 32), **_LATENTS)),
                 {"prompt_embeds": _PROMPT, "prompt_embeds_mask": _MASK, **_SECOND,
                  "height": 4 * HEIGHT, "width": 4 * WIDTH}),
        Relative("hunyuan_dit", (0, 33),
                 _pipeline("HunyuanDiTPipeline", scheduler=_scheduler("DDPMScheduler"), transformer=_small(
                     "HunyuanDiT2DModel", patch_size=2, in_channels=4, cross_attention_dim=TEXT_DIM,
                     cross_attention_dim_t5=TEXT_DIM, text_len=TOKENS, text_len_t5=TOKENS)),
                 {**_ATTENDED, **_guided(prompt_embeds_2=_PROMPT, prompt_attention_mask_2=_MASK),
                  "use_resolution_binning": False}),
        Relative("motif_video", (0, 39),
                 _pipeline("MotifVideoPipeline", guider=_guider, vae=_Parts.small_wan_vae,
                           transformer=_small("MotifVideoTransformer3DModel", in_channels=33, out_channels=16)),
                 {**_ATTENDED, **_CLIP, **_DECODED}),
        Relative("cogvideox", (0, 33), _cogvideox(""), {**_GUIDED, **_CLIP}),
        Relative("cogvideox_i2v", (0, 33),
                 _cogvideox("ImageToVideo", 8, "CogVideoXDPMScheduler"), {**_GUIDED, **_CLIP, **_LARGER}),
        Relative("cogvideox_v2v", (0, 33), _cogvideox("VideoToVideo"), {**_GUIDED, "video": _FRAMES}),
        Relative("cogvideox_control", (0, 33), _cogvideox("FunControl", 8), {**_GUIDED, "control_video": _FRAMES}),
        Relative("cogview4", (0, 33),
                 _pipeline("CogView4Pipeline", transformer=_small(
                     "CogView4Transformer2DModel", rope_axes_dim=(32, 32), **_LATENTS)),
                 _GUIDED),
        Relative("glm_image", (0, 37),
                 _pipeline("GlmImagePipeline", transformer=_small(
                     "GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=16, **_LATENTS)),
                 {**_GUIDED, "prior_token_ids": torch.arange(24)[None] % 16}),
        Relative("easyanimate", (0, 33),
                 _pipeline("EasyAnimatePipeline", vae=_autoencoder("AutoencoderKLMagvit"), transformer=_small(
                     "EasyAnimateTransformer3DModel", patch_size=2, mmdit_layers=2, **_LATENTS)),
                 {**_ATTENDED, **_CLIP}),
        Relative("cosmos", (0, 34),
                 _pipeline("CosmosTextToWorldPipeline", scheduler=_scheduler("EDMEulerScheduler"),
                           safety_checker=lambda make: _Unchecked(),
                           transformer=_small("CosmosTransformer3DModel", adaln_lora_dim=16, max_size=(8, 16, 16),
                                              concat_padding_mask=False, extra_pos_embed_type=None, **_LATENTS)),
                 {**_GUIDED, "num_frames": 9}),
        *(
            Relative(name, since,
                     _pipeline(pipeline, safety_checker=lambda make: _Unchecked(), vae=_Parts.small_wan_vae,
                               scheduler=_scheduler("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
                               transformer=_small("CosmosTransformer3DModel", in_channels=channels, out_channels=16,
                                                  **_COSMOS)),
                     {**_GUIDED, **_DECODED, **more})
            for name, since, pipeline, channels, more in (
                ("cosmos2", (0, 34), "Cosmos2TextToImagePipeline", 16, {}),
                ("cosmos2_v2w", (0, 34), "Cosmos2VideoToWorldPipeline", 17, {"image": _PICTURE, "num_frames": 9}),
            )
        ),
        Relative("omnigen", (0, 33),
                 _small("OmniGenTransformer2DModel", vocab_size=16, pad_token_id=0, pos_embed_max_size=16,
                        rope_scaling={"type": "su", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32}),
                 {"hidden_states": _Normal((1, 4, 8, 12)), "timestep": _NOISE_LEVEL,
                  "input_ids": torch.arange(TOKENS)[None], "input_img_latents": [], "input_image_sizes": {},
                  "attention_mask": torch.ones(1, TOKENS + 25, TOKENS + 25).long(),
                  "position_ids": torch.arange(TOKENS + 25)[None]}, alone=True),
        Relative("stable_audio", (0, 33),
                 _small("StableAudioDiTModel", in_channels=8, out_channels=8, global_states_input_dim=TEXT_DIM,
                        cross_attention_input_dim=TEXT_DIM, num_key_value_attention_heads=1),
                 {"hidden_states": _Normal((1, 8, 24)), "timestep": _NOISE_LEVEL, **_TEXT,
                  "global_hidden_states": _Normal((1, 1, TEXT_DIM)),
                  "rotary_embedding": get_1d_rotary_pos_embed(32, 25, use_real=True, repeat_interleave_real=False)},
                 alone=True),
        Relative("ace_step", (0, 38),
                 _small("AceStepTransformer1DModel", in_channels=24, audio_acoustic_hidden_dim=8),
                 {"hidden_states": _Normal((1, 24, 8)), "context_latents": _Normal((1, 24, 16)),
                  "encoder_hidden_states": _Normal((1, TOKENS, 128)), "timestep": _Normal((1,)),
                  "timestep_r": _Normal((1,))}, alone=True),
        Relative("krea2", (0, 39),
                 _pipeline("Krea2Pipeline",
                           transformer=_small("Krea2Transformer2DModel", in_channels=16, num_text_layers=2),
                           vae=_Parts.qwen_vae),
                 {**_guided(prompt_embeds=_Normal((1, TOKENS, 2, TEXT_DIM)), prompt_embeds_mask=_MASK.bool()),
                  **_DECODED}),
        # Functions of their own, with real tables
        Relative("ltx", (0, 33), _pipeline("LTXPipeline", transformer=_LTX), {**_ATTENDED, "num_frames": 17}),
        Relative("ltx_i2v", (0, 33),
                 _pipeline("LTXImageToVideoPipeline", vae=_LTX_VAE, transformer=_LTX),
                 {**_ATTENDED, "num_frames": 17, **_LARGER}),
        Relative("ltx_condition", (0, 33),
                 _pipeline("LTXConditionPipeline", vae=_LTX_VAE, transformer=_LTX),
                 {**_ATTENDED, "num_frames": 9, "video": [_FRAMES]}),
        *(
            Relative(name, (0, 37),
                     _small("LTX2VideoTransformer3DModel", in_channels=8, out_channels=8, audio_in_channels=8,
                            audio_out_channels=8, rope_type=kind, **_AUDIO),
                     {"hidden_states": _Normal((1, 24, 8)), "num_frames": 2, "height": 3, "width": 4, **_TEXT,
                      "audio_hidden_states": _Normal((1, 5, 8)), "audio_encoder_hidden_states": _PROMPT,
                      "audio_num_frames": 5, "timestep": _TIME[None]}, alone=True)
            for name, kind in (("ltx2", "interleaved"), ("ltx2_split", "split"))
        ),
        Relative("sana_wm_refiner", (0, 42),
                 _small("SanaWMLTX2RefinerTransformer3DModel", in_channels=8, out_channels=8, **_AUDIO),
                 {"hidden_states": _Normal((1, 24, 8)), "timestep": _TIME.expand(1, 24), **_TEXT,
                  "video_rotary_emb": [table[None] for table in get_1d_rotary_pos_embed(128, 24, use_real=True)]},
                 alone=True),
        Relative("joyimage_edit", (0, 39), _small("JoyImageEditTransformer3DModel", in_channels=4),
                 {"hidden_states": _Normal((1, 2, 4, 1, 8, 12)), "timestep": _TIME, **_TEXT}, alone=True),
        Relative("joyimage_edit_plus", (0, 40), _small("JoyImageEditPlusTransformer3DModel", in_channels=4),
                 {"hidden_states": _Normal((1, 24, 4, 1, 2, 2)), "shape_list": [[(1, 4, 6)]], "timestep": _TIME,
                  **_TEXT, "encoder_hidden_states_mask": _MASK}, alone=True),
        Relative("joyimage_edit_pipeline", (0, 39),
                 _pipeline("JoyImageEditPipeline", vae=_Parts.small_wan_vae, transformer=_small(
                     "JoyImageEditTransformer3DModel", in_channels=16)),
                 {**_MASKED, **_DECODED, "image": _PICTURE}, slow=True),
        Relative("mochi", (0, 33),
                 _pipeline("MochiPipeline", vae=lambda make: None, transformer=_small(
                     "MochiTransformer3DModel", in_channels=4, out_channels=4, pooled_projection_dim=64,
                     max_sequence_length=TOKENS)),
                 {**_BY_BOOL, "num_frames": 7}),
        Relative("longcat_audio", (0, 38), _small("LongCatAudioDiTTransformer", latent_dim=8),
                 {"hidden_states": _Normal((1, 24, 8)), "timestep": _NOISE_LEVEL, **_TEXT,
                  "encoder_attention_mask": _MASK.bool()}, alone=True),
        # Complex numbers
        Relative("lumina", (0, 33),
                 _pipeline("LuminaPipeline", transformer=_small(
                     "LuminaNextDiT2DModel", sample_size=12, in_channels=4, cross_attention_dim=TEXT_DIM)),
                 _ATTENDED),
        Relative("lumina2", (0, 33),
                 _pipeline("Lumina2Pipeline", transformer=_small("Lumina2Transformer2DModel", **_SHORT)), _BY_BOOL),
        Relative("qwen_image", (0, 35),
                 _pipeline("QwenImagePipeline", transformer=_QWEN_IMAGE, vae=_Parts.qwen_vae), {**_MASKED, **_DECODED}),
        *(
            Relative(f"qwen_image_{name}", since,
                     _pipeline(f"QwenImage{pipeline}Pipeline",
                               **{"transformer": _QWEN_IMAGE, "vae": _Parts.qwen_vae, **parts}),
                     {**_MASKED, **_DECODED, **more}, slow=name == "edit_inpaint")
            for name, since, pipeline, parts, more in (
                ("img2img", (0, 35), "Img2Img", {}, {"image": _PICTURE}),
                ("inpaint", (0, 35), "Inpaint", {}, {"image": _PICTURE, "mask_image": _BOX}),
                ("controlnet", (0, 36), "ControlNet",
                 {"controlnet": _small("QwenImageControlNetModel", in_channels=16)}, {"control_image": _PICTURE}),
                ("controlnet_inpaint", (0, 36), "ControlNetInpaint",
                 {"controlnet": _small("QwenImageControlNetModel", in_channels=16, extra_condition_channels=4)},
                 {"control_image": _PICTURE, "control_mask": _BOX}),
                ("edit", (0, 35), "Edit", {}, {"image": _PICTURE}),
                ("edit_inpaint", (0, 36), "EditInpaint", {}, {"image": _PICTURE, "mask_image": _BOX}),
                ("edit_plus", (0, 36), "EditPlus", {}, {"image": [_PICTURE]}),
            )
        ),
        Relative("qwen_image_2.1", (0, 41),
                 _small("QwenImage21Transformer2DModel", in_channels=16, out_channels=16),
                 {"hidden_states": _Normal((1, 24, 16)), "img_shapes": [[(1, 4, 6)]], "timestep": _NOISE_LEVEL,
                  "img_mask": torch.arange(TOKENS + 6)[None] >= TOKENS, **_TEXT, "encoder_hidden_states_mask": _MASK},
                 alone=True),
        Relative("nucleus", (0, 38),
                 _pipeline("NucleusMoEImagePipeline", transformer=_small(
                     "NucleusMoEImageTransformer2DModel", in_channels=16, out_channels=4, num_experts=4,
                     capacity_factors=2.0, dense_moe_strategy="none"), vae=_Parts.qwen_vae),
                 {**_MASKED, **_DECODED}),
        Relative("z_image", (0, 36), _pipeline("ZImagePipeline", transformer=_Z_IMAGE), _LISTED),
        Relative("z_image_controlnet", (0, 37),
                 _pipeline("ZImageControlNetPipeline", transformer=_Z_IMAGE, vae=_autoencoder(shift_factor=0.1),
                           controlnet=_small("ZImageControlNetModel", control_layers_places=[0, 1],
                                             control_refiner_layers_places=[0], control_in_dim=4)),
                 {**_LISTED, "control_image": _PICTURE}),
        Relative("bria_fibo2", (0, 42),
                 _pipeline("BriaFibo2Pipeline", transformer=_small(
                     "BriaFibo2Transformer2DModel", injection_layer_ids=(1,), min_num_gist_tokens=4,
                     max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4, gist_max_text_len=8, **_SHORT)),
                 _guided(prompt_embeds=_Normal((1, 2, TOKENS, TEXT_DIM)), prompt_embeds_mask=_MASK)),
        Relative("wan_animate_2", (0, 40),
                 _small("WanAnimate2Transformer3DModel", in_dim=8, out_dim=4, ffn_dim=64, freq_dim=32, text_len=TOKENS),
                 {"hidden_states": [_Normal((4, 2, 8, 12))], "condition_latents": [_Normal((4, 2, 8, 12))],
                  "encoder_hidden_states": [_Normal((TOKENS, TEXT_DIM))], "timestep": _TIME, "seq_len": 48,
                  "encoder_hidden_states_image": _Normal((1, 5, 1280)), "kv_cache": _EmptyCache(),
                  "kv_cache_mode": "extract", "offset_grid_sizes": torch.tensor([[2, 4, 6]])}, alone=True),
        # Matrices
        Relative("hidream", (0, 34), _hidream,
                 _guided(prompt_embeds_t5=_PROMPT, prompt_embeds_llama3=_Normal((2, 1, TOKENS, TEXT_DIM)),
                         pooled_prompt_embeds=_POOLED)),
        Relative("prx", (0, 36),
                 _pipeline("PRXPipeline", vae=_autoencoder(),
                           transformer=_small("PRXTransformer2DModel", in_channels=4, axes_dim=[32, 32])),
                 {**_BY_BOOL, "use_resolution_binning": False}),
        Relative("kandinsky5", (0, 36),
                 _pipeline("Kandinsky5T2VPipeline", transformer=_small("Kandinsky5Transformer3DModel")),
                 {**_PROMPT_OF_KANDINSKY, **_CLIP}),
        Relative("kandinsky5_i2v", (0, 36),
                 _pipeline("Kandinsky5I2VPipeline", vae=_HUNYUAN_VAE, transformer=_small(
                     "Kandinsky5Transformer3DModel", in_visual_dim=4, out_visual_dim=4, visual_cond=True)),
                 {**_PROMPT_OF_KANDINSKY, "num_frames": 29, **_LARGER}),
        Relative("kandinsky6", (0, 42),
                 _pipeline("Kandinsky6TI2VAPipeline", transformer=_small(
                     "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4)),
                 {**_guided(prompt_embeds=_PROMPT, pooled_prompt_embeds=_POOLED), **_CLIP, "sample_audio": False}),
        Relative("kandinsky6_sound", (0, 42),
                 _small("Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4, ca_rope=True,
                        cross_gates=True, fix_modulation=True),
                 {"hidden_states": _Normal((1, 2, 8, 12, 9)), **_TEXT, "pooled_projections": _POOLED,
                  "timestep": _TIME, "audio_hidden_states": _Normal((1, 11, 20))}, alone=True),
        Relative("kandinsky6_sr", (0, 42),
                 _small("Kandinsky6SRTransformer3DModel", in_visual_dim=4, out_visual_dim=4),
                 {"hidden_states": _Normal((1, 2, 8, 16, 9)), "timestep": _TIME}, alone=True),
    )
}  # fmt: skip


def available() -> list[str]:
    """Returns those that the installed diffusers has."""
    return [name for name, relative in RELATIVES.items() if relative.available]
