"""The inputs of rotary tables, on a CPU treated as an accelerator, against the installed code."""

from __future__ import annotations

import importlib

import pytest
import torch

import wan_patches
from wan_patches.bindings import rotary_tables
from wan_patches.ops import step_loop as ops
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

NAMES = [name for name in ("chronoedit", "chronoedit_reasoning", "helios", "helios_pyramid") if name in available()]


@pytest.fixture
def fast(monkeypatch):
    """A CPU taken for an accelerator by this patch, and what it did."""
    done = []
    step_loop = importlib.import_module("wan_patches.bindings.step_loop")
    monkeypatch.setattr(step_loop, "is_accelerator", lambda device: True)
    monkeypatch.setattr(rotary_tables, "is_accelerator", lambda device: True)
    upload = ops.on_device
    monkeypatch.setattr(ops, "on_device", lambda *args: done.append("upload") or upload(*args))
    stack = torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda tensors, *more, **others: done.append("ends") or stack(tensors, *more, **others)
    )
    return done


def same(a, b):
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    return all(torch.equal(x, y) and (x.dtype, x.stride()) == (y.dtype, y.stride()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_videos_are_bit_identical(name, fast):
    pipe, family = FAMILIES[name].build(), FAMILIES[name]
    stock = pipe(**family.inputs(output_type="latent")).frames
    fast.clear()
    with wan_patches.enabled(["rotary_tables"]):
        assert torch.equal(pipe(**family.inputs(output_type="latent")).frames, stock)
    assert ("upload" if name.startswith("helios") else "ends") in fast or name == "chronoedit"


@pytest.mark.skipif("chronoedit" not in available(), reason="this version has no ChronoEdit")
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("skip", [0, 1, 2, 8])
def test_the_two_ends_of_a_video(frames, skip, fast):
    from diffusers.models.transformers.transformer_chronoedit import ChronoEditRotaryPosEmbed

    rope = ChronoEditRotaryPosEmbed(32, (1, 2, 2), 32, temporal_skip_len=skip)
    latents = torch.empty(1, 4, frames, 4, 6)
    if frames == 2 and skip == 0:
        with pytest.raises(IndexError) as stock:
            rope(latents)
        with wan_patches.enabled(["rotary_tables"]), pytest.raises(IndexError) as patched:
            rope(latents)
        assert str(patched.value) == str(stock.value)
        return
    stock = rope(latents)
    with wan_patches.enabled(["rotary_tables"]):
        assert same(rope(latents), stock)
    assert ("ends" in fast) is (frames == 2)


@pytest.mark.skipif("helios" not in available(), reason="this version has no Helios")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_frame_indices_are_uploaded_once_per_values(dtype, fast):
    from diffusers.models.transformers.transformer_helios import HeliosRotaryPosEmbed

    rope, device = HeliosRotaryPosEmbed((12, 10, 10), 10000.0), torch.device("cpu")
    for values in ([[0, 1, 2]], [[0, 1, 2]], [[5, 1, 2], [7, 2**24 + 1, 3]]):
        indices = torch.tensor(values).to(dtype)
        stock = rope(indices, 4, 6, device)
        with wan_patches.enabled(["rotary_tables"]):
            assert same(rope(indices, 4, 6, device), stock)
        indices += 1
        stock = rope(indices, 4, 6, device)
        with wan_patches.enabled(["rotary_tables"]):
            assert same(rope(indices, 4, 6, device), stock)
    assert ("upload" in fast) is (dtype != torch.int32)
