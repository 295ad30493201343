"""Every family, whole pipelines: stock diffusers against the same diffusers patched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.patching.fidelity import Fidelity
from wan_patches.testing.families import FAMILIES, available

# tiny models take the way of large ones
pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]


def _frames(pipe, name, **more):
    torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
    video = pipe(**FAMILIES[name].inputs(**more)).frames
    if isinstance(video, list):  # of lists of PIL images
        video = np.stack([np.stack([np.asarray(frame) for frame in batch]) for batch in video])
    return video


def _compare(name, *, dtype=torch.float32, vae_dtype=torch.float32, head_dim=32, fuse=False, vae=None, **more):
    pipe = FAMILIES[name].build(dtype=dtype, vae_dtype=vae_dtype, head_dim=head_dim, vae=vae or {})
    pipe.set_progress_bar_config(disable=True)
    if fuse:
        for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if model is not None:
                model.fuse_qkv_projections()
    try:
        stock = _frames(pipe, name, **more)
    except RuntimeError as error:
        pytest.skip(f"stock itself fails: {error}")  # half precision, in some older versions
    with wan_patches.enabled() as status:
        patched = _frames(pipe, name, **more)
        skipped = [r for r in wan_patches.status().skipped() if "as complex numbers" not in r.reason]
        assert not skipped, wan_patches.status()
    assert {r.name for r in status.reports if r.state == "active"} >= {"frames"}
    assert np.isfinite(stock).all()
    assert stock.std() > 0
    assert stock.dtype == patched.dtype
    assert stock.strides == patched.strides
    assert np.array_equal(stock, patched)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_final_videos_are_bit_identical(name, dtype):
    _compare(name, dtype=dtype)


@pytest.mark.parametrize("name", [n for n in ("wan_t2v", "wan22_i2v", "helios") if n in available()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_half_precision_decoders(name, dtype, output_type):
    _compare(name, dtype=dtype, vae_dtype=dtype, output_type=output_type)


FROM_PICTURES = ("wan22_i2v", "helios_v2v")


@pytest.mark.parametrize(
    "name", [n if n in FROM_PICTURES else pytest.param(n, marks=pytest.mark.slow) for n in available()]
)
@pytest.mark.parametrize("vae_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_autoencoders_with_the_published_channels(name, vae_dtype):
    """Their convolutions take ways that depend on the layout, which pictures have another of."""
    _compare(name, dtype=torch.bfloat16, vae_dtype=vae_dtype, vae={"base_dim": 96})


@pytest.mark.parametrize("name", available())
def test_final_pil_frames_are_bit_identical(name):
    _compare(name, output_type="pil")


@pytest.mark.parametrize("name", [n for n in ("wan_t2v", "wan22_i2v", "helios") if n in available()])
@pytest.mark.parametrize(
    "more",
    [
        {"guidance_scale": 1.0},
        {"prompt": ["a fox", "a hare"], "negative_prompt": ["", ""]},
        {"frames": 5, "size": (64, 48)},
    ],
    ids=["no guidance", "batch 2", "other shape"],
)
def test_guidance_batch_and_shape(name, more):
    _compare(name, **more)


@pytest.mark.parametrize("name", [n for n in ("wan22_i2v", "wan21_flf2v", "skyreels_v2_i2v") if n in available()])
def test_generator_lists(name):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    pipe = FAMILIES[name].build()
    inputs = {"prompt": ["a fox", "a hare"], "negative_prompt": ["", ""]}
    stock = _frames(pipe, name, generator=generators(), **inputs)
    with wan_patches.enabled():
        patched = _frames(pipe, name, generator=generators(), **inputs)
    assert np.array_equal(stock, patched)


_LARGE = ("wan_t2v", "wan_vace", "wan_animate", "skyreels_v2_t2v", "chronoedit", "sana_video", "helios")


@pytest.mark.parametrize("name", [n for n in _LARGE if n in available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_long_enough_for_the_fast_rotary_embedding(name, dtype, monkeypatch):
    from wan_patches.ops import rope

    calls, fast = [], rope.complex_rows.function
    monkeypatch.setattr(rope.complex_rows, "function", lambda *args: calls.append(1) or fast(*args))
    _compare(name, dtype=dtype, head_dim=128, size=(192, 96), steps=1)
    if not (name.startswith("skyreels") and _is_complex(name)):
        assert calls


def _is_complex(name):
    """Whether this diffusers keeps the family's rotary tables as complex numbers, which stay stock."""
    with wan_patches.enabled(["rope"]) as status:
        return any("complex" in r.reason for r in status.of("rope"))


@pytest.mark.parametrize("head_dim", [12, 44, 128])
def test_head_sizes(head_dim):
    _compare("wan_t2v", head_dim=head_dim)
    _compare("wan_t2v", head_dim=head_dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [n for n in ("wan_t2v", "helios") if n in available()])
def test_fused_projections(name):
    pipe = FAMILIES[name].build()
    if not hasattr(pipe.transformer, "fuse_qkv_projections"):
        pytest.skip("this version cannot fuse them")
    _compare(name, fuse=True)


@pytest.mark.parametrize("fidelity", list(Fidelity))
@pytest.mark.parametrize("name", available())
def test_every_patch_of_the_family_is_active(name, fidelity):
    pipe = FAMILIES[name].build()
    modules = {type(part).__module__ for part in [pipe, *pipe.components.values()]}
    for report in wan_patches.enable(fidelity=fidelity).reports:
        if report.module in modules and fidelity.allows(report.fidelity) and "as complex" not in report.reason:
            assert report.state == "active" or report.reason == "a close form is in its place", report
