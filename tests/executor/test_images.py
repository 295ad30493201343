"""Frames: images in every respect, arrays until somebody looks."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from wan_patches.executor.images import MODES, Frame


@pytest.fixture(params=MODES)
def array(request):
    return np.random.default_rng(0).integers(0, 256, (7, 5, *MODES[request.param]), dtype=np.uint8)


@pytest.fixture
def plain(array):
    return Image.fromarray(array).copy()  # of its own memory


@pytest.fixture
def frame(array):
    return Frame(array.copy())


def test_it_looks_like_an_image_and_stays_an_array(frame, plain, array):
    assert isinstance(frame, Image.Image)
    assert (frame.size, frame.mode, frame.width, frame.height) == (plain.size, plain.mode, 5, 7)
    assert frame.getbands() == plain.getbands()
    assert np.array_equal(np.asarray(frame), array)
    assert frame.tobytes() == plain.tobytes()
    assert frame == plain
    assert plain == frame
    assert repr(frame)
    assert frame.array is not None


def test_it_is_equal_to_what_is_equal_only(frame, plain, array):
    assert frame == Frame(array)
    assert frame != Frame(255 - array)
    assert frame != Frame(array[:, :-1])
    assert frame != Frame(array, {"prompt": "a cat"})
    assert frame != array.tobytes()
    other = plain.copy()
    other.putpixel((0, 0), int(255 - array.flat[0]))
    assert frame != other
    assert other != frame
    with pytest.raises(TypeError):
        hash(frame)


@pytest.mark.parametrize(
    "use",
    [
        lambda image: image.copy(),
        lambda image: image.resize((3, 4)),
        lambda image: image.crop((1, 1, 4, 4)),
        lambda image: image.convert("L"),
        lambda image: image.rotate(90, expand=True),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.filter(ImageFilter.BLUR),
        lambda image: ImageOps.mirror(image),
        lambda image: ImageChops.invert(image) if image.mode != "RGBA" else image.copy(),
        lambda image: image.split()[0],
        lambda image: image.getpixel((1, 2)),
        lambda image: image.getextrema(),
        lambda image: image.histogram(),
        lambda image: image.getbbox(),
        lambda image: Image.fromarray(np.asarray(image)),
        lambda image: copy.copy(image),
        lambda image: copy.deepcopy(image),
    ],
)
def test_what_one_gets_from_it_is_what_one_gets_from_an_image(use, frame, plain):
    found = use(frame)
    assert found == use(plain)
    if isinstance(found, Image.Image):
        assert type(found) is Image.Image


def _draw(image):
    ImageDraw.Draw(image).line((0, 0, 4, 6), fill=200)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.putpixel((1, 2), 9),
        lambda image: image.paste(Image.new(image.mode, (2, 2)), (1, 1)),
        lambda image: image.putalpha(7),
        lambda image: image.thumbnail((3, 3)),
        lambda image: image.frombytes(bytes(len(image.tobytes()))),
        lambda image: image.load().__setitem__((0, 0), 3),
        _draw,
    ],
)
def test_changes_change_it_as_an_image(change, frame, plain, array):
    given_array = frame.array
    change(frame)
    change(plain)
    assert frame == plain
    assert (frame.mode, frame.size) == (plain.mode, plain.size)
    assert np.array_equal(np.asarray(frame), np.asarray(plain))
    assert frame.array is None
    assert np.array_equal(given_array, array)  # nobody else sees it


def test_what_numpy_gets_cannot_change_it(frame, plain):
    shown = np.asarray(frame)
    with pytest.raises(ValueError, match="read-only"):
        shown[0] = 1
    np.array(frame)[...] = 0
    assert frame == plain
    frame.putpixel((0, 0), 1)
    assert np.array_equal(shown, np.asarray(plain))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_it_is_saved_as_an_image(frame, array, format):
    file = io.BytesIO()
    frame.save(file, format)
    assert np.array_equal(np.asarray(Image.open(file)), array)


def test_its_pickle_needs_no_more_than_pillow(array):
    frame = Frame(array, {"prompt": "a cat"})
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(frame, protocol)) == frame
    assert frame.array is not None
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).info, 'wan_patches' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(frame), capture_output=True, timeout=60)
    assert shown.stdout.split(b"\n")[0].strip() == b"{'prompt': 'a cat'} False"


def test_closed_it_is_gone(frame):
    frame.close()
    with pytest.raises(ValueError, match="closed"):
        frame.getpixel((0, 0))
    assert frame.array is None


def test_threads_that_look_at_once_see_one_image():
    frame = Frame(np.zeros((600, 800, 3), np.uint8))
    barrier = threading.Barrier(8)

    def paint(nth):
        barrier.wait()
        frame.putpixel((nth, 0), (255, 255, 255))

    threads = [threading.Thread(target=paint, args=(nth,)) for nth in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.asarray(frame)[0, :9, 0].tolist() == [255] * 8 + [0]


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from(list(MODES)), st.booleans())
def test_any_size_and_layout(height, width, mode, flipped):
    array = np.arange(height * width * 4, dtype=np.uint8).reshape(height, width, 4)
    array = (array[::-1, ::-1] if flipped else array)[:, :, : (MODES[mode] or (1,))[0]]
    array = array if MODES[mode] else array[:, :, 0]
    frame = Frame(array)
    assert frame.mode == mode
    assert frame.size == (width, height)
    assert np.array_equal(np.asarray(frame), array)
    assert frame.copy() == frame
    assert np.array_equal(np.asarray(frame).reshape(array.shape), array)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 5), np.uint8), np.zeros(4, np.uint8)],
    ids=range(4),
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match="No image"):
        Frame(array)
