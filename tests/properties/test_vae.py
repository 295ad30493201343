"""The autoencoder as a whole, small and of many makes, against the installed one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, Drawn, amounts, assert_same, hunt, outcome, patched, tensors

import wan_patches
from wan_patches.ops.vae import FrameCaches

AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

RESIDUAL = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
MAKES = (
    {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1},  # four levels, as the published ones have
    {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]},
    {"base_dim": 4, "z_dim": 1, "dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1},
    {"base_dim": 4, "z_dim": 2, "dim_mult": [2, 1], "temperal_downsample": [False], "num_res_blocks": 1},
    {"base_dim": 6, "z_dim": 3, "dim_mult": [1, 1, 2], "temperal_downsample": [False, True], "decoder_base_dim": 4},
    {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "decoder_base_dim": 12, **RESIDUAL},
    {"base_dim": 4, "z_dim": 2, "dim_mult": [2, 2], "temperal_downsample": [True], "num_res_blocks": 1, **RESIDUAL},
)


@functools.cache
def _vae(make: int, dtype: torch.dtype, channels_last: bool) -> torch.nn.Module:
    config = MAKES[make]
    scale = 2 ** (len(config.get("dim_mult", [1] * 4)) - 1) * config.get("patch_size", 1)
    statistics = {"latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(make)
        vae = AutoencoderKLWan(**config, **statistics, scale_factor_spatial=scale)
        for parameter in vae.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    vae = torch.nn.Module.to(vae.eval().requires_grad_(False), dtype)  # not by its own, which warns
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in vae.parameters() if channels_last else ():
        if weight.dim() in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.dim()])
    return vae


@dataclass(frozen=True)
class Pass:
    """A video or latents, and the autoencoder that they go through."""

    make: int
    x: Drawn
    channels_last: bool  # the weights
    slicing: bool
    tiles: tuple[int, int, int, int] | None
    grad: bool


_sometimes = st.sampled_from((False, False, False, True))


@st.composite
def passes(draw: st.DrawFn, encode: bool) -> Pass:
    make = draw(st.sampled_from(range(len(MAKES))))
    channels = 3 if encode else MAKES[make]["z_dim"]
    channels += draw(st.sampled_from((0,) * 15 + (1,)))  # what does not fit must fail as in stock
    batch, frames = draw(st.sampled_from((1, 1, 1, 2, 0))), draw(st.integers(0, 10 if encode else 4))
    side = st.one_of(st.integers(0, 3), st.integers(1, 6))
    if encode:
        side = st.one_of(side.map(lambda n: 16 * n // 2), st.integers(1, 50))
    x = draw(tensors((batch, channels, frames, draw(side), draw(side)), (torch.float32, *FLOATS)))
    tiles = draw(st.one_of(st.none(), st.none(), st.tuples(*[st.sampled_from((8, 16, 24, 32, 48))] * 4)))
    grad = draw(st.sampled_from((False,) * 15 + (True,)))
    return Pass(make, x, draw(_sometimes), draw(_sometimes), tiles, grad)


def _plain(x: Drawn) -> Pass:
    return Pass(0, x, channels_last=False, slicing=False, tiles=None, grad=False)


@amounts(40, 2000)
@pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])
def test_autoencoders_have_the_bits_of_stock(encode, examples, monkeypatch):
    taken, original = [], FrameCaches.convolve
    monkeypatch.setattr(FrameCaches, "convolve", lambda *a, **more: taken.append(1) or original(*a, **more))

    @given(passes(encode))
    @example(_plain(Drawn.plain((1, 3 if encode else 4, 2, 8, 8), torch.float64)))  # stock upsamples it in fp32
    @example(_plain(Drawn.plain((1, 3 if encode else 4, 1, 0, 0))))
    def check(case):
        vae = _vae(case.make, case.x.dtype, case.channels_last)
        vae.use_slicing, vae.use_tiling = case.slicing, case.tiles is not None
        if case.tiles:
            vae.enable_tiling(*case.tiles)

        def run():
            with torch.set_grad_enabled(case.grad):
                x = case.x.make()
                return vae.encode(x).latent_dist.parameters if encode else vae.decode(x).sample

        with wan_patches.enabled([]):
            stock = outcome(run)
        ours = outcome(run)
        if isinstance(stock, Exception):  # of the same kind; where in the network it is met is another matter
            assert type(ours) is type(stock), repr(ours)
        else:
            assert_same(ours, stock, strides=not case.channels_last)

    with patched("vae"):
        hunt(check, examples)
    assert taken
