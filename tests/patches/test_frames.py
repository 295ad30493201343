"""`VideoProcessor.postprocess_video`, patched in place, against stock."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor

import wan_patches
from wan_patches.bindings.output_buffers import OutputBuffers, writing_to

pytestmark = pytest.mark.upstream


def as_array(frames):
    return np.stack([np.stack([np.asarray(f) for f in v]) for v in frames]) if isinstance(frames, list) else frames


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


def same(processor, video, *args, **kwargs):
    with wan_patches.enabled(["frames"]) as status:
        assert not status.skipped()
        patched = outcome(lambda: processor.postprocess_video(video, *args, **kwargs))
    stock = outcome(lambda: processor.postprocess_video(video, *args, **kwargs))
    assert type(stock) is type(patched)
    if isinstance(stock, Exception):
        assert str(patched) == str(stock)
        return
    if isinstance(stock, list):
        assert [len(v) for v in stock] == [len(v) for v in patched]
        assert {(f.mode, f.size) for v in stock for f in v} == {(f.mode, f.size) for v in patched for f in v}
    stock, patched = as_array(stock), as_array(patched)
    assert stock.dtype == patched.dtype
    if isinstance(stock, np.ndarray):
        assert stock.strides == patched.strides
        assert np.array_equal(stock, patched)
    else:
        assert torch.equal(stock, patched)


@pytest.mark.parametrize("output_type", ["np", "pil", "pt", "latent", "mp4", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3, 5, 16, 24), (2, 3, 1, 8, 8), (1, 1, 2, 8, 8), (1, 4, 2, 8, 8)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_every_output_type(output_type, dtype, shape):
    video = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5).to(dtype)
    same(VideoProcessor(vae_scale_factor=8), video, output_type=output_type)


def test_defaults_and_other_input():
    processor = VideoProcessor(vae_scale_factor=8)
    video = torch.randn(1, 3, 3, 8, 8)
    same(processor, video)
    same(processor, video.transpose(3, 4))
    same(processor, video[:, :, ::2], "pil")
    same(processor, video.requires_grad_(), "np")
    same(processor, torch.zeros(0, 3, 1, 8, 8), "np")
    same(processor, torch.zeros(1, 3, 0, 8, 8), "np")
    same(processor, video[0], "np")
    same(processor, video.detach().numpy(), "np")
    same(VideoProcessor(vae_scale_factor=8, do_normalize=False), video.detach(), "pil")
    same(processor, torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8), "pil")


def test_custom_processors_are_left_alone():
    class Inverted(VideoProcessor):
        @staticmethod
        def denormalize(images):
            return 1 - VideoProcessor.denormalize(images)

    video = torch.rand(1, 3, 2, 8, 8)
    same(Inverted(vae_scale_factor=8), video, "np")
    instance = VideoProcessor(vae_scale_factor=8)
    instance.pt_to_numpy = lambda images: np.zeros((2, 8, 8, 3), np.float32)
    same(instance, video, "np")


def test_fast_path_is_taken(monkeypatch):
    from wan_patches.ops import frames

    monkeypatch.setattr(frames, "video_to_uint8", lambda *_, **__: torch.full((1, 2, 8, 8, 3), 7, dtype=torch.uint8))
    processor, video = VideoProcessor(vae_scale_factor=8), torch.rand(1, 3, 2, 8, 8)
    with wan_patches.enabled():
        assert np.asarray(processor.postprocess_video(video, "pil")[0][0]).max() == 7
    assert np.asarray(processor.postprocess_video(video, "pil")[0][0]).max() > 7


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_default_dtype_and_device_do_not_matter(output_type):
    video, before = torch.randn(1, 3, 3, 8, 8).bfloat16(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            same(VideoProcessor(vae_scale_factor=8), video, output_type)
    finally:
        torch.set_default_dtype(before)


class Memory:
    """Gives memory for frames, and images that are only told of."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.asked: list[np.ndarray] = []

    def empty_strided(self, shape, stride, dtype):
        self.given.append(torch.empty_strided(shape, stride, dtype=dtype))
        return self.given[-1]

    def image(self, frame):
        self.asked.append(frame)
        return PIL.Image.new("RGB", (1, 1), len(self.asked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_arrays_are_written_to_the_given_memory(dtype, transposed):
    processor, memory = VideoProcessor(vae_scale_factor=8), Memory()
    video = torch.randn(2, 3, 5, 16, 24).to(dtype)
    video = video.transpose(3, 4) if transposed else video
    stock = processor.postprocess_video(video, "np")
    with wan_patches.enabled(["frames"]), writing_to(OutputBuffers(memory.empty_strided, memory.image)):
        array = processor.postprocess_video(video, "np")
    assert np.array_equal(array, stock)
    assert array.strides == stock.strides
    assert array.ctypes.data == memory.given[0].data_ptr()
    assert (len(memory.given), memory.asked) == (1, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_are_made_from_the_given_memory_by_the_given_function(dtype):
    processor, memory = VideoProcessor(vae_scale_factor=8), Memory()
    video = torch.randn(2, 3, 5, 16, 24).to(dtype)
    stock = as_array(processor.postprocess_video(video, "pil"))
    with wan_patches.enabled(["frames"]), writing_to(OutputBuffers(memory.empty_strided, memory.image)):
        images = processor.postprocess_video(video, "pil")
    assert [[image.getpixel((0, 0))[0] for image in batch] for batch in images] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    (frames,) = memory.given
    assert np.array_equal(frames.numpy(), stock)
    assert [frame.ctypes.data for frame in memory.asked] == [frame.data_ptr() for frame in frames.flatten(0, 1)]
    assert {(frame.shape, frame.dtype.name) for frame in memory.asked} == {((16, 24, 3), "uint8")}


@pytest.mark.filterwarnings("ignore")
def test_stock_results_ignore_the_given_memory():
    processor, memory = VideoProcessor(vae_scale_factor=8), Memory()
    with wan_patches.enabled(["frames"]), writing_to(OutputBuffers(memory.empty_strided, memory.image)):
        processor.postprocess_video(torch.rand(1, 3, 2, 8, 8, dtype=torch.float64), "pil")
        processor.postprocess_video(torch.rand(1, 4, 2, 8, 8), "np")
        processor.postprocess_video(torch.rand(1, 3, 2, 8, 8), "pt")
    assert not memory.given
    assert not memory.asked
