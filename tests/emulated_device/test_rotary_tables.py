"""Rotary tables on an accelerator: kept there, no longer than the model is, and no more waits for their indices."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.bench.models import FAMILIES, available
from wan_patches.ops import rotary_tables

pytestmark = pytest.mark.npu_emulated

STEPS = 4
#: What stock uploads in each forward for its tables: none, the two ends of the video twice, indices of four parts.
UPLOADS = {"wan_t2v": 0, "chronoedit": 2, "helios": 4}
NAMES = [name for name in UPLOADS if name in available()]


def run(pipe: Any, name: str, device: Any) -> tuple[np.ndarray, int, int]:
    """The frames, how many copies to the device there were, and how often the host waited."""
    device.reset()
    frames = pipe(**FAMILIES[name].inputs(steps=STEPS)).frames
    assert np.isfinite(frames).all()
    return frames, device.uploads().total(), device.waits().total()


def tables_on_the_device() -> int:
    """How many tables are kept there."""
    gc.collect()
    kept = [entry for memory in rotary_tables._memories.values() for entry in memory.entries.values() if entry]
    return sum(table.device.type == "npu" for entry in kept for table in entry._all)


def helios_is_kept() -> bool:
    """Not so with diffusers 0.37, whose own cache would keep the tables when the model is gone."""
    from diffusers.models.transformers import transformer_helios

    return not hasattr(transformer_helios.HeliosRotaryPosEmbed._get_spatial_meshgrid.__wrapped__, "cache_info")


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_and_neither_uploads_nor_waits_for_tables(name, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16).to("npu")
    forwards: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    stock, uploads, waits = run(pipe, name, device)
    hook.remove()
    assert len(forwards) >= 2 * STEPS
    saved = UPLOADS[name] * len(forwards) * (name != "helios" or helios_is_kept())
    with wan_patches.enabled(["rotary_tables"]):
        first = run(pipe, name, device)
        again = run(pipe, name, device)
    assert np.array_equal(stock, first[0])
    assert np.array_equal(stock, again[0])
    assert again[1:] == (uploads - saved, waits - saved)
    assert first[1:] == (uploads - saved + 2 * UPLOADS[name], waits - saved + 2 * UPLOADS[name]) or not saved


@pytest.mark.parametrize("name", NAMES)
def test_tables_leave_the_device_with_their_model(name, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16).to("npu")
    before = tables_on_the_device()
    with wan_patches.enabled(["rotary_tables"]):
        stock = run(pipe, name, device)[0]
        assert tables_on_the_device() > before or (name == "helios" and not helios_is_kept())
        pipe.to("cpu")
        assert tables_on_the_device() == before
        pipe.to("npu")
        assert np.array_equal(stock, run(pipe, name, device)[0])
    model = weakref.ref(pipe.transformer)
    del pipe
    assert tables_on_the_device() == before
    assert model() is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload_has_the_bits_of_stock_and_leaves_no_tables_behind(name, how, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16)
    getattr(pipe, how)(device="npu")
    stock = run(pipe, name, device)[0]
    before = tables_on_the_device()
    with wan_patches.enabled(["rotary_tables"]):
        for _ in range(2):
            assert np.array_equal(stock, run(pipe, name, device)[0])
            pipe.maybe_free_model_hooks()
            if how == "enable_model_cpu_offload":  # the other leaves buffers where they are used
                assert tables_on_the_device() == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["block_level", "leaf_level"])
def test_group_offload_has_the_bits_of_stock_and_few_tables(name, by, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16)
    if not hasattr(pipe.transformer, "enable_group_offload"):
        pytest.skip("this version has none")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part is not pipe.transformer:
            part.to("npu")
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("npu"), offload_device=torch.device("cpu"), offload_type=by, num_blocks_per_group=1
    )
    stock = run(pipe, name, device)[0]
    before = tables_on_the_device()
    with wan_patches.enabled(["rotary_tables"]):
        for _ in range(3):
            assert np.array_equal(stock, run(pipe, name, device)[0])
        assert tables_on_the_device() <= before + 2
