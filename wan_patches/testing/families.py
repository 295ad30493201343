"""Builds small real pipelines of every family, with seeded random weights, and their arguments.

    from wan_patches.testing.families import FAMILIES, available

    family = FAMILIES["wan21_i2v"]
    pipe = family.build(dtype=torch.bfloat16)
    video = pipe(**family.inputs(seed=1)).frames[0]

Nothing is downloaded. The architectures are those of the published models with fewer and narrower layers, and prompts
pass through a tokenizer and a text encoder. A family that the installed diffusers lacks is in `FAMILIES` but not in
`available()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FAMILIES", "Family", "Options", "available", "images", "masks", "tokenizer"]

TEXT_DIM = 32
IMAGE_DIM = 32
CLIP_TOKENS = 17  # 16 patches of a 32 pixel image, and the class token


class Options(TypedDict, total=False):
    """Options of every builder."""

    dtype: torch.dtype  # of the transformer and the encoders; float32
    vae_dtype: torch.dtype  # float32, as diffusers' documentation loads the VAE of Wan
    seed: int  # of the weights; 0
    head_dim: int  # of the transformer's attention; 32
    transformer: Mapping[str, Any]  # more of the transformer's configuration, over what the builder sets
    vae: Mapping[str, Any]  # more of the VAE's configuration, likewise


def is_installed(since: tuple[int, int]) -> bool:
    """Whether the installed diffusers is of this minor version or newer."""
    major, minor = diffusers.__version__.split(".")[:2]
    return (int(major), int(minor)) >= since


# Building blocks


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator inside the block and restores it afterwards; never touches accelerators."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _finish(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Puts a model into the state that `from_pretrained` leaves, with weights that look trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of ones and biases of zeros would hide a patch that forgets them
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # What is loaded is cast, but for what diffusers keeps; tables made by the constructor stay as they are
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


def tokenizer(*, eos: bool = True, bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with the special tokens of T5 (`eos`) or of Gemma (`bos`)."""
    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(
        single=("<bos> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("</s>", vocabulary["</s>"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>"
    )


@dataclass(frozen=True)
class _Make:
    """Makes the components of one pipeline from its builder's options."""

    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    seed: int = 0
    head_dim: int = 32
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)

    def pipeline(self, name: str, **components: Any) -> diffusers.DiffusionPipeline:
        """Builds the named pipeline from the given components, and Wan's own for the rest."""
        usual: dict[str, Callable[[], Any]] = {
            "tokenizer": tokenizer,
            "text_encoder": self.umt5,
            "vae": self.wan_vae,
            "scheduler": unipc,
        }
        rest = {part: make() for part, make in usual.items() if part not in components}
        pipe = getattr(diffusers, name)(**rest, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def dit(self, name: str = "WanTransformer3DModel", nth: int = 0, **config: Any) -> torch.nn.Module:
        """Builds the transformer, or the `nth` of several, which differ only in their weights."""
        config = {
            "num_attention_heads": 2,
            "attention_head_dim": self.head_dim,
            "num_layers": 2,
            "text_dim": TEXT_DIM,
            "ffn_dim": 128,
            **config,
            **self.transformer,
        }
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if config.get("image_dim"):  # models with image tokens attend to them by keys and values of their own
            config.setdefault("added_kv_proj_dim", width)
        return self.build(getattr(diffusers, name), nth, **config)

    def build(self, cls: type, nth: int = 0, *, as_vae: bool = False, **config: Any) -> Any:
        with _seeded(self.seed + 1000 * nth):
            return _finish(cls(**config), self.vae_dtype if as_vae else self.dtype)

    def wan_vae(self, **config: Any) -> torch.nn.Module:
        """Builds Wan's VAE, with changes to its configuration."""
        config = {"base_dim": 8, "num_res_blocks": 1, **config, **self.vae}
        vae = self.build(diffusers.AutoencoderKLWan, as_vae=True, **config)
        with torch.no_grad():
            # Untrained, it gives all pictures nearly the same latents, and all videos middling colours
            vae.quant_conv.weight[: vae.config.z_dim].mul_(8)
            vae.decoder.conv_out.weight.mul_(2)  # some pixels leave the range, so that a lost clamp shows
        return vae

    def umt5(self) -> torch.nn.Module:
        config = transformers.UMT5Config(
            vocab_size=260, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return self.build(transformers.UMT5EncoderModel, config=config)

    def gemma(self) -> torch.nn.Module:
        config = transformers.Gemma2Config(
            vocab_size=260, hidden_size=TEXT_DIM, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            pad_token_id=0, eos_token_id=1, bos_token_id=3,
        )  # fmt: skip
        return self.build(transformers.Gemma2Model, config=config)

    def clip(self, cls: type = transformers.CLIPVisionModel) -> dict[str, Any]:
        """Builds the image encoder and its image processor."""
        config = transformers.CLIPVisionConfig(
            hidden_size=IMAGE_DIM, intermediate_size=64, projection_dim=16, num_hidden_layers=3,
            num_attention_heads=4, image_size=32, patch_size=8,
        )  # fmt: skip
        return {
            "image_encoder": self.build(cls, config=config),
            "image_processor": transformers.CLIPImageProcessor(crop_size=32, size=32),
        }


def unipc(shift: float = 5.0) -> diffusers.UniPCMultistepScheduler:
    """Returns the scheduler that Wan and SkyReels models are published with."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


# Builders, one a family


def wan_t2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.1 text to video."""
    make = _Make(**options)
    return make.pipeline("WanPipeline", transformer=make.dit())


def wan22_i2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.2 A14B image to video: two transformers, no image encoder."""
    make = _Make(**options)
    high, low = (make.dit(nth=nth, in_channels=36, out_channels=16) for nth in range(2))
    return make.pipeline("WanImageToVideoPipeline", transformer=high, transformer_2=low, boundary_ratio=0.9)


def wan21_i2v(*, first_last: bool = False, **options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.1 image to video; with `first_last` FLF2V, which also takes the last image."""
    make = _Make(**options)
    more: dict[str, Any] = {"pos_embed_seq_len": 2 * CLIP_TOKENS} if first_last else {}
    dit = make.dit(in_channels=36, out_channels=16, image_dim=IMAGE_DIM, **more)
    return make.pipeline("WanImageToVideoPipeline", transformer=dit, **make.clip())


def wan21_flf2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.1 FLF2V: first and last image to video."""
    return wan21_i2v(first_last=True, **options)


def wan22_ti2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.2 TI2V 5B: one timestep per token, and the residual VAE with 48 channels and 16 x 16 pixels per latent."""
    make = _Make(**options)
    vae = make.wan_vae(
        decoder_base_dim=12, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, latents_mean=[0.01 * i - 0.2 for i in range(48)],
        latents_std=[0.5 + 0.01 * i for i in range(48)],
    )  # fmt: skip
    dit = make.dit(in_channels=48, out_channels=48)
    return make.pipeline("WanImageToVideoPipeline", transformer=dit, vae=vae, expand_timesteps=True)


def wan_v2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.1 video to video."""
    make = _Make(**options)
    return make.pipeline("WanVideoToVideoPipeline", transformer=make.dit(), scheduler=unipc(3.0))


def wan_vace(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.1 VACE: video, mask and reference images to video."""
    make = _Make(**options)
    dit = make.dit("WanVACETransformer3DModel", num_layers=3, vace_layers=[0, 2])
    return make.pipeline("WanVACEPipeline", transformer=dit)


def wan_animate(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Wan 2.2 Animate: a character, a pose video and a face video to video."""
    make = _Make(**options)
    dit = make.dit(
        "WanAnimateTransformer3DModel", in_channels=36, latent_channels=16, out_channels=16,
        image_dim=IMAGE_DIM, motion_encoder_size=16, motion_style_dim=16, motion_dim=4, motion_encoder_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return make.pipeline("WanAnimatePipeline", transformer=dit, **make.clip())


def lucy_edit(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Lucy Edit: Wan 2.2 TI2V's transformer, with the video to edit beside the noise."""
    make = _Make(**options)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return make.pipeline("LucyEditPipeline", transformer=make.dit(in_channels=32, out_channels=16), scheduler=scheduler)


def _skyreels(name: str, make: _Make, **components: Any) -> diffusers.DiffusionPipeline:
    components.setdefault("transformer", make.dit("SkyReelsV2Transformer3DModel"))
    return make.pipeline(name, scheduler=unipc(8.0), **components)


def skyreels_v2_t2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SkyReels-V2 text to video."""
    return _skyreels("SkyReelsV2Pipeline", _Make(**options))


def skyreels_v2_i2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SkyReels-V2 image to video."""
    make = _Make(**options)
    dit = make.dit("SkyReelsV2Transformer3DModel", in_channels=36, out_channels=16, image_dim=IMAGE_DIM)
    clip = make.clip(transformers.CLIPVisionModelWithProjection)
    return _skyreels("SkyReelsV2ImageToVideoPipeline", make, transformer=dit, **clip)


def skyreels_v2_df(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SkyReels-V2 diffusion forcing, text to video: one timestep per frame, and the frame rate as an input."""
    return _diffusion_forcing("SkyReelsV2DiffusionForcingPipeline", options)


def skyreels_v2_df_i2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SkyReels-V2 diffusion forcing, image to video."""
    return _diffusion_forcing("SkyReelsV2DiffusionForcingImageToVideoPipeline", options)


def skyreels_v2_df_v2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SkyReels-V2 diffusion forcing, video to video: continues a video."""
    return _diffusion_forcing("SkyReelsV2DiffusionForcingVideoToVideoPipeline", options)


def _diffusion_forcing(name: str, options: Options) -> diffusers.DiffusionPipeline:
    make = _Make(**options)
    dit = make.dit("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    return _skyreels(name, make, transformer=dit)


def chronoedit(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """ChronoEdit: an image edited as the last frame of a video."""
    make = _Make(**options)
    dit = make.dit("ChronoEditTransformer3DModel", in_channels=36, out_channels=16, image_dim=IMAGE_DIM)
    return make.pipeline("ChronoEditPipeline", transformer=dit, scheduler=unipc(2.0), **make.clip())


def sana_video(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SANA-Video text to video: linear attention, text from Gemma 2."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return _sana("SanaVideoPipeline", scheduler, options)


def sana_video_i2v(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """SANA-Video image to video."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    return _sana("SanaImageToVideoPipeline", scheduler, options)


def _sana(name: str, scheduler: Any, options: Options) -> diffusers.DiffusionPipeline:
    make = _Make(**options)
    heads = make.transformer.get("num_attention_heads", 2)
    config = {
        "num_attention_heads": heads, "attention_head_dim": make.head_dim, "num_cross_attention_heads": heads,
        "cross_attention_head_dim": make.head_dim, "cross_attention_dim": heads * make.head_dim, "num_layers": 2,
        "caption_channels": TEXT_DIM, "patch_size": (1, 2, 2), **make.transformer,
    }  # fmt: skip
    return make.pipeline(
        name,
        transformer=make.build(diffusers.SanaVideoTransformer3DModel, **config),
        text_encoder=make.gemma(),
        tokenizer=tokenizer(eos=False, bos=True),
        scheduler=scheduler,
    )


def helios(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Helios at one resolution: text, image or video to video, chunk by chunk."""
    make = _Make(**options)
    scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return make.pipeline("HeliosPipeline", transformer=_helios(make), scheduler=scheduler)


def helios_pyramid(*, distilled: bool = False, **options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Helios at three resolutions: with zero-star guidance, or `distilled` and without guidance."""
    make = _Make(**options)
    name = "HeliosDMDScheduler" if distilled else "HeliosScheduler"
    # The published gamma of 1/3 makes a covariance that is singular, and not every Cholesky lets it pass
    scheduler = getattr(diffusers, name)(gamma=0.3333, use_dynamic_shifting=True)
    return make.pipeline(
        "HeliosPyramidPipeline",
        transformer=_helios(make),
        scheduler=scheduler,
        is_distilled=distilled,
        is_cfg_zero_star=not distilled,
    )


def helios_distilled(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Helios at three resolutions, distilled."""
    return helios_pyramid(distilled=True, **options)


def _helios(make: _Make) -> torch.nn.Module:
    space = make.transformer.get("attention_head_dim", make.head_dim) // 6 * 2
    time = make.transformer.get("attention_head_dim", make.head_dim) - 2 * space
    return make.dit("HeliosTransformer3DModel", rope_dim=(time, space, space))


def anyflow(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """AnyFlow: text or the first frames to video, all frames at once."""
    return _anyflow("AnyFlowPipeline", options)


def anyflow_far(**options: Unpack[Options]) -> diffusers.DiffusionPipeline:
    """Causal AnyFlow: chunk after chunk, with a cache of keys and values; old chunks have larger patches."""
    return _anyflow("AnyFlowFARPipeline", options, full_chunk_limit=2, chunk_partition=(1, 1, 1))


def _anyflow(name: str, options: Options, **config: Any) -> diffusers.DiffusionPipeline:
    make = _Make(**options)
    dit = make.dit(name.replace("Pipeline", "Transformer3DModel"), **config)
    return make.pipeline(name, transformer=dit, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0))


# Inputs


def images(seed: int = 0, count: int = 1, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Returns `count` RGB frames of `size` (width, height): drifting smooth colours with noise."""
    width, height = size
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(colours).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    frames = []
    for i in range(count):
        x, y = i * width // count, i * height // count
        frame = scene[y : y + height, x : x + width] + random.normal(0, 6, (height, width, 3))
        frames.append(Image.fromarray(frame.clip(0, 255).astype(np.uint8)))
    return frames


def masks(count: int = 1, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Returns `count` masks of `size` (width, height): a moving white box on black."""
    width, height = size
    frames = []
    for i in range(count):
        frames.append(Image.new("L", size, 0))
        frames[-1].paste(255, (x := i * width // (2 * count), height // 4, x + width // 2, height))
    return frames


def _tensor(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Returns a video of one frame, `(1, 1, 3, height, width)` in [0, 1]."""
    return torch.from_numpy(np.asarray(image.resize(size), np.float32) / 255).permute(2, 0, 1)[None, None]


@dataclass(frozen=True)
class Family:
    """A pipeline, and its arguments for a small run."""

    name: str
    build: Callable[..., diffusers.DiffusionPipeline]
    since: tuple[int, int]  # the first minor version of diffusers that has it
    takes: Mapping[str, str] = field(default_factory=dict)  # argument: which of the pictures it gets
    call: Mapping[str, Any] = field(default_factory=dict)  # more arguments, or None for one not to give
    frames: int = 9
    frames_as: str | None = "num_frames"
    size: tuple[int, int] = (48, 32)  # width, height: not square, so that no patch may swap them
    without: frozenset[str] = frozenset()  # of the patches that tests expect in every family, those that leave it stock

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this pipeline."""
        return is_installed(self.since)

    def inputs(
        self,
        *,
        image: Image.Image | None = None,
        last_image: Image.Image | None = None,
        video: list[Image.Image] | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int = 2,
        **more: Any,
    ) -> dict[str, Any]:
        """Returns the arguments of one call, generated from `seed` unless given.

        Pictures that the family does not use are ignored. The generator is new: get new inputs for every call that
        should produce the same video. (Before diffusers 0.38, the Helios pyramid also draws from the global generator.)
        """
        width, height = size = size or self.size
        frames = frames or self.frames
        pictures: dict[str, Callable[[], Any]] = {
            "image": lambda: image or images(seed, 1, size)[0],
            "images": lambda: [image or images(seed, 1, size)[0]],
            "tensor": lambda: _tensor(image or images(seed, 1, size)[0], size),
            "last_image": lambda: last_image or images(seed + 1, 1, size)[0],
            "video": lambda: video or images(seed + 2, frames, size),
            "face": lambda: images(seed + 3, len(video or range(frames)), (32, 32)),
            "background": lambda: images(seed + 4, len(video or range(frames)), size),
            "mask": lambda: masks(len(video or range(frames)), size),
        }
        arguments = {
            "prompt": "A red fox runs over fresh snow",
            "negative_prompt": "blurry",
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": 4.0,
            "max_sequence_length": 64,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "np",
            **({self.frames_as: frames} if self.frames_as else {}),
            **{argument: pictures[picture]() for argument, picture in self.takes.items()},
            **self.call,
        }
        if "pyramid_num_inference_steps_list" in arguments:
            arguments["pyramid_num_inference_steps_list"] = [steps] * 3
        return {key: value for key, value in {**arguments, **more}.items() if value is not None}


_IMAGE, _VIDEO = {"image": "image"}, {"video": "video"}
_ANIMATE = {**_IMAGE, "pose_video": "video", "face_video": "face"}
_SEGMENTS = {"segment_frame_length": 5, "guidance_scale": 1.0}  # two segments of the nine frames
_LONG = {"base_num_frames": 9, "overlap_history": 5}  # two rounds of thirteen frames
_SANA = {"use_resolution_binning": False, "complex_human_instruction": []}
_CHUNKS = {"num_latent_frames_per_chunk": 2}  # two chunks of five frames
_PYRAMID: dict[str, Any] = {
    **_CHUNKS,
    "num_inference_steps": None,
    "pyramid_num_inference_steps_list": [],  # filled in by `inputs`
}

_ANYFLOW = frozenset({"qk", "step_loop"})

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("wan_t2v", wan_t2v, (0, 33)),
        Family("wan22_i2v", wan22_i2v, (0, 35), _IMAGE),
        Family("wan21_i2v", wan21_i2v, (0, 33), _IMAGE),
        Family("wan21_flf2v", wan21_flf2v, (0, 34), {**_IMAGE, "last_image": "last_image"}),
        Family("wan22_ti2v", wan22_ti2v, (0, 35), _IMAGE, size=(96, 64)),
        Family("wan_v2v", wan_v2v, (0, 33), _VIDEO, {"strength": 0.8}, frames_as=None),
        Family("wan_vace", wan_vace, (0, 34), {**_VIDEO, "mask": "mask", "reference_images": "images"}),
        Family("wan_animate", wan_animate, (0, 36), _ANIMATE, _SEGMENTS, frames_as=None),
        Family("wan_animate_replace", wan_animate, (0, 36),
               {**_ANIMATE, "background_video": "background", "mask_video": "mask"},
               {**_SEGMENTS, "mode": "replace"}, frames_as=None),
        Family("lucy_edit", lucy_edit, (0, 36), _VIDEO),
        Family("skyreels_v2_t2v", skyreels_v2_t2v, (0, 35)),
        Family("skyreels_v2_i2v", skyreels_v2_i2v, (0, 35), _IMAGE),
        Family("skyreels_v2_df", skyreels_v2_df, (0, 35), {}, _LONG, frames=13),
        Family("skyreels_v2_df_i2v", skyreels_v2_df_i2v, (0, 35), _IMAGE, _LONG, frames=13),
        Family("skyreels_v2_df_v2v", skyreels_v2_df_v2v, (0, 35), _VIDEO, _LONG, frames=13),
        Family("chronoedit", chronoedit, (0, 36), _IMAGE),
        Family("chronoedit_reasoning", chronoedit, (0, 36), _IMAGE,
               {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1}),
        Family("sana_video", sana_video, (0, 36), {}, _SANA, frames_as="frames", size=(64, 32)),
        Family("sana_video_i2v", sana_video_i2v, (0, 36), _IMAGE, _SANA, frames_as="frames", size=(64, 32)),
        Family("helios", helios, (0, 37), {}, _CHUNKS),
        Family("helios_i2v", helios, (0, 37), _IMAGE, _CHUNKS),
        Family("helios_v2v", helios, (0, 37), _VIDEO, _CHUNKS),
        Family("helios_pyramid", helios_pyramid, (0, 37), {}, _PYRAMID, size=(128, 64)),
        Family("helios_pyramid_i2v", helios_pyramid, (0, 37), _IMAGE, _PYRAMID, size=(128, 64)),
        Family("helios_distilled", helios_distilled, (0, 37), _VIDEO, {**_PYRAMID, "guidance_scale": 1.0},
               size=(128, 64)),
        Family("anyflow", anyflow, (0, 39), without=_ANYFLOW),
        Family("anyflow_i2v", anyflow, (0, 39), {"video": "images"}, without=_ANYFLOW),
        Family("anyflow_far", anyflow_far, (0, 39), without=_ANYFLOW),
        Family("anyflow_far_i2v", anyflow_far, (0, 39), {"video": "tensor"}, without=_ANYFLOW),
    )
}  # fmt: skip


def available() -> list[str]:
    """Returns the families that the installed diffusers has."""
    return [name for name, family in FAMILIES.items() if family.available]
