"""Preprocessing through the patched call sites' own functions, against the installed processors."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from wan_patches.bindings.preprocess import preprocess, preprocess_video
from wan_patches.testing.families import images

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("any_size")]


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


def same(stock, patched):
    """Runs both; results must agree in value, dtype and strides, errors in type and text."""
    expected, actual = outcome(stock), outcome(patched)
    assert type(actual) is type(expected)
    if isinstance(expected, Exception):
        assert str(actual) == str(expected)
        return
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert torch.equal(actual, expected)


def gray(i):
    return i.convert("L")


IMAGES = {
    "rgb": lambda i: i,
    "list": lambda i: [i, i.transpose(PIL.Image.Transpose.ROTATE_90)],
    "rgba": lambda i: i.convert("RGBA"),
    "gray": gray,
    "palette": lambda i: i.convert("P"),
    "cmyk": lambda i: i.convert("CMYK"),
    "gray with alpha": lambda i: i.convert("LA"),
    "float": lambda i: i.convert("F"),
    "16 bit": lambda i: PIL.Image.fromarray(np.arange(70 * 90, dtype=np.uint16).reshape(70, 90)),
    "mixed modes": lambda i: [i, gray(i)],
    "mixed kinds": lambda i: [i, np.asarray(i)],
    "array": lambda i: np.asarray(i, dtype=np.float32)[None] / 255,
    "tensor": lambda i: torch.from_numpy(np.asarray(i, dtype=np.float32) / 255).permute(2, 0, 1)[None],
    "negative tensor": lambda i: torch.full((1, 3, 70, 90), -0.5),
    "latents": lambda i: torch.zeros(1, 4, 70, 90),
    "empty list": lambda i: [],
    "tuple": lambda i: (i,),
    "none": lambda i: None,
    "text": lambda i: "image.png",
    "nested": lambda i: [[i]],
}
SIZES = [(32, 48), (None, None), (70, 90), (33, 47), (200, 16), (0, 16), (-8, 16), (32.0, 48)]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_images_of_every_kind(kind, size):
    image, (height, width) = IMAGES[kind](images(0, 1, (90, 70))[0]), size
    processor = VideoProcessor(vae_scale_factor=8)
    same(
        lambda: processor.preprocess(image, height=height, width=width),
        lambda: preprocess(processor, "cpu", image, height=height, width=width),
    )


VIDEOS = {
    "frames": lambda v: v,
    "one frame": lambda v: v[:1],
    "batch": lambda v: [v, v[::-1]],
    "batch of one": lambda v: [v],
    "uneven batch": lambda v: [v, v[1:]],
    "gray": lambda v: [gray(i) for i in v],
    "mixed sizes": lambda v: [v[0], v[1].resize((64, 64))],
    "mixed modes": lambda v: [v[0], gray(v[1])],
    "array": lambda v: np.stack([np.asarray(i, dtype=np.float32) / 255 for i in v]),
    "tensor": lambda v: torch.rand(2, 3, 64, 48),
    "five axes": lambda v: torch.rand(1, 2, 3, 64, 48),
    "empty": lambda v: [],
    "empty batch": lambda v: [[]],
    "none": lambda v: None,
    "single image": lambda v: v[0],
    "tuple": tuple,
}


@pytest.mark.parametrize("kind", VIDEOS)
@pytest.mark.parametrize("size", [(32, 48), (None, None), (200, 16)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_videos_of_every_kind(kind, size):
    video, (height, width) = VIDEOS[kind](images(0, 3, (90, 70))), size
    processor = VideoProcessor(vae_scale_factor=8)
    same(
        lambda: processor.preprocess_video(video, height=height, width=width),
        lambda: preprocess_video(processor, "cpu", video, height=height, width=width),
    )
    same(
        lambda: processor.preprocess_video(video, height, width),
        lambda: preprocess_video(processor, "cpu", video, height, width),
    )


@pytest.mark.parametrize(
    "config",
    [
        {"resample": "bilinear"},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_binarize": True},
        {"do_convert_rgb": True},
        {"do_convert_grayscale": True},
        {"reducing_gap": 2},
        {"vae_scale_factor": 16},
    ],
    ids=str,
)
def test_other_settings(config):
    image, processor = images(0, 1, (96, 64))[0], VideoProcessor(**{"vae_scale_factor": 8, **config})
    same(
        lambda: processor.preprocess(image, height=32, width=48),
        lambda: preprocess(processor, "cpu", image, height=32, width=48),
    )
    same(
        lambda: processor.preprocess(image, 32, 48, resize_mode="fill"),
        lambda: preprocess(processor, "cpu", image, 32, 48, resize_mode="fill"),
    )
    same(lambda: processor.preprocess_video([image]), lambda: preprocess_video(processor, "cpu", [image]))


class Doubled(VideoProcessor):
    @staticmethod
    def normalize(images):
        return 2 * VideoProcessor.normalize(images)


def test_custom_processors_are_left_alone(monkeypatch):
    image = images(0, 1, (90, 70))[0]

    def check(processor):
        expected = processor.preprocess(image, 32, 48)
        assert torch.equal(preprocess(processor, "cpu", image, 32, 48), expected)
        return expected

    stock = check(VideoProcessor(vae_scale_factor=8))
    assert torch.equal(check(Doubled(vae_scale_factor=8)), 2 * stock)
    instance = VideoProcessor(vae_scale_factor=8)
    instance.normalize = lambda x: x
    assert not torch.equal(check(instance), stock)
    monkeypatch.setattr(VaeImageProcessor, "normalize", staticmethod(lambda x: -x))
    assert not torch.equal(check(VideoProcessor(vae_scale_factor=8)), stock)


def test_the_device_form_gives_the_pixels_of_the_cpu_form(monkeypatch):
    """What accelerators run, here on the CPU: one flat array of bytes, cut and resized by the op."""
    from wan_patches.ops.images import on_device

    def stock():
        pytest.fail("not stock's")

    frames = images(0, 3, (90, 70)) + images(1, 2, (33, 48)) + images(2, 1, (48, 32))
    for size in ((32, 48), (160, 64), (70, 90)):
        processor = VideoProcessor(vae_scale_factor=1)
        expected = processor.preprocess(frames, *size)
        actual = on_device(frames, size, torch.device("cpu"), stock)
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)
    monkeypatch.setattr(
        "wan_patches.ops.images.lanczos_resize", lambda pixels, h, w: torch.zeros(len(pixels), h, w, 3).byte()
    )
    assert not torch.equal(on_device(frames, size, torch.device("cpu"), stock), expected)


def test_input_images_are_not_modified():
    image = images(0, 1, (90, 70))[0]
    before = image.tobytes()
    preprocess(VideoProcessor(vae_scale_factor=8), "cpu", image, 32, 48)
    assert image.tobytes() == before


def test_default_dtype_and_device_do_not_matter():
    frames, processor = images(0, 3, (90, 70)), VideoProcessor(vae_scale_factor=8)
    expected, video = processor.preprocess(frames, 32, 48), processor.preprocess_video(frames, 32, 48)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(preprocess(processor, "cpu", frames, 32, 48), expected)
            assert torch.equal(preprocess_video(processor, "cpu", frames, 32, 48), video)
    finally:
        torch.set_default_dtype(before)
