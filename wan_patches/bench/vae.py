"""Benchmarks Wan's and Qwen-Image's autoencoders: stock against patched, and one process against two sharing tiles.

The models have the published channel counts and random weights. On a CPU, the shapes are scaled down to a feasible
size; the cost of a convolution scales with the shape like all other costs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, WanImageToVideoPipeline
from rich import box
from rich.console import Group
from rich.table import Table

import wan_patches
from wan_patches.bench import ops, vae_parallel
from wan_patches.bench.shapes import WAN_22_VAE
from wan_patches.bindings import conditioning
from wan_patches.bindings.forwards import runs_only_library_code

_WHAT = ("decode", "encode", "encode pictures")  # the memory layout of pictures is channels last
_TINY: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
_QWEN_IMAGE: dict[str, Any] = {"input_channels": 3, "dim_mult": [1, 2, 4, 4]}  # as published
_TINY_QWEN_IMAGE = {**_TINY, **_QWEN_IMAGE}


def cases(device: torch.device, quick: bool = False) -> list[ops.Case]:
    """Returns the cases for `device`: videos of 81 frames in 480p and 720p and pictures, scaled down on a CPU."""
    if quick:
        both = [(5, 48, 80, _TINY), (1, 48, 80, _TINY_QWEN_IMAGE)]
        return [*(_coded(what, *shape) for shape in both for what in _WHAT), _condition(5, 48, 80)]
    if device.type != "cpu":
        both = [(81, 480, 832, {}), (81, 720, 1280, {}), (81, 704, 1280, WAN_22_VAE), (1, 1024, 1024, _QWEN_IMAGE)]
    else:
        both = [(5, 240, 416, {}), (5, 352, 640, {}), (5, 128, 224, WAN_22_VAE), (1, 384, 384, _QWEN_IMAGE)]
    return [
        *(_coded(what, *shape) for shape in both for what in _WHAT),
        _condition(81, 480, 832),
    ]


def measure(
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    threads: int | None = None,
    parallel: bool = True,
    only: str = "",
) -> tuple[list[ops.Row], list[vae_parallel.Row]]:
    """Returns the rows of a device and, with `parallel`, of tiles shared by two processes, always on two CPU cores.

    only: as in `ops.measure`.
    """
    rows = ops.measure(device, dtype, quick=quick, threads=threads, only=only, cases=cases(device, quick))
    return rows, vae_parallel.measure(quick=quick) if parallel else []


def table(rows: Sequence[ops.Row], shared: Sequence[vae_parallel.Row]) -> Group:
    """Returns the rows as tables."""
    if not shared:
        return ops.table(rows)
    found = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("tiles shared", "shape", "dtype", "processes", "one s", "together s", "ratio", "exact"):
        found.add_column(column, justify="right" if column.endswith(("s", "ratio")) else "left")
    for row in shared:
        case, busy = row.case, "~" if (row.other_cores or 0.0) > ops.CALM else ""
        numbers = (str(row.ranks), f"{row.alone_s:.2f}", f"{row.shared_s:.2f}", f"{busy}{row.ratio:.2f}x")
        shape = f"{case.frames}x{case.height}x{case.width}"
        found.add_row(case.operation, shape, case.dtype, *numbers, "yes" if row.equal else "NO")
    return Group(ops.table(rows), found, "Each process has a core of its own and one thread; patches are off.")


def write_json(
    path: Path,
    rows: Sequence[ops.Row],
    shared: Sequence[vae_parallel.Row],
    device: torch.device,
    threads: int | None = None,
) -> None:
    """Writes the rows and the facts about the machine; `threads` is the value passed to `measure`."""
    ops.write_json(path, rows, device, threads)
    content = json.loads(path.read_text())
    content["shared"] = [{**asdict(row), "ratio": row.ratio} for row in shared]
    path.write_text(json.dumps(content, indent=2) + "\n")


def _coded(what: str, frames: int, height: int, width: int, config: dict[str, Any]) -> ops.Case:
    work = _decode if what == "decode" else functools.partial(_encode, what == "encode pictures")
    make = functools.partial(work, frames, height, width, config)
    name = f"{what}, Wan 2.2" if config is WAN_22_VAE else f"{what}, Qwen-Image" if _is_qwen_image(config) else what
    return ops.Case(name, f"{frames}x{height}x{width}", make)


def _decode(
    frames: int, height: int, width: int, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[ops.Call, ops.Call]:
    vae = _build(config, device, dtype)
    scale = vae.spatial_compression_ratio
    latents = torch.randn(1, vae.config.z_dim, (frames - 1) // 4 + 1, height // scale, width // scale)
    latents = latents.to(device, dtype)
    return _both(lambda: vae.decode(latents).sample)


def _encode(
    pictures: bool,
    frames: int,
    height: int,
    width: int,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ops.Call, ops.Call]:
    vae = _build(config, device, dtype)
    memory_format = torch.channels_last_3d if pictures else torch.contiguous_format
    video = torch.randn(1, 3, frames, height, width).to(device, dtype, memory_format=memory_format)
    return _both(lambda: vae.encode(video).latent_dist.parameters)


def _condition(frames: int, height: int, width: int) -> ops.Case:
    make = functools.partial(_condition_calls, frames, height, width)
    return ops.Case("condition video, VAE without work", f"{frames}x{height}x{width}", make, "fp32")


def _condition_calls(
    frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[ops.Call, ops.Call]:
    """Returns calls of `prepare_latents` with an autoencoder whose encoder only reads its chunks."""
    vae: Any = _build(_TINY, device, torch.float32)
    real = vae.encoder
    latent = torch.zeros(1, 8, 1, height // 8, width // 8, device=device)
    vae.encoder = _Looking(latent)
    config = SimpleNamespace(expand_timesteps=False)
    pipe = SimpleNamespace(vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, config=config)
    image = torch.randn(1, 3, height, width, device=device)

    def prepare() -> Any:
        method = WanImageToVideoPipeline.prepare_latents
        noise = latent[:, :4].expand(-1, -1, (frames - 1) // 4 + 1, -1, -1)
        return method(pipe, image, 1, 4, height, width, frames, torch.float32, device, None, noise)

    def runs_only_library_code_inside(encoder: Any) -> bool:
        return runs_only_library_code(real)  # ignores `_Looking`, but stays part of the timed work

    stock, patched = _both(prepare, "conditioning")

    def patched_unseen() -> Any:
        with mock.patch.object(conditioning, "runs_only_library_code", runs_only_library_code_inside):
            return patched()

    return stock, patched_unseen


class _Looking(torch.nn.Module):
    def __init__(self, latent: torch.Tensor) -> None:
        super().__init__()
        self._latent = latent

    def forward(self, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
        return self._latent + x.amax()


def _build(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    vae: Any = (AutoencoderKLQwenImage if _is_qwen_image(config) else AutoencoderKLWan)(**config)
    return vae.to(device=device, dtype=dtype).eval()


def _is_qwen_image(config: dict[str, Any]) -> bool:
    return "input_channels" in config


def _both(call: Callable[[], Any], *names: str) -> tuple[ops.Call, ops.Call]:
    def patched() -> Any:
        with wan_patches.enabled(names or ("vae",)):
            return call()

    return call, patched
