"""Operations around the causal convolutions: the same inputs as concatenated, padded and cloned tensors, no more."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from wan_patches.ops import vae
from wan_patches.ops.vae import FrameCaches, in_steps, interleave, upsample, upsampled_bands

pytestmark = pytest.mark.upstream


def _joined(chunks, activation=None, padding=(1, 1)):
    """The inputs of a causal convolution as the formula says: all frames so far, two of zeros before, a border."""
    above, left = padding
    video = torch.cat(chunks, 2)
    video = video if activation is None else activation(video)
    video = F.pad(video, (left, left, above, above, 2, 0))
    end = 2
    for chunk in chunks:
        end += chunk.shape[2]
        yield video[:, :, end - chunk.shape[2] - 2 : end]


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1, 4, 4), (1, 1, 1, 1), (4, 2, 1, 3), (2,)])
def test_a_convolution_sees_all_frames_with_their_history_and_border(padding, dtype, lengths):
    chunks = [torch.randn(2, 3, frames, 5, 4, dtype=dtype) for frames in lengths]
    caches, seen = FrameCaches(1), []

    def convolution(window):
        assert window.is_contiguous()
        seen.append(window.clone())
        above, left = padding
        return window[:, :, 2:, above : window.shape[3] - above, left : window.shape[4] - left].clone()

    for chunk in chunks:
        before = chunk.clone()
        y = caches.convolve(0, chunk.transpose(3, 4).contiguous().transpose(3, 4), convolution, padding)
        assert torch.equal(y, before)
    assert all(torch.equal(window, wanted) for window, wanted in zip(seen, _joined(chunks, padding=padding)))


@pytest.mark.parametrize("small_pieces", [False, True])
def test_activations_come_before_history_and_border(small_pieces, monkeypatch):
    if small_pieces:
        monkeypatch.setattr(vae, "_IN_CACHE", 100)
    chunks = [torch.randn(1, 3, frames, 7, 6) for frames in (1, 4, 2)]
    caches, seen = FrameCaches(1), []

    def convolution(window):
        seen.append(window.clone())
        return window[:, :, 2:, 1:-1, 1:-1].clone()

    for chunk in chunks:
        caches.convolve(0, chunk, convolution, (1, 1), activation=lambda piece, *memory: piece + 3)
    wanted = list(_joined(chunks, lambda video: video + 3))
    wanted[0][:, :, :2] = 0
    assert all(torch.equal(window, expected) for window, expected in zip(seen, wanted))


@pytest.mark.parametrize(("height", "least"), [(12, 4), (13, 4), (11, 4), (7, 3), (9, 9), (5, 100)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("channels", [6, 8])
def test_bands_equal_whole_frames(height, least, overwrite, channels, monkeypatch):
    """In integers, which add up to the same in any order; that floats do is another matter, tried for each shape."""
    monkeypatch.setattr(vae, "least_rows", lambda elements: least)
    weight = torch.randint(-4, 5, (channels, 6, 3, 3, 3)).double()
    chunks = [torch.randint(-9, 9, (2, 6, frames, height, 5)).double() for frames in (1, 4, 2)]
    added = [torch.randint(-9, 9, (2, channels, *chunk.shape[2:])).double() for chunk in chunks]
    whole, divided = FrameCaches(1), FrameCaches(1)
    divided.divide()
    calls = []

    def convolution(window):
        calls.append(window.shape[3] - 2)
        return F.conv3d(window, weight)

    for chunk, add in zip(chunks, added):
        options = {"activation": lambda piece, *memory: piece * 2, "add": add}
        wanted = whole.convolve(0, chunk, convolution, (1, 1), **options)
        calls.clear()
        given = chunk.clone()
        result = divided.convolve(0, given, convolution, (1, 1), overwrite=overwrite, **options)
        assert torch.equal(result, wanted)
        assert len(calls) == max(1, height // least)
        assert min(calls) >= min(least, height)
        assert sum(calls) == height
        assert overwrite or torch.equal(given, chunk)
        if overwrite and channels == 6 and len(calls) > 1:
            assert result is given
    assert torch.equal(whole[0], divided[0])


def test_memory_is_shared_and_grows_once():
    caches = FrameCaches(2)
    like = torch.zeros(1)
    large = caches.shared((4, 5), like)
    assert caches.shared((2, 3), like).data_ptr() == large.data_ptr()
    assert caches.shared((4, 5), like).data_ptr() == large.data_ptr()
    assert caches.shared((2, 3), like.double()).dtype == torch.double
    assert caches.shared((6, 6), like).shape == (6, 6)


@pytest.mark.parametrize("lengths", [(1, 4, 4), (1, 1, 1, 2, 1), (4, 2, 1, 3), (2,)])
@pytest.mark.parametrize("writes", [(True,), (False, True)])
def test_activations_may_write_window_and_history_themselves(lengths, writes, monkeypatch):
    """Always, or in every second call, as after a call in which a kernel is compared."""
    monkeypatch.setattr(vae, "_pieces", lambda x: [(slice(0, x.shape[2]), slice(0, x.shape[3]))])
    chunks = [torch.randn(1, 3, frames, 7, 6) for frames in lengths]
    caches, other, turn = FrameCaches(1), FrameCaches(1), itertools.cycle(writes)

    def activation(piece, place, last):
        if not next(turn):
            return piece + 3
        place.copy_(piece + 3)
        if last is not None:
            last.copy_(place[:, :, -last.shape[2] :])
        return place

    for chunk in chunks:
        given = activation, lambda piece, *memory: piece + 3
        ours, theirs = (
            found.convolve(0, chunk, torch.clone, (1, 1), activation=way) for found, way in zip((caches, other), given)
        )
        assert torch.equal(ours, theirs)
        assert torch.equal(caches[0], other[0])


@pytest.mark.parametrize("way", [vae._upsample_by_rows, vae._upsample_at_once])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 5), (2, 3, 1, 1), (1, 1, 7, 9)])
def test_upsample_is_nearest_exact(dtype, shape, way):
    x = torch.randn(shape).to(dtype)
    x.view(-1)[0] = float("nan")
    out = torch.full((*shape[:-2], 2 * shape[-2], 2 * shape[-1]), 7, dtype=dtype)
    assert way(x, out) is out
    images = x.float().reshape(-1, 1, *shape[-2:])
    wanted = torch.nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")(images).to(dtype).view(out.shape)
    assert torch.equal(out.nan_to_num(9), wanted.nan_to_num(9))


@pytest.mark.parametrize("way", [vae._upsample_by_rows, vae._upsample_at_once])
def test_upsample_takes_any_strides(way):
    x = torch.randn(2, 3, 4, 5).transpose(2, 3)
    expected = upsample(x.contiguous(), torch.empty(2, 3, 10, 8))
    assert torch.equal(way(x, torch.empty(2, 3, 10, 8)), expected)
    assert torch.equal(way(x, torch.empty(2, 10, 8, 3).movedim(-1, 1)), expected)


def test_interleave_takes_one_frame_of_each_half_in_turn():
    x = torch.arange(2 * 6 * 3, dtype=torch.float32).view(2, 6, 3, 1, 1)
    frames = interleave(x).flatten(1, 2)
    for b, t, half, channel in itertools.product(range(2), range(3), range(2), range(3)):
        assert frames[b, 2 * t + half, channel] == x[b, 3 * half + channel, t]


@pytest.mark.parametrize(("total", "step", "wanted"), [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (2, 2, [2]), (1, 4, [1])])
def test_steps_cover_every_frame_once(total, step, wanted):
    x, seen, rewound = torch.randn(1, 2, total, 3, 3), [], []

    def layers(piece):
        seen.append(piece.shape[2])
        return piece * 2

    assert torch.equal(in_steps(layers, x, step, lambda: rewound.append(len(seen))), x * 2)
    assert seen == wanted
    assert rewound == list(range(1, len(wanted)))


@pytest.mark.parametrize(("height", "rows"), [(8, 3), (7, 3), (3, 16), (1, 1)])
def test_upsampled_bands_have_their_neighbours(height, rows):
    x = torch.randn(2, 3, height, 5)
    whole = F.pad(upsample(x, torch.empty(2, 3, 2 * height, 10)), (0, 0, 1, 1))
    covered = []
    for place, band in upsampled_bands(x, rows, FrameCaches(0)):
        assert torch.equal(band, whole[..., place.start : place.stop + 2, :])
        covered += range(place.start, place.stop)
    assert covered == list(range(2 * height))


@pytest.mark.parametrize("axes", [4, 5])
def test_memory_formats_are_those_that_aten_keeps(axes):
    """Which of two formats a padded tensor is in, `(batch, channels, ..., height, width)`."""
    last = torch.channels_last if axes == 4 else torch.channels_last_3d
    drawing, found = random.Random(0), Counter()
    for _ in range(5000):
        shape = [drawing.choice([1, 1, 2, 3]) for _ in range(axes)]
        order = drawing.choice([(0, *range(2, axes), 1), drawing.sample(range(axes), axes)])
        whole = torch.empty([shape[axis] * drawing.choice([1, 1, 2]) for axis in order])
        x = whole.permute([order.index(axis) for axis in range(axes)])
        x = x[tuple(slice(None, None, drawing.choice([1, 1, 2])) for _ in range(axes))]
        padded = F.pad(x, (1, 1, 1, 1))
        if (strides := torch.empty(padded.shape, memory_format=last).stride()) != torch.empty(padded.shape).stride():
            assert vae.is_channels_last(x) == (padded.stride() == strides), (x.shape, x.stride())
            found[vae.is_channels_last(x)] += 1
    assert min(found[True], found[False]) > 1000


def test_shared_memory_comes_in_both_formats():
    caches = FrameCaches(1)
    for x in (torch.empty(2, 3, 4, 5, 6), torch.empty(2, 3, 5, 6)):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        for memory_format in (torch.contiguous_format, last):
            shape = (*x.shape[:-1], 9)
            found = caches.shared(shape, x, memory_format is last)
            assert found.stride() == torch.empty(shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("steps", [(4,), (2, 2)])
def test_windows_have_the_memory_format_of_stock(steps):
    """A chunk is in channels-last memory where all of it is, and the frames before it: its steps, too."""
    caches, seen = FrameCaches(1), []

    def convolution(window):
        seen.append(vae.is_channels_last(window))
        return window[:, :, 2:, 1:-1, 1:-1].clone()

    def pass_on(x):
        seen.clear()
        start = 0
        for frames in steps if x.shape[2] > 1 else (1,):
            caches.continues = start > 0
            caches.convolve(0, x[:, :, start : start + frames], convolution, (1, 1))
            start += frames
        caches.unite()
        return set(seen)

    def video(frames, memory_format):
        return torch.randn(2, 3, frames, 4, 5).contiguous(memory_format=memory_format)

    last, first = torch.channels_last_3d, torch.contiguous_format
    assert pass_on(video(1, first)) == {False}
    assert pass_on(video(4, last)) == {False}  # what is remembered is not
    assert pass_on(video(4, last)) == {True}
    assert pass_on(video(4, first)) == {False}
    assert pass_on(video(4, last)) == {False}
