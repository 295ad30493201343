"""Patches that come and go in the middle of a call: what one function leaves, patched or not, all others understand."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import wan_patches
from wan_patches.bench.models import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]


def calls_of_diffusers(then: Any) -> Any:
    """A profile function that calls `then` before the body of each function of diffusers."""

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and "/diffusers/" in frame.f_code.co_filename:
            sys.setprofile(None)
            then()
            sys.setprofile(profile)

    return profile


@contextlib.contextmanager
def at_calls(then: Any) -> Iterator[None]:
    sys.setprofile(calls_of_diffusers(then))
    try:
        yield
    finally:
        sys.setprofile(None)


def toggled(run: Any, calls: int, pick: random.Random, **options: Any) -> torch.Tensor:
    """What `run` gives while patches come or go at a few of its calls; `options` are those of `enable`."""
    points = set(pick.sample(range(calls), min(calls, pick.choice((1, 2, 6, 20)))))
    nth, on = 0, pick.random() < 0.5

    def switch() -> None:
        wan_patches.enable(**options) if on else wan_patches.disable()

    def call() -> None:
        nonlocal nth, on
        nth += 1
        if nth in points:
            on = not on
            switch()

    switch()
    try:
        with at_calls(call):
            return run()
    finally:
        wan_patches.disable()


def counted(run: Any) -> int:
    """How many functions of diffusers `run` calls."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    with at_calls(count):
        run()
    return calls


def generation(family: str) -> tuple[Any, torch.Tensor, int]:
    """A run, what stock gives, and how many functions of diffusers it calls."""
    pipe = FAMILIES[family].build()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe(**FAMILIES[family].inputs()).frames)

    return run, run(), counted(run)


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", available())
def test_generations_have_the_bits_of_stock_all_the_same(family, rounds):
    run, stock, calls = generation(family)
    for seed in range(rounds):
        assert torch.equal(toggled(run, calls, random.Random(seed)), stock), seed


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in available() if name in ("wan22_ti2v", "helios")])
def test_close_patches_come_and_go_too(family, rounds):
    run, stock, calls = generation(family)
    for seed in range(rounds):
        video = toggled(run, calls, random.Random(seed), fidelity="close")
        torch.testing.assert_close(video, stock, rtol=1e-3, atol=1e-3, msg=str(seed))


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sliced", "tiled", "residual", "divided"])
@torch.no_grad()
def test_autoencoders_have_the_bits_of_stock_all_the_same(kind, rounds):
    vae = autoencoder(kind)
    generator = torch.Generator().manual_seed(1)
    batch, frames, height, width = (1, 2, 15, 6) if kind == "divided" else (2, 3, 6, 7)
    latents = torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)

    def run() -> torch.Tensor:
        video = vae.decode(latents).sample
        return torch.cat((video.flatten(), vae.encode(video).latent_dist.parameters.flatten()))

    stock, calls = run(), counted(run)
    for seed in range(rounds):
        assert torch.equal(toggled(run, calls, random.Random(seed)), stock), seed


def autoencoder(kind: str) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    small = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    patched = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    config = {"divided": {}, "residual": {**small, **patched}}.get(kind, small)  # published channels are divided
    vae = AutoencoderKLWan(**config).eval()
    vae.use_slicing = kind == "sliced"
    if kind == "tiled":
        vae.enable_tiling(
            tile_sample_min_height=32,
            tile_sample_min_width=32,
            tile_sample_stride_height=24,
            tile_sample_stride_width=24,
        )
    return vae
