"""Anything at all given to the processors: what stock raises is raised, what stock returns is returned."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, KINDS, Drawn, Layout, amounts, assert_same, hunt, outcome, patched, seeds, tensors

from wan_patches.bindings import preprocess as patch

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
         "I;16", "I;16L", "I;16B")  # fmt: skip


class Picture(PIL.Image.Image):
    """Someone's own kind of image."""


@dataclass(frozen=True)
class Image:
    """A PIL image to be made; `how` it came about."""

    mode: str
    size: tuple[int, int]
    how: str
    seed: int

    def make(self) -> PIL.Image.Image:
        image = PIL.Image.new(self.mode, self.size)
        if self.how == "broken":  # a file that ends too early: it fails when it is looked at
            file = io.BytesIO()
            PIL.Image.effect_noise((40, 40), 90).convert("RGB").save(file, "PNG")
            return PIL.Image.open(io.BytesIO(file.getvalue()[:200]))
        with contextlib.suppress(Exception):  # of modes that bytes cannot be put into
            image.frombytes(np.random.default_rng(self.seed).bytes(len(image.tobytes())))
        if self.how == "closed":
            image.close()
        if self.how == "own class":
            image.__class__ = Picture
        return image


@dataclass(frozen=True)
class Array:
    """A numpy array to be made."""

    shape: tuple[int, ...]
    dtype: str
    seed: int
    fortran: bool

    def make(self) -> np.ndarray:
        random = np.random.default_rng(self.seed)
        with np.errstate(all="ignore"):
            made = np.array(random.normal(size=self.shape) * 3).astype(self.dtype)
        if made.dtype.kind == "f" and made.size:
            made.flat[:: 1 + made.size // 3] = random.choice([math.nan, math.inf, -math.inf, 1e-42, 0.0])
        return np.asfortranarray(made) if self.fortran else made


@dataclass(frozen=True)
class Things:
    """A list or tuple of what is to be made."""

    kind: type
    members: tuple[Any, ...]

    def make(self) -> Any:
        return self.kind(make(member) for member in self.members)


def make(thing: Any) -> Any:
    """Drawn things made, plain values as they are."""
    return thing.make() if hasattr(thing, "make") else thing


lengths = st.one_of(st.integers(0, 4), st.integers(1, 40))
rgb = st.builds(Image, st.just("RGB"), st.tuples(lengths, lengths), st.just("new"), seeds)
images = st.one_of(
    rgb,
    rgb,
    st.builds(Image, st.sampled_from(MODES), st.tuples(lengths, lengths), st.just("new"), seeds),
    st.builds(Image, st.just("RGB"), st.tuples(lengths, lengths), st.sampled_from(("closed", "own class")), seeds),
    st.builds(Image, st.just("RGB"), st.just((40, 40)), st.just("broken"), seeds),
)


def shapes(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from((0, 1, 2, 3, 3, 4, 8, 17)), min_size=least, max_size=most).map(tuple)


DTYPES = ("float16", "float32", "float64", "uint8", "int64", "bool", "complex64", "uint16")
arrays = st.builds(Array, shapes(0, 6), st.sampled_from(DTYPES), seeds, st.booleans())
any_tensors = st.one_of(
    shapes(0, 6).flatmap(lambda shape: tensors(shape, grad=True)),
    shapes(4, 5).flatmap(lambda shape: tensors(shape, kinds=("normal",))),
)


@dataclass(frozen=True)
class Other:
    """A tensor of a dtype, device or class that pictures do not have."""

    shape: tuple[int, ...]
    what: Any

    def make(self) -> torch.Tensor:
        if self.what == "meta":
            return torch.empty(self.shape, device="meta")
        if self.what == "own class":
            return torch.nn.Parameter(torch.zeros(self.shape), requires_grad=False)
        if self.what == "sparse":
            return torch.ones(self.shape).to_sparse()
        return torch.ones(self.shape).to(self.what)


others = st.builds(
    Other,
    shapes(3, 5),
    st.sampled_from(
        ("meta", "own class", "sparse", torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
)
plain = st.sampled_from((None, 0, 7, -1.5, math.nan, "image.png", b"bytes", True, {"image": 1}, range(3), object))
single = st.one_of(images, images, arrays, any_tensors, others, plain)


def lists(of: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[Things]:
    return st.builds(Things, st.sampled_from((list, list, list, tuple)), st.lists(of, max_size=most).map(tuple))


inputs = st.one_of(single, lists(rgb), lists(images), lists(single), lists(lists(rgb)), lists(lists(single)))
side = st.one_of(
    st.none(),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from((0, -8, True, 2**62, -(2**62), 10**30, 16.0, 17.5, math.nan, math.inf, "16", np.int64(16),
                     np.float32(16), (16,), [16], torch.tensor(16))),
)  # fmt: skip
extra = st.fixed_dictionaries(
    {},
    optional={
        "resize_mode": st.sampled_from(("default", "fill", "crop", "nonsense", None)),
        "crops_coords": st.sampled_from((None, (0, 0, 8, 8), (3, 2, 30, 20), (9, 9, 1, 1), "0088")),
        "no_such_argument": st.just(1),
    },
)
no_extra = st.just({})
settings_of_processors = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "vae_scale_factor": st.sampled_from((1, 8, 8, 16)),
            "resample": st.sampled_from(("lanczos", "bilinear", "nearest", "nonsense")),
            "reducing_gap": st.sampled_from((None, 1.0, 2, 3)),
            "do_resize": st.booleans(),
            "do_normalize": st.booleans(),
            "do_binarize": st.booleans(),
            "do_convert_rgb": st.booleans(),
            "do_convert_grayscale": st.just(False),
        },
    ),
    st.just({"do_convert_grayscale": True}),
)

photo = st.builds(Image, st.just("RGB"), st.tuples(*[st.integers(8, 40)] * 2), st.just("new"), seeds)
photos = st.builds(Things, st.just(list), st.lists(photo, min_size=1, max_size=3).map(tuple))
size = st.one_of(st.none(), st.integers(8, 60))
usual = st.tuples(st.one_of(photo, photos, lists(photos)), size, size, no_extra, st.just({}))  # or nearly so
anything = st.tuples(inputs, side, side, st.one_of(no_extra, no_extra, extra), settings_of_processors)


@amounts()
@pytest.mark.parametrize(
    ("method", "ours"),
    [("preprocess", patch.preprocess), ("preprocess_video", patch.preprocess_video)],
    ids=["images", "videos"],
)
def test_preprocessing_raises_what_stock_raises(method, ours, examples, monkeypatch):
    taken, fast = [], patch._tensor
    monkeypatch.setattr(patch, "_tensor", lambda *args: taken.append(1) or fast(*args))

    @given(st.one_of(usual, anything, anything))
    @example((Things(list, (Image("RGB", (1, 1), "new", 0),)), 8, 2**62, {}, {}))
    def check(case):
        thing, height, width, more, config = case
        processor = VideoProcessor(**config)
        stock = outcome(lambda: getattr(processor, method)(make(thing), height=height, width=width, **more))
        assert_same(outcome(lambda: ours(processor, "cpu", make(thing), height=height, width=width, **more)), stock)

    hunt(check, examples)
    assert taken


outputs = st.sampled_from(("np", "np", "pil", "pil", "pt", "latent", "mp4", "", None, 3, b"np", ("np",), ["pil"]))
more_outputs = st.fixed_dictionaries(
    {},
    optional={
        "do_denormalize": st.sampled_from((None, [True], [False] * 20, [True, False] * 10, [])),
        "no_such_argument": st.just(1),
    },
)
rgb_videos = shapes(3, 3).flatmap(lambda shape: tensors((1 + shape[0] // 4, 3, *shape[1:], 5), FLOATS, KINDS))


@amounts()
def test_postprocessing_raises_what_stock_raises(examples):
    with patched("frames") as (place,):

        @given(st.one_of(rgb_videos, any_tensors, inputs), outputs, st.one_of(no_extra, no_extra, more_outputs),
               settings_of_processors)  # fmt: skip
        def check(thing, output_type, more, config):
            processor = VideoProcessor(**config)

            def run(function: Callable[..., Any]) -> Any:
                return outcome(lambda: function(processor, make(thing), output_type, **more))

            assert_same(run(place.function), run(place.stock))

        hunt(check, examples)


def test_layouts_are_what_they_say():
    """Of the tests themselves: a layout that were always contiguous would test little."""
    layout = Layout((1, 0), (2, 1), (False, False), 3)
    tensor = Drawn((2, 3), torch.float32, layout, "normal", 0).make()
    assert tensor.shape == (2, 3)
    assert tensor.stride() == (2, 4)
    assert tensor.storage_offset() == 3
