"""The published denoisers at the sizes they are used with, and tiny ones: random weights, built on the device.

A shape is a model with a video. What it is called with is what its pipeline calls it with.
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

__all__ = ["SHAPES", "WAN_22_VAE", "Shape", "build", "inputs", "shape_of"]

TEXT_TOKENS = 512
_TIMESTEP = 500
_HISTORY = (1, 16, 2, 1)  # latent frames of Helios: the first one of all, then long, mid and short ago


@dataclass(frozen=True)
class Shape:
    """A denoiser and a video.

    model: its class in diffusers, and the minor version that it came with (`since`).
    config: of the model, over its defaults, which are those of the 14B models.
    vae: the configuration of the autoencoder; its scale makes latents of pixels.
    frames, height, width: the video; `on_cpu` is one of about 4,000 tokens.
    attention: the backend, as `set_attention_backend` takes it; None leaves diffusers' choice.
    per_token: every token has a timestep, and those of the first frame have 0 (Wan 2.2 TI2V, image to video).
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
        """Whether the model takes history."""
        return self.model.startswith("Helios")

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has the model."""
        major, minor = diffusers.__version__.split(".")[:2]
        return (int(major), int(minor)) >= self.since

    @property
    def published(self) -> Shape:
        """The shape of this name before anything was chosen."""
        return SHAPES[self.name]

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        return int(self.config.get("num_layers", 40))

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        scale = self.vae.get("scale_factor_spatial", 8)
        return (self.frames - 1) // 4 + 1, self.height // scale, self.width // scale

    @property
    def tokens(self) -> int:
        """What blocks get, history among it: patches of 1 x 2 x 2 latents, and larger ones of what is long ago."""
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
    """The shape called `name`, on a CPU scaled down to about 4,000 tokens.

    Args:
        name: one of `SHAPES`.
        device: what it is for.
        frames: of the video; a multiple of four and one more.
        size: width and height in pixels, multiples of 16 (of 32 where the autoencoder divides by 16).
        layers: blocks of the model.
        attention: name of a backend of diffusers.

    Raises:
        MeasurementError: nobody knows the shape, the installed diffusers lacks its model, or the video does not suit.
    """
    if name not in SHAPES:
        raise MeasurementError(f"Unknown shape {name!r}; known: {', '.join(SHAPES)}.")
    shape = replace(SHAPES[name], attention=attention)
    if not shape.available:
        since = ".".join(map(str, shape.since))
        raise MeasurementError(f"{shape.model} came with diffusers {since}, this is {diffusers.__version__}.")
    if device.type == "cpu" and shape.on_cpu is not None:
        on_cpu = shape.on_cpu
        shape = replace(shape, frames=on_cpu[0], height=on_cpu[1], width=on_cpu[2])
    if frames is not None:
        shape = replace(shape, frames=frames)
    if size is not None:
        shape = replace(shape, width=size[0], height=size[1])
    if layers is not None:
        shape = replace(shape, config={**shape.config, "num_layers": layers})
    pixels = 2 * shape.vae.get("scale_factor_spatial", 8)  # of a token
    if (shape.frames - 1) % 4 or shape.height % pixels or shape.width % pixels:
        raise MeasurementError(
            f"{shape.frames} frames of {shape.width}x{shape.height} do not suit {name}: it takes 4n + 1 frames, and "
            f"sizes that are multiples of {pixels}."
        )
    return shape


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """The model in evaluation mode, never whole anywhere but on `device`; its weights are seeded and random.

    Parameters have `dtype`, or float32 where `from_pretrained` keeps that; buffers are as the constructor makes them.

    Raises:
        MeasurementError: the attention backend cannot be used.
    """
    cls = getattr(diffusers, shape.model)
    with torch.device("meta"):
        model = cls(**shape.config)
    drawing = generator(device, seed)
    kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    weights = {}
    for name, parameter in model.named_parameters():
        used = torch.float32 if kept & set(name.split(".")) else dtype
        weight = randn_tensor(parameter.shape, generator=drawing, device=device, dtype=used)
        if parameter.ndim > 1:  # what goes through keeps its size
            weight.mul_(parameter[0].numel() ** -0.5)
        else:  # of norms about one, biases about nothing
            weight.mul_(0.1).add_(float(name.endswith("weight")))
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    # Buffers are made by arithmetic, which nothing did on "meta"; they depend on neither width nor depth
    narrow = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 8, "text_dim": 8}
    for name, buffer in cls(**{**shape.config, **narrow}).named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    if shape.attention is not None:
        _attend(model, shape.attention)
    return model.requires_grad_(False).eval()


def _attend(model: Any, backend: str) -> None:
    """Chooses the backend of this model, and of no other that comes later."""
    registry: Any = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    try:
        model.set_attention_backend(backend)
    except Exception as error:  # each backend has its own way to say what it lacks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeasurementError(f"The attention backend {backend!r} cannot be used: {reason}") from None
    finally:
        registry._active_backend = before


def inputs(shape: Shape, model: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """What the pipeline calls the model with: one video, in the middle of the denoising."""
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
