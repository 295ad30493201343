"""RGB images and videos to tensors, in the form of CPUs and in that of accelerators, against the installed processor.

What is not RGB, or no image at all, is the matter of `test_fuzz`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import given
from hypothesis import strategies as st
from strategies import amounts, assert_same, hunt, outcome, seeds

from wan_patches.bindings import preprocess as patch
from wan_patches.ops.images import on_device
from wan_patches.ops.resize import supported

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]


@dataclass(frozen=True)
class Images:
    """RGB images of these sizes (width, height)."""

    sizes: tuple[tuple[int, int], ...]
    binary: bool  # black and white: overshoots on both sides, clipped between the passes
    seed: int

    def make(self) -> list[PIL.Image.Image]:
        random = np.random.default_rng(self.seed)
        made = []
        for width, height in self.sizes:
            pixels = random.integers(0, 2 if self.binary else 256, (height, width, 3), np.uint8)
            made.append(PIL.Image.fromarray(pixels * np.uint8(255 if self.binary else 1)))
        return made


lengths = st.one_of(st.integers(1, 9), st.integers(1, 70))
pictures = st.builds(
    Images, st.lists(st.tuples(lengths, lengths), min_size=1, max_size=3).map(tuple), st.booleans(), seeds
)
sides = st.one_of(lengths, st.none())
factors = st.sampled_from((1, 1, 2, 8, 16))


@amounts()
def test_images_have_the_bits_of_stock(examples):
    @given(pictures, sides, sides, factors, st.booleans())
    def check(images, height, width, factor, alone):
        processor = VideoProcessor(vae_scale_factor=factor)
        given_images = images.make()[0] if alone else images.make()
        stock = outcome(lambda: processor.preprocess(given_images, height, width))
        assert_same(outcome(lambda: patch.preprocess(processor, "cpu", given_images, height, width)), stock)
        if isinstance(stock, torch.Tensor):  # the other form: what accelerators run, on the CPU
            made, size = given_images if isinstance(given_images, list) else [given_images], tuple(stock.shape[2:])
            assert all(supported(image.height, image.width, *size) for image in made)
            assert_same(on_device(made, size, torch.device("cpu"), lambda: pytest.fail("not stock's")), stock)

    hunt(check, examples)


@amounts()
def test_videos_have_the_bits_of_stock(examples):
    @given(pictures, sides, sides, factors, st.integers(1, 3))
    def check(images, height, width, factor, videos):
        processor = VideoProcessor(vae_scale_factor=factor)
        frames = images.make()
        video = frames if videos == 1 else [frames[i % len(frames) :] for i in range(videos)]
        stock = outcome(lambda: processor.preprocess_video(video, height, width))
        assert_same(outcome(lambda: patch.preprocess_video(processor, "cpu", video, height, width)), stock)

    hunt(check, examples)
