"""Video tensors to frames, against the installed diffusers' `VideoProcessor.postprocess_video`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wan_patches.ops.frames import layout, video_to_float, video_to_uint8

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = (
    (0, 1, 2, 3, 4),
    (0, 2, 1, 3, 4),
    (0, 2, 3, 4, 1),
    (1, 0, 2, 3, 4),
    (4, 3, 2, 1, 0),
    (2, 0, 4, 1, 3),
)
NAMES = ("batch", "channels", "frames", "height", "width")
INF, NAN = float("inf"), float("nan")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Writes down operations and, without running them, the copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.transfers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops.append(name)
        if name in ("copy_", "_to_copy") and (kwargs or {}).get("device", args[-1].device) != args[0].device:
            self.transfers.append(name)
            return args[0]
        return func(*args, **(kwargs or {}))


def make(shape, dtype=torch.float32, order=(0, 1, 2, 3, 4), sliced=False, seed=0) -> torch.Tensor:
    """A video of `shape` whose axes lie in memory in `order`, values on both sides of [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn([shape[axis] + sliced for axis in order], generator=generator) * 0.8
    video = memory.to(dtype).permute(*np.argsort(order).tolist())
    return video[tuple(slice(0, size) for size in shape)]


def stock_pixels(video: torch.Tensor) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's about NaN
        videos = VideoProcessor().postprocess_video(video, "pil")
    shape = (video.shape[0], video.shape[2], *video.shape[3:], video.shape[1])
    return np.stack([np.asarray(image) for frames in videos for image in frames]).reshape(shape)


def check_uint8(video: torch.Tensor, **kwargs) -> None:
    ours = video_to_uint8(video, **kwargs)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    np.testing.assert_array_equal(ours.numpy(), stock_pixels(video))


def check_float(video: torch.Tensor, **kwargs) -> None:
    stock = VideoProcessor().postprocess_video(video, "np")
    ours = video_to_float(video, **kwargs).numpy()
    np.testing.assert_array_equal(ours, stock, strict=True)
    assert ours.strides == stock.strides
    assert not np.shares_memory(ours, video.detach().to(torch.float32).numpy())


videos = st.builds(
    make,
    st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 7), st.integers(1, 9), st.integers(2, 19)),
    st.sampled_from(DTYPES),
    st.permutations(range(5)),
    st.booleans(),
    st.integers(0, 2**32),
)


@settings(max_examples=250, deadline=None)
@given(videos, st.sampled_from((None, 1, 2, 3, 100)))
def test_uint8_has_stocks_pixels(video, frames_per_chunk):
    check_uint8(video, frames_per_chunk=frames_per_chunk)


@settings(max_examples=250, deadline=None)
@given(videos, st.sampled_from((None, 1, 2, 3, 100)))
def test_float_has_stocks_values_and_strides(video, frames_per_chunk):
    check_float(video, frames_per_chunk=frames_per_chunk)


@settings(max_examples=250, deadline=None)
@given(st.tuples(*[st.sampled_from((1, 1, 2, 3, 5))] * 5), st.permutations(range(5)), st.booleans())
def test_float_has_stocks_strides_where_axes_have_size_one(shape, order, sliced):
    check_float(make(shape, order=order, sliced=sliced))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(NAMES[axis] for axis in order))
def test_frames_of_a_permuted_video(batch, dtype, order):
    video = make((batch, 3, 5, 8, 12), dtype, order)
    check_uint8(video)
    check_float(video)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_of_an_expanded_video(dtype):
    video = make((1, 3, 1, 8, 12), dtype).expand(2, 3, 5, 8, 12)
    check_uint8(video)
    check_float(video)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_uint8_of_other_channel_counts(channels):
    check_uint8(make((2, channels, 3, 6, 7), torch.bfloat16))


def test_uint8_of_many_channels_equals_each_channel():
    video = make((1, 6, 3, 5, 4))
    ours = video_to_uint8(video)
    assert torch.equal(ours[..., :3], video_to_uint8(video[:, :3]))
    assert torch.equal(ours[..., 3:], video_to_uint8(video[:, 3:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    video = bits.view(dtype).view(1, 1, 1, 256, 256).expand(1, 3, 1, 256, 256)
    check_uint8(video)
    check_float(video)


def test_rounding_is_half_to_even_at_every_boundary():
    levels = (torch.arange(0, 256, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    half = levels.float()
    near = torch.stack([half, *(torch.nextafter(half, torch.tensor(end)) for end in (-9.0, 9.0))])
    check_uint8(near.view(1, 3, 1, 16, 16))
    check_uint8(levels.view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16))


@pytest.mark.parametrize("width", [1, 3, 8, 16, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_clamped_and_nan_behaves_as_in_stock(dtype, width):
    video = make((1, 3, 3, 4, width), dtype)
    video[:, :, 0], video[:, :, 1], video[:, :, 2, 2] = INF, -INF, NAN
    check_uint8(video)
    check_float(video)
    ours = video_to_uint8(video)
    assert (ours[:, 0] == 255).all()
    assert not ours[:, 1].any()
    assert not ours[:, 2, 2].any()


def test_video_is_not_modified():
    video = make((2, 3, 4, 5, 6))
    before = video.clone()
    video_to_uint8(video)
    video_to_float(video)
    assert torch.equal(video, before)


def test_an_empty_video_gives_no_frames():
    assert video_to_uint8(torch.empty(1, 3, 0, 4, 5)).shape == (1, 0, 4, 5, 3)
    assert video_to_float(torch.empty(0, 3, 2, 4, 5)).shape == (0, 2, 4, 5, 3)


RESULTS = ((video_to_uint8, torch.uint8), (video_to_float, torch.float32))


@pytest.mark.parametrize(("op", "kind"), RESULTS)
@settings(max_examples=100, deadline=None)
@given(videos, st.permutations(range(5)), st.sampled_from((None, 1, 2)))
def test_given_memory_can_have_any_strides(op, kind, video, order, frames_per_chunk):
    expected = op(video)
    out = make(expected.shape, order=order, sliced=True).mul(0).to(kind)
    assert op(video, out, frames_per_chunk) is out
    assert torch.equal(out.nan_to_num(2), expected.nan_to_num(2))


@pytest.mark.parametrize(("op", "kind"), RESULTS)
@settings(max_examples=100, deadline=None)
@given(videos)
def test_layout_matches_the_result(op, kind, video):
    result = op(video)
    assert layout(video, kind) == (tuple(result.shape), result.stride())


@pytest.mark.parametrize(("op", "kind"), RESULTS)
def test_memory_that_does_not_fit_raises(op, kind):
    video = torch.zeros(1, 3, 2, 4, 5)
    with pytest.raises(TypeError, match="float16"):
        op(video, torch.empty(1, 2, 4, 5, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"out must be \(1, 2, 4, 5, 3\)"):
        op(video, torch.empty(1, 2, 4, 5, 1, dtype=kind))


@pytest.mark.parametrize("op", [video_to_uint8, video_to_float])
def test_other_tensors_raise(op):
    with pytest.raises(TypeError, match="int32"):
        op(torch.zeros(1, 3, 2, 4, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="batch, channels"):
        op(torch.zeros(3, 2, 4, 5))
    with pytest.raises(ValueError, match="below 1"):
        op(torch.zeros(1, 3, 2, 4, 5), frames_per_chunk=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_device_is_not_synchronised_and_copied_from_at_most_once(dtype):
    video = torch.empty(2, 3, 9, 16, 16, dtype=dtype, device="meta")  # raises on every look at a value
    with Recorder() as pixels:
        assert video_to_uint8(video, frames_per_chunk=2).device.type == "meta"
    with Recorder() as floats:
        assert video_to_float(video, frames_per_chunk=2).device.type == "cpu"
    assert pixels.transfers == []
    assert floats.transfers == ["copy_"]
    assert not {*pixels.ops, *floats.ops} & {*WAITS}


@pytest.mark.parametrize(("op", "kind"), RESULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_is_copied_from_once_to_the_given_memory(op, kind, dtype):
    video = torch.empty(2, 3, 9, 16, 16, dtype=dtype, device="meta")
    shape, strides = layout(video, kind)
    out = torch.empty_strided(shape, strides, dtype=kind)
    with Recorder() as found:
        assert op(video, out, 2) is out
    assert found.transfers == ["copy_"]
    assert not {*found.ops} & {*WAITS}


@pytest.mark.parametrize("op", [video_to_uint8, video_to_float])
def test_only_chunks_are_allocated_besides_the_result(op):
    class Sizes(TorchDispatchMode):
        largest: tuple[int, ...] = (0, 0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.overloadpacket.__name__ and out.device.type != "meta":
                self.largest = (*sorted((*self.largest, out.numel()))[-2:],)
            return out

    video = make((1, 3, 40, 16, 16), torch.bfloat16)
    with Sizes() as sizes:
        op(video, frames_per_chunk=2)
    assert sizes.largest == (video[:, :, :2].numel(), video.numel())


@pytest.mark.parametrize(("op", "kind"), RESULTS)
def test_only_chunks_are_allocated_besides_the_given_memory(op, kind):
    class Sizes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.overloadpacket.__name__ and out.device.type != "meta":
                self.total += out.numel()
            return out

    video = make((1, 3, 40, 16, 16), torch.bfloat16)
    shape, strides = layout(video, kind)
    out = torch.empty_strided(shape, strides, dtype=kind)
    with Sizes() as sizes:
        op(video, out, 2)
    assert sizes.total <= 2 * video[:, :, :2].numel()
