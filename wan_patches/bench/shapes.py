"""Published denoisers at their usual sizes, and tiny ones, with random weights; built on the device.

A shape combines a model and a video. The inputs are those that the model's pipeline passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers.models import attention_dispatch
from diffusers.utils.torch_utils import randn_tensor

from wan_patches.bench.measure import MeasurementError, generator

__all__ = ["SHAPES", "WAN_22_VAE", "Shape", "build", "build_on_paper", "inputs", "shape_of"]

TEXT_TOKENS = 512
_TIMESTEP = 500
_HISTORY = (1, 16, 2, 1)  # latent frames of Helios: the first of the video, then long, mid and short history


@dataclass(frozen=True)
class Shape:
    """A denoiser and a video.

    model: the class in diffusers; `since` is the minor version that introduced it.
    config: overrides of the model's defaults, which are those of the 14B models.
    vae: the configuration of the autoencoder; its scale converts pixels to latents.
    frames, height, width: the video; `on_cpu` is a video of about 4,000 tokens.
    attention: the backend, an argument of `set_attention_backend`; None keeps diffusers' choice.
    per_token: every token has its own timestep, 0 in the first frame (Wan 2.2 TI2V, image to video).
    """

    name: str
    model: str = "WanTransformer3DModel"
    config: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    since: tuple[int, int] = (0, 35)
    frames: int = 81
    height: int = 480
    width: int = 832
    on_cpu: tuple[int, int, int] | None = (81, 208, 240)
    attention: str | None = None
    per_token: bool = False

    @property
    def is_helios(self) -> bool:
        """Whether the model has history inputs."""
        return self.model.startswith("Helios")

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has the model."""
        major, minor = diffusers.__version__.split(".")[:2]
        return (int(major), int(minor)) >= self.since

    @property
    def published(self) -> Shape:
        """The shape of this name without overrides."""
        return SHAPES[self.name]

    @property
    def layers(self) -> int:
        """Number of blocks of the model."""
        return int(self.config.get("num_layers", 40))

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        scale = self.vae.get("scale_factor_spatial", 8)
        return (self.frames - 1) // 4 + 1, self.height // scale, self.width // scale

    @property
    def tokens(self) -> int:
        """Number of tokens, history included: patches of 1 x 2 x 2 latents, or larger ones for mid and long history."""
        frames, height, width = self.latents
        tokens = frames * (height // 2) * (width // 2)
        if self.is_helios:
            first, long, mid, short = _HISTORY
            tokens += (first + short) * (height // 2) * (width // 2)
            tokens += -(-mid // 2) * -(-height // 4) * -(-width // 4)
            tokens += -(-long // 4) * -(-height // 8) * -(-width // 8)
        return tokens


WAN_22_VAE: dict[str, Any] = {  # the autoencoder of Wan2.2 TI2V 5B
    **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
    **{"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}
_TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "text_dim": 32,
}
_TINY_VAE: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}
_TINY_VIDEO: dict[str, Any] = {"frames": 9, "height": 64, "width": 96, "on_cpu": None}

SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("14b-480p"),
        Shape("14b-720p", height=720, width=1280),
        Shape("1.3b-480p", config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        Shape(
            "ti2v-5b",
            config={"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
            | {"in_channels": 48, "out_channels": 48},
            vae=WAN_22_VAE,
            frames=121,
            height=704,
            width=1280,
            on_cpu=(49, 480, 672),
            per_token=True,
        ),
        Shape(
            "helios",
            model="HeliosTransformer3DModel",
            since=(0, 37),
            frames=33,
            height=384,
            width=640,
            on_cpu=(33, 256, 384),
        ),
        Shape("tiny", config=_TINY, vae=_TINY_VAE, **_TINY_VIDEO),
        Shape(
            "tiny-ti2v",
            config=_TINY | {"in_channels": 48, "out_channels": 48},
            vae={**WAN_22_VAE, "base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 1},
            per_token=True,
            **_TINY_VIDEO,
        ),
        Shape(
            "tiny-helios",
            model="HeliosTransformer3DModel",
            config=_TINY | {"rope_dim": (12, 10, 10)},
            vae=_TINY_VAE,
            since=(0, 37),
            **_TINY_VIDEO,
        ),
    )
}


def shape_of(
    name: str,
    device: torch.device,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    layers: int | None = None,
    attention: str | None = None,
) -> Shape:
    """Returns the shape named `name`, scaled down to about 4,000 tokens on a CPU.

    Args:
        name: one of `SHAPES`.
        device: the device to run on.
        frames: number of video frames, 4n + 1.
        size: width and height in pixels, multiples of 16 (of 32 if the autoencoder divides by 16).
        layers: number of blocks of the model.
        attention: name of an attention backend of diffusers.

    Raises:
        MeasurementError: the shape is unknown, the installed diffusers lacks its model, or the video size is invalid.
    """
    if name not in SHAPES:
        raise MeasurementError(f"Unknown shape {name!r}; known: {', '.join(SHAPES)}.")
    shape = replace(SHAPES[name], attention=attention)
    if not shape.available:
        since = ".".join(map(str, shape.since))
        raise MeasurementError(f"{shape.model} requires diffusers {since} or newer, not {diffusers.__version__}.")
    if device.type == "cpu" and shape.on_cpu is not None:
        on_cpu = shape.on_cpu
        shape = replace(shape, frames=on_cpu[0], height=on_cpu[1], width=on_cpu[2])
    if frames is not None:
        shape = replace(shape, frames=frames)
    if size is not None:
        shape = replace(shape, width=size[0], height=size[1])
    if layers is not None:
        shape = replace(shape, config={**shape.config, "num_layers": layers})
    pixels = 2 * shape.vae.get("scale_factor_spatial", 8)  # per token
    if (shape.frames - 1) % 4 or shape.height % pixels or shape.width % pixels:
        raise MeasurementError(
            f"{shape.frames} frames of {shape.width}x{shape.height} do not suit {name}: use 4n + 1 frames and "
            f"sizes that are multiples of {pixels}."
        )
    return shape


def build_on_paper(shape: Shape, dtype: torch.dtype) -> Any:
    """Builds the model in evaluation mode on "meta", so without values.

    Parameters have `dtype`, or float32 if `from_pretrained` keeps them in it.
    """
    cls = getattr(diffusers, shape.model)
    with torch.device("meta"):
        model = cls(**shape.config)
    kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model.requires_grad_(False).eval()


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Builds the model in evaluation mode with seeded random weights; the whole model only ever exists on `device`.

    Parameters are as in `build_on_paper`; buffers are those of the constructor.

    Raises:
        MeasurementError: the attention backend cannot be used.
    """
    model = build_on_paper(shape, dtype)
    drawing = generator(device, seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = randn_tensor(parameter.shape, generator=drawing, device=device, dtype=parameter.dtype)
        if parameter.ndim > 1:  # preserves the magnitude of activations
            weight.mul_(parameter[0].numel() ** -0.5)
        else:  # weights of norms are near one, biases near zero
            weight.mul_(0.1).add_(float(name.endswith("weight")))
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    # buffers are computed, which "meta" does not do; they depend on neither width nor depth
    narrow = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 8, "text_dim": 8}
    for name, buffer in type(model)(**{**shape.config, **narrow}).named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    if shape.attention is not None:
        _attend(model, shape.attention)
    return model.requires_grad_(False).eval()


def _attend(model: Any, backend: str) -> None:
    """Selects the backend of this model without changing it for later models."""
    registry: Any = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    try:
        model.set_attention_backend(backend)
    except Exception as error:  # backends report missing requirements differently
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeasurementError(f"The attention backend {backend!r} cannot be used: {reason}") from None
    finally:
        registry._active_backend = before


def inputs(shape: Shape, model: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call of the model: one video, in the middle of the denoising."""
    drawing = generator(device, seed)

    def noise(*size: int) -> torch.Tensor:
        return randn_tensor(size, generator=drawing, device=device, dtype=dtype)

    frames, height, width = shape.latents
    channels = model.config.in_channels
    timestep = torch.tensor([_TIMESTEP], device=device)
    if shape.per_token:
        _, down, across = model.config.patch_size
        per_frame = (height // down) * (width // across)
        timestep = timestep.float().repeat(frames * per_frame)
        timestep[:per_frame] = 0
        timestep = timestep.unsqueeze(0)
    arguments = {
        "hidden_states": noise(1, channels, frames, height, width),
        "timestep": timestep,
        "encoder_hidden_states": noise(1, TEXT_TOKENS, model.config.text_dim),
        "return_dict": False,
    }
    if shape.is_helios:
        first, long, mid, short, now = torch.arange(sum(_HISTORY) + frames).split([*_HISTORY, frames])
        indices = {"hidden_states": now, "latents_history_long": long, "latents_history_mid": mid}
        indices["latents_history_short"] = torch.cat([first, short])
        for name, index in indices.items():
            arguments[f"indices_{name}"] = index.unsqueeze(0)
            if name != "hidden_states":
                arguments[name] = noise(1, channels, len(index), height, width)
    return arguments
