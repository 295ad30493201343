"""Frames from an accelerator to memory that is given: one copy, and the gate before it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor

import wan_patches
from wan_patches.bindings.output_buffers import OutputBuffers, writing_to
from wan_patches.ops import frames

pytestmark = pytest.mark.npu_emulated


@pytest.fixture
def memory() -> list[np.ndarray]:
    return []


@pytest.fixture
def to(memory: list[np.ndarray]) -> OutputBuffers:
    def empty_strided(shape, stride, dtype):
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
        memory.append(tensor.numpy())
        return tensor

    return OutputBuffers(empty_strided, PIL.Image.fromarray)


@pytest.fixture
def ends(monkeypatch):
    """Where the copies that end in host memory end."""
    found, copy = [], torch.Tensor.copy_

    def noted(self, *args, **kwargs):
        if self.is_cpu:
            found.append(self.data_ptr())
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    return found


def as_array(found):
    return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in found])


@pytest.mark.parametrize(("output_type", "size"), [("np", 4), ("pil", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_from_the_device_to_the_memory(output_type, size, dtype, to, memory, device, ends):
    processor = VideoProcessor(vae_scale_factor=8)
    video = torch.randn(2, 3, 5, 16, 24).to(dtype).to("npu")
    stock = processor.postprocess_video(video, output_type)
    with wan_patches.enabled(), writing_to(to):
        first = processor.postprocess_video(video, output_type)
        assert np.array_equal(as_array(first), as_array(stock))
        assert np.array_equal(memory[-1], as_array(stock))  # of stock's making, and there all the same
        assert wan_patches.status().verdicts[0].exact
        device.reset()
        ends.clear()
        found = processor.postprocess_video(video, output_type)
    assert np.array_equal(as_array(found), as_array(stock))
    assert np.array_equal(memory[-1], as_array(stock))
    assert device.downloads() == Counter({video.numel() * size: 1})
    assert not device.uploads()
    assert ends == [memory[-1].ctypes.data]
    assert len(memory) == 2
    if output_type == "np":
        for array, where in zip((first, found), memory, strict=True):
            assert array.ctypes.data == where.ctypes.data
            assert array.strides == stock.strides


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_what_the_gate_refuses_is_delivered_as_stock_makes_it(output_type, to, memory, device, monkeypatch):
    for name in ("video_to_uint8", "video_to_float"):
        right = getattr(frames, name)
        monkeypatch.setattr(frames, name, lambda video, out, right=right: right(video, out).fill_(0))
    processor, video = VideoProcessor(vae_scale_factor=8), torch.randn(1, 3, 2, 8, 8).to("npu")
    stock = as_array(processor.postprocess_video(video, output_type))
    with wan_patches.enabled(), writing_to(to):
        for _ in range(2):
            assert np.array_equal(as_array(processor.postprocess_video(video, output_type)), stock)
            assert np.array_equal(memory[-1], stock)
        assert [verdict.exact for verdict in wan_patches.status().verdicts] == [False]
