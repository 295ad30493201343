"""Patches that come and go in the middle of a call: what one function leaves, patched or not, all others understand."""

from __future__ import annotations

import pytest
import torch

from wan_patches.bench.models import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]


def generation(family):
    pipe = FAMILIES[family].build()
    pipe.set_progress_bar_config(disable=True)
    return lambda: torch.as_tensor(pipe(**FAMILIES[family].inputs()).frames)


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", available())
def test_generations_have_the_bits_of_stock(family, rounds, toggled):
    run = generation(family)
    stock = run()
    for seed, video in enumerate(toggled(run, range(rounds))):
        assert torch.equal(video, stock), seed


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in available() if name in ("wan22_ti2v", "helios")])
def test_close_patches_come_and_go_too(family, rounds, toggled):
    run = generation(family)
    stock = run()
    for seed, video in enumerate(toggled(run, range(rounds), fidelity="close")):
        torch.testing.assert_close(video, stock, rtol=1e-3, atol=1e-3, msg=str(seed))


def autoencoder(kind):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    small = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    patched = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    config = {"divided": {}, "residual": {**small, **patched}}.get(kind, small)  # published channels are divided
    vae = AutoencoderKLWan(**config).eval()
    vae.use_slicing = kind == "sliced"
    if kind == "tiled":
        sizes = {"min": 32, "stride": 24}
        sides = "height", "width"
        vae.enable_tiling(**{f"tile_sample_{what}_{side}": sizes[what] for what in sizes for side in sides})
    return vae


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sliced", "tiled", "residual", "divided"])
@torch.no_grad()
def test_autoencoders_have_the_bits_of_stock(kind, rounds, toggled):
    vae = autoencoder(kind)
    generator = torch.Generator().manual_seed(1)
    batch, frames, height, width = (1, 2, 15, 6) if kind == "divided" else (2, 3, 6, 7)
    latents = torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)

    def run():
        video = vae.decode(latents).sample
        return torch.cat((video.flatten(), vae.encode(video).latent_dist.parameters.flatten()))

    stock = run()
    for seed, found in enumerate(toggled(run, range(rounds))):
        assert torch.equal(found, stock), seed
