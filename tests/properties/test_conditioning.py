"""Condition mask and condition video of image-to-video, through the functions of the installed diffusers."""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass

import diffusers
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import HALVES_AND_FLOAT, Drawn, amounts, assert_same, hunt, outcome, patched, seeds, tensors

from wan_patches.ops.conditioning import ConditionVideo

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")


# The mask alone: modular steps


@dataclass(frozen=True)
class Masked:
    latents: Drawn
    frames: int
    temporal: int


@st.composite
def masked(draw: st.DrawFn) -> Masked:
    temporal = draw(st.sampled_from((1, 2, 3, 4, 4, 8)))
    fitting = st.integers(0, 10).map(lambda n: 1 + n * temporal)
    frames = draw(st.one_of(fitting, fitting, st.integers(-5, 20)))
    latent_frames = max(0, draw(st.sampled_from((0, 0, 0, 0, 1))) + (frames - 1) // temporal + 1)
    batch, height, width = draw(st.tuples(*[st.sampled_from((0, 1, 1, 2, 3, 7))] * 3))
    return Masked(draw(tensors((batch, 4, latent_frames, height, width))), frames, temporal)


@amounts()
def test_modular_steps_have_the_bits_of_stock(examples):
    with patched("conditioning") as places:
        steps = {p.target.qualname: p for p in places if ".modular_pipelines." in p.patch.module}
        if not steps:
            pytest.skip("this diffusers has none")

        def run(function, place, case):
            step = object.__new__(getattr(sys.modules[place.patch.module], place.target.qualname.split(".")[0]))
            latents = case.latents.make()
            state = types.SimpleNamespace(
                num_frames=case.frames, first_frame_latents=latents, first_last_frame_latents=latents
            )
            step.__dict__.update(get_block_state=lambda _: state, set_block_state=lambda *_: None)
            function(step, types.SimpleNamespace(vae_scale_factor_temporal=case.temporal), state)
            return [value for value in vars(state).values() if isinstance(value, torch.Tensor)]

        @given(st.sampled_from(sorted(steps)), masked())
        @example(min(steps), Masked(Drawn.plain((1, 4, 0, 2, 2)), frames=0, temporal=1))
        @example(min(steps), Masked(Drawn.plain((1, 4, 0, 2, 2)), frames=-1, temporal=1))
        def check(step, case):
            place = steps[step]
            results = [outcome(lambda f=f: run(f, place, case)) for f in (place.function, place.stock)]
            # a mask of one channel and one pixel is in any order in memory, and so may be what it is joined to
            assert_same(*results, strides=case.temporal > 1)

        hunt(check, examples)


# Mask and video: the pipelines' own function, with a small autoencoder


@functools.cache
def _vae(dtype: torch.dtype) -> diffusers.AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            base_dim=2, z_dim=2, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2], latents_std=[1.5, 0.7], scale_factor_spatial=4,
        )  # fmt: skip
    return torch.nn.Module.to(vae.eval().requires_grad_(False), dtype)  # not by its own, which warns


@dataclass(frozen=True)
class Prepared:
    """The arguments of one `prepare_latents`."""

    image: Drawn
    last: Drawn | None
    batch: int
    size: tuple[int, int]
    frames: int
    temporal: int
    dtype: torch.dtype
    vae_dtype: torch.dtype
    generators: int | None  # how many in a list; None for one alone
    tiled: bool
    seed: int


@st.composite
def prepared(draw: st.DrawFn, takes_last: bool) -> Prepared:
    width, height = draw(st.tuples(*[st.sampled_from((4, 8, 12, 16, 7))] * 2))
    batch = draw(st.integers(1, 3))
    images = draw(st.sampled_from((1, 1, 1, batch, 2)))
    other = draw(st.sampled_from((0, 0, 0, 0, 0, 0, 4)))  # a size that does not fit must fail as in stock
    shape = (images, 3, height + other, width)
    return Prepared(
        draw(tensors(shape)),
        draw(st.one_of(st.none(), tensors((images, 3, height, width)))) if takes_last else None,
        batch,
        (height, width),
        draw(st.one_of(st.integers(0, 4).map(lambda n: 1 + 4 * n), st.integers(-2, 10))),
        draw(st.sampled_from((4, 4, 4, 2))),
        draw(st.sampled_from(HALVES_AND_FLOAT)),
        draw(st.sampled_from(HALVES_AND_FLOAT)),
        draw(st.sampled_from((None, None, batch, 2))),
        draw(st.booleans()),
        draw(seeds),
    )


@torch.no_grad()
def _prepare(function, place, case: Prepared):
    cls = getattr(sys.modules[place.patch.module], place.target.qualname.split(".")[0])
    pipe, vae = object.__new__(cls), _vae(case.vae_dtype)
    vae.use_tiling = False
    if case.tiled:
        vae.enable_tiling(8, 8, 4, 8)
    pipe.__dict__.update(vae=vae, vae_scale_factor_temporal=case.temporal, vae_scale_factor_spatial=4)
    pipe.__dict__["_internal_dict"] = type("Config", (dict,), {"expand_timesteps": False})()
    generators = [torch.Generator().manual_seed(case.seed + n) for n in range(case.generators or 1)]
    extra = {} if case.last is None else {"last_image": case.last.make()}
    return function(
        pipe, case.image.make(), case.batch, 2, *case.size, case.frames, case.dtype, CPU,
        generators if case.generators else generators[0], **extra,
    )  # fmt: skip


@amounts(40, 2000)
@pytest.mark.parametrize("takes_last", [False, True], ids=["first frame", "first and last frame"])
def test_prepared_latents_have_the_bits_of_stock(takes_last, examples, monkeypatch):
    cut, original = [], ConditionVideo.__getitem__
    monkeypatch.setattr(ConditionVideo, "__getitem__", lambda *args: cut.append(1) or original(*args))
    with patched("conditioning") as places:
        pipelines = {
            place.target.qualname: place
            for place in places
            if place.target.qualname.endswith(".prepare_latents")
            and ("last_image" in place.stock.__code__.co_varnames) is takes_last
        }

        @given(st.sampled_from(sorted(pipelines)), prepared(takes_last))
        def check(pipeline, case):
            place = pipelines[pipeline]
            results = [outcome(lambda f=f: _prepare(f, place, case)) for f in (place.function, place.stock)]
            assert_same(*results)

        hunt(check, examples)
    assert cut
