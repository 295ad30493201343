"""OutputBuffers of finished frames: the setting itself, and through a whole pipeline."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import torch

import wan_patches
from wan_patches.bindings.output_buffers import OutputBuffers, output_buffers, writing_to
from wan_patches.testing.families import FAMILIES

TO = OutputBuffers(torch.empty_strided, PIL.Image.fromarray)
OTHER = OutputBuffers(torch.empty_strided, PIL.Image.fromarray)


class Shared:
    """Memory as a worker process has it: one mapping for each result."""

    def __init__(self) -> None:
        self.results: list[np.ndarray] = []

    def empty_strided(self, shape, stride, dtype):
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        memory = torch.frombuffer(mmap.mmap(-1, extent * dtype.itemsize), dtype=torch.uint8)
        self.results.append(memory.numpy())
        return memory.view(dtype).as_strided(shape, stride)


def test_no_output_buffers_by_default():
    assert output_buffers.get() is None


def test_output_buffers_apply_inside_the_block_only():
    with writing_to(TO):
        assert output_buffers.get() is TO
        with writing_to(OTHER):
            assert output_buffers.get() is OTHER
        assert output_buffers.get() is TO
    assert output_buffers.get() is None


def test_output_buffers_end_with_an_exception():
    with pytest.raises(KeyError), writing_to(TO):
        raise KeyError
    assert output_buffers.get() is None


def test_output_buffers_are_per_thread():
    seen = []
    with writing_to(TO):
        thread = threading.Thread(target=lambda: seen.append(output_buffers.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_import_does_not_import_torch():
    code = "import sys, wan_patches.bindings.output_buffers; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_pipeline_writes_its_video_to_the_given_memory(output_type):
    family = FAMILIES["wan_t2v"]
    pipe, shared, seen = family.build(), Shared(), []

    def call():
        generator = torch.Generator().manual_seed(0)
        arguments = {"size": (48, 32), "frames": 5, "steps": 1, "output_type": output_type}
        return pipe(**family.inputs(generator=generator, **arguments)).frames

    def image(frame):
        seen.append(frame)
        return PIL.Image.fromarray(frame)

    stock = call()
    with wan_patches.enabled(), writing_to(OutputBuffers(shared.empty_strided, image)):
        frames = call()
    (memory,) = shared.results
    if output_type == "np":
        assert np.array_equal(frames, stock)
        assert frames.strides == stock.strides
        assert np.shares_memory(frames, memory)
        assert not seen
    else:
        assert [np.array_equal(a, b) for a, b in zip(frames[0], stock[0], strict=True)] == [True] * 5
        assert all(np.shares_memory(frame, memory) for frame in seen)
        assert len(seen) == 5


def test_output_buffers_are_ignored_without_the_patch():
    from diffusers.video_processor import VideoProcessor

    shared = Shared()
    with writing_to(OutputBuffers(shared.empty_strided, PIL.Image.fromarray)):
        VideoProcessor(vae_scale_factor=8).postprocess_video(torch.rand(1, 3, 2, 8, 8), "np")
    assert not shared.results
