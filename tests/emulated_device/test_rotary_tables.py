"""Rotary tables on an accelerator: made anew in every forward, without a wait for what they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.npu_emulated

STEPS = 4
#: What stock uploads in each forward for its tables: the two ends of the video twice, indices of four parts.
UPLOADS = {"chronoedit": 2, "helios": 4}
NAMES = [name for name in UPLOADS if name in available()]


def run(pipe: Any, name: str, device: Any) -> tuple[np.ndarray, int, int]:
    """The frames, how many copies to the device there were, and how often the host waited."""
    device.reset()
    frames = pipe(**FAMILIES[name].inputs(steps=STEPS)).frames
    assert np.isfinite(frames).all()
    return frames, device.uploads().total(), device.waits().total()


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_and_neither_uploads_nor_waits_for_tables(name, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16).to("npu")
    forwards: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    stock, uploads, waits = run(pipe, name, device)
    hook.remove()
    assert len(forwards) >= 2 * STEPS
    saved = UPLOADS[name] * len(forwards)
    with wan_patches.enabled(["rotary_tables"]):
        first = run(pipe, name, device)
        again = run(pipe, name, device)
    assert np.array_equal(stock, first[0])
    assert np.array_equal(stock, again[0])
    assert again[1:] == (uploads - saved, waits - saved)
    once = UPLOADS[name] * (name == "helios")  # what is uploaded once for its values
    assert first[1:] == (uploads - saved + once, waits - saved + once)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload_has_the_bits_of_stock(name, how, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16)
    getattr(pipe, how)(device="npu")
    stock = run(pipe, name, device)[0]
    with wan_patches.enabled(["rotary_tables"]):
        for _ in range(2):
            assert np.array_equal(stock, run(pipe, name, device)[0])


@pytest.mark.parametrize("name", NAMES)
def test_writes_through_data_are_seen(name, device):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16).to("npu")

    def written():
        for buffer in pipe.transformer.rope.buffers():
            buffer.data.mul_(0.5)
        found = run(pipe, name, device)[0]
        for buffer in pipe.transformer.rope.buffers():
            buffer.data.mul_(2)
        return found

    stock = written()
    with wan_patches.enabled(["rotary_tables"]):
        assert not np.array_equal(stock, run(pipe, name, device)[0])
        assert np.array_equal(stock, written())
