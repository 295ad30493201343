"""The condition mask against the pipelines of the installed diffusers."""

from __future__ import annotations

import types

import pytest
import torch

import wan_patches
from wan_patches.ops.conditioning import (
    ConditionVideo,
    condition_mask,
    in_latent_frames,
    sorted_by_validity,
    valid_first,
)

pytestmark = pytest.mark.upstream


@pytest.mark.parametrize("temporal", [1, 2, 4, 8])
@pytest.mark.parametrize("last_frame", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_mask_in_latent_frames_equals_mask_in_pixel_frames(temporal, last_frame, batch):
    for latent_frames in (1, 2, 3, 21):
        args = (batch, (latent_frames - 1) * temporal + 1, 3, 5, temporal, torch.device("cpu"), last_frame)
        expected = condition_mask.reference(*args)
        for make in (in_latent_frames, condition_mask):
            actual = make(*args)
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


class _Vae(torch.nn.Module):
    """As much of a VAE as `prepare_latents` asks for."""

    dtype, device = torch.float32, torch.device("cpu")
    config = type("Config", (), {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "z_dim": 4})

    def encode(self, video):
        frames = (video.shape[2] - 1) // 4 + 1
        latents = torch.arange(4.0 * frames * 6 * 8).view(1, 4, frames, 6, 8) / 7
        latents = latents.expand(video.shape[0], -1, -1, -1, -1)
        return type("Output", (), {"latents": latents})


def _pipelines():
    import diffusers

    names = ("WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline", "ChronoEditPipeline")
    return [getattr(diffusers, name) for name in names if hasattr(diffusers, name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 5, 9, 81])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_prepare_latents_is_bit_identical_to_stock(dtype, frames, last, batch):
    for pipeline in _pipelines():
        if last and (frames == 1 or pipeline.__name__ == "ChronoEditPipeline"):
            continue
        pipe = object.__new__(pipeline)
        pipe.__dict__.update(vae=_Vae(), vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
        pipe.__dict__["_internal_dict"] = type("Config", (dict,), {"expand_timesteps": False})()
        generators = {1: torch.Generator, 2: lambda: [torch.Generator(), torch.Generator()]}[batch]

        def run(pipe=pipe, generators=generators):
            made = generators()
            for generator in made if isinstance(made, list) else [made]:
                generator.manual_seed(0)
            image = torch.ones(1, 3, 48, 64)
            extra = {"last_image": image} if last else {}
            return pipe.prepare_latents(image, batch, 4, 48, 64, frames, dtype, torch.device("cpu"), made, **extra)

        stock = run()
        with wan_patches.enabled(["conditioning"]) as status:
            assert not status.skipped()
            patched = run()
        for a, b in zip(stock, patched):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
        assert stock[1].dtype == torch.float32  # stock's mask is, and the concatenation with it


def test_frames_that_do_not_fit_raise_as_in_stock():
    pipe = object.__new__(_pipelines()[0])
    pipe.__dict__.update(vae=_Vae(), vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    pipe.__dict__["_internal_dict"] = type("Config", (dict,), {"expand_timesteps": False})()
    call = (torch.ones(1, 3, 48, 64), 1, 4, 48, 64, 7, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError) as stock:
        pipe.prepare_latents(*call)
    with wan_patches.enabled(), pytest.raises(RuntimeError) as patched:
        pipe.prepare_latents(*call)
    assert str(patched.value) == str(stock.value)


@pytest.mark.parametrize("last", [False, True])
def test_modular_steps_are_bit_identical_to_stock(last):
    encoders = pytest.importorskip("diffusers.modular_pipelines.wan.encoders")
    name = "WanPrepareFirstLastFrameLatentsStep" if last else "WanPrepareFirstFrameLatentsStep"
    if not hasattr(encoders, name):
        encoders = pytest.importorskip("diffusers.modular_pipelines.wan.before_denoise")
    if not hasattr(encoders, name):
        pytest.skip("this diffusers has no such step")
    step = getattr(encoders, name)()
    components = type("Components", (), {"vae_scale_factor_temporal": 4})()
    for dtype in (torch.float32, torch.bfloat16):
        latents = torch.randn(2, 4, 6, 5, 7).to(dtype)

        def run(latents=latents):
            given = f"first_{'last_' * last}frame_latents"
            state = types.SimpleNamespace(**{"num_frames": 21, given: latents})
            step.__dict__.update(get_block_state=lambda _: state, set_block_state=lambda *_: None)
            step(components, state)
            return vars(state).get("image_condition_latents", vars(state)[given])  # 0.36 overwrites its input

        stock = run()
        with wan_patches.enabled(["conditioning"]) as status:
            assert not status.skipped()
            patched = run()
        assert stock.dtype == patched.dtype
        assert stock.stride() == patched.stride()
        assert torch.equal(stock, patched)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("zeros", [0, 1, 3, 8])
def test_condition_video_slices_equal_those_of_the_built_video(last, zeros):
    pictures = torch.randn(2, 2, 3, 1, 4, 5)
    first, final = pictures[0].transpose(3, 4).contiguous().transpose(3, 4), pictures[1] if last else None
    built = torch.cat([first, first.new_zeros(2, 3, zeros, 4, 5), *([final] if last else [])], dim=2).bfloat16()
    video = ConditionVideo(first, zeros, final).to(device="cpu", dtype=torch.bfloat16)
    assert video.shape == built.shape
    assert video.dtype == built.dtype
    assert video.device == built.device
    every = slice(None)
    for start in range(0, built.shape[2]):
        for end in range(start + 1, built.shape[2] + 3):
            for area in ((every, every), (slice(1, 3), slice(2, 9))):
                key = (every, every, slice(start, end), *area)
                assert torch.equal(video[key], built[key])
                assert video[key].is_contiguous()
    parts = video.split(1)
    assert len(parts) == 2
    assert all(torch.equal(part[(every,) * 5], cut) for part, cut in zip(parts, built.split(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_sorted_tokens_equal_indexed_ones(dtype, share, batch):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 300, 16, generator=generator).to(dtype)
    valid = torch.rand(batch, 300, generator=generator) < share
    lengths = [int(n) for n in valid.sum(1)]
    assert batch == 1 or share != 0.4 or len(set(lengths)) > 1
    expected = valid_first.reference(tokens, valid)
    actual = sorted_by_validity(tokens, valid)
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(actual, expected))
    assert [int(n) for n in actual[1].int().cumprod(1).sum(1)] == lengths


def test_masks_that_are_no_bools_index_as_in_stock():
    tokens, valid = torch.randn(1, 2, 4), torch.tensor([[1, 0]])
    assert sorted_by_validity.why_not(tokens, valid) is not None
