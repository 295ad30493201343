"""Pillow's Lanczos on tensors, against Pillow itself; bytes to [-1, 1], against the installed diffusers."""

from __future__ import annotations

import threading

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wan_patches.ops import resize
from wan_patches.ops.resize import lanczos_resize, normalize_uint8, supported

LANCZOS = PIL.Image.Resampling.LANCZOS
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero")
MATMULS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "convolution", "einsum", "dot")


class Recorder(TorchDispatchMode):
    """Writes down the operations that run, and which of them move data between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.transfers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.ops.append(name)
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None and torch.device(device) != args[0].device:
            self.transfers.append(name)
        if name == "copy_" and args[0].device != args[1].device:
            self.transfers.append(name)
            return args[0]
        return func(*args, **kwargs)


def pixels(seed: int, count: int, height: int, width: int, channels: int, binary: bool = False) -> np.ndarray:
    random = np.random.default_rng(seed)
    if binary:  # black and white only: overshoots on both sides, clipped between the passes
        return random.integers(0, 2, (count, height, width, channels), np.uint8) * np.uint8(255)
    return random.integers(0, 256, (count, height, width, channels), np.uint8)


def by_pillow(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each image, or each of its channels where they are not three, resized by Pillow."""
    if images.shape[-1] == 3:
        return np.stack([np.asarray(PIL.Image.fromarray(i).resize((width, height), LANCZOS)) for i in images])
    planes = np.moveaxis(images, -1, 0)[..., None].repeat(3, axis=-1)
    return np.stack([by_pillow(plane, height, width)[..., 0] for plane in planes], axis=-1)


def check(images: np.ndarray, height: int, width: int) -> None:
    assert supported(*images.shape[1:3], height, width)
    ours = lanczos_resize(torch.from_numpy(images), height, width)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    np.testing.assert_array_equal(ours.numpy(), by_pillow(images, height, width))


sizes = st.one_of(st.integers(1, 8), st.integers(1, 48))


@settings(max_examples=400, deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from((1, 3, 3, 4)), st.booleans(), st.integers(0, 2**32))
@example(1, 1, 1, 1, 3, False, 0)
@example(1, 1, 9, 7, 3, False, 0)
@example(40, 1, 3, 9, 3, True, 0)
def test_resize_has_pillows_bytes(in_height, in_width, height, width, channels, binary, seed):
    check(pixels(seed, 2, in_height, in_width, channels, binary), height, width)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 40), st.integers(-2, 2), st.integers(0, 2**32))
def test_resize_has_pillows_bytes_where_its_pass_order_changes(in_width, width, height, offset, seed):
    in_height = max(1, height + 2 * (in_width - width) + offset)
    check(pixels(seed, 1, in_height, in_width, 3), height, width)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_resize_has_pillows_bytes_to_sixteenfold_reduction(down_y, down_x, height, width, seed):
    check(pixels(seed, 1, height * down_y + seed % 3, width * down_x, 3, binary=True), height, width)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.booleans(), st.integers(0, 2**32))
def test_resize_of_one_axis_is_one_pass(kept, before, after, vertical, seed):
    shape, size = ((before, kept), (after, kept)) if vertical else ((kept, before), (kept, after))
    check(pixels(seed, 2, *shape, 3), *size)


@pytest.mark.parametrize(
    "sizes",
    [
        (200, 2, 150, 5),
        (201, 2, 150, 5),
        (201, 2, 201, 5),
        (303, 3, 20, 3),
        (720, 1280, 480, 832),
        (333, 517, 480, 832),
        (1080, 607, 480, 832),
    ],
)
def test_resize_has_pillows_bytes_at_columns_and_real_sizes(sizes):
    check(pixels(1, 1, *sizes[:2], 3), *sizes[2:])


def test_resize_takes_grayscale_as_pillow_does():
    image = pixels(2, 1, 31, 40, 1)[0, ..., 0]
    ours = lanczos_resize(torch.from_numpy(image)[None, ..., None], 17, 23)
    pillow = np.asarray(PIL.Image.fromarray(image).resize((23, 17), LANCZOS))
    np.testing.assert_array_equal(ours[0, ..., 0].numpy(), pillow)


def test_resize_in_chunks_and_of_strided_images(monkeypatch):
    monkeypatch.setattr(resize, "_CPU_CHUNK", 2 * 30 * 15 * 3)
    images = pixels(3, 7, 30, 20, 3)
    strided = torch.from_numpy(images).permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert not strided.is_contiguous()
    np.testing.assert_array_equal(lanczos_resize(strided, 12, 15).numpy(), by_pillow(images, 12, 15))


def test_resize_to_the_same_size_copies_and_empty_input_gives_empty_output():
    images = torch.from_numpy(pixels(4, 2, 5, 6, 3))
    same = lanczos_resize(images, 5, 6)
    assert torch.equal(same, images)
    assert same.data_ptr() != images.data_ptr()
    assert lanczos_resize(images[:0], 3, 4).shape == (0, 3, 4, 3)


def test_resize_rejects_unsupported_input():
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="float32"):
        lanczos_resize(images.float(), 2, 2)
    with pytest.raises(ValueError, match="shape"):
        lanczos_resize(images[0], 2, 2)
    with pytest.raises(ValueError, match="use Pillow"):
        lanczos_resize(images, 0, 2)
    assert not supported(0, 4, 2, 2)
    assert not supported(4, 4, 2, -1)
    assert not supported(4, 1 << 20, 4, 1 << 19)


def test_a_sum_that_could_overflow_is_unsupported(monkeypatch):
    assert resize._weights.__wrapped__(48, 20) is not None
    stock = resize._lanczos
    monkeypatch.setattr(resize, "_lanczos", lambda x: stock(x) - 0.18)  # deep negative lobes
    assert resize._weights.__wrapped__(48, 20) is None


def test_no_partial_sum_overflows():
    for size_in, size_out in [
        (1, 9),
        (2, 999),
        (4, 999),
        (48, 3),
        (48, 47),
        (47, 48),
        (1280, 832),
        (9999, 10),
    ]:
        weights = resize._weights(size_in, size_out)[1].astype(np.int64)
        assert 255 * np.abs(weights).sum(0).max() + (1 << 21) < 2**31
        assert np.abs(weights).sum(0).max() < 1.58 * 2**22


@pytest.fixture
def forget_pass_order():
    resize._pass_order.cache_clear()
    yield
    resize._pass_order.cache_clear()


@pytest.mark.parametrize("rule", list(resize._RULES))
def test_probes_distinguish_every_pass_order(rule, monkeypatch, forget_pass_order):
    def pillow(image, size, resample):
        assert resample == LANCZOS
        pixels, (width, height) = np.asarray(image), size
        vertical, horizontal = resize._weights(len(pixels), height), resize._weights(pixels.shape[1], width)
        if resize._RULES[rule](*pixels.shape, height, width):
            return PIL.Image.fromarray(resize._rows(resize._rows(pixels, vertical).T, horizontal).T.copy())
        return PIL.Image.fromarray(resize._rows(resize._rows(pixels.T, horizontal).T, vertical))

    monkeypatch.setattr(PIL.Image.Image, "resize", pillow)
    assert resize._pass_order() == rule


def test_the_installed_pillow_is_known():
    assert resize._pass_order() in resize._RULES


@pytest.mark.parametrize("fault", ["order", "arithmetic"])
def test_an_unknown_pillow_is_unsupported(fault, monkeypatch, forget_pass_order):
    original = PIL.Image.Image.resize

    def unknown(image, size, resample):
        if fault == "arithmetic":
            return PIL.Image.fromarray(np.asarray(original(image, size, resample)) ^ 1)
        image = original(image, (image.width, size[1]), resample)  # always the vertical pass first
        return original(image, size, resample)

    monkeypatch.setattr(PIL.Image.Image, "resize", unknown)
    assert not supported(12, 9, 5, 7)
    assert supported(12, 9, 12, 9)
    with pytest.raises(ValueError, match="use Pillow"):
        lanczos_resize(torch.zeros(1, 12, 9, 3, dtype=torch.uint8), 5, 7)


@pytest.fixture
def no_tables():
    def clear() -> None:
        resize._tables.clear()
        resize._values.clear()

    clear()
    yield
    clear()


def test_resize_uploads_once_and_never_waits(no_tables):
    images = torch.empty(3, 33, 44, 3, dtype=torch.uint8, device="meta")  # raises on every look at a value
    assert supported(33, 44, 20, 30)
    first, second = Recorder(), Recorder()
    with first:
        lanczos_resize(images, 20, 30)
    with second:
        out = lanczos_resize(images, 20, 30)
        normalize_uint8(out)
    assert first.transfers == ["_to_copy"] * 2  # one table per axis
    assert second.transfers == ["_to_copy"]  # the normalisation's
    assert not {*first.ops, *second.ops} & {*WAITS, *MATMULS}
    assert out.shape == (3, 20, 30, 3)


def test_resize_is_integer_arithmetic():
    class IntegersOnly(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert out.dtype in (torch.uint8, torch.int32) if isinstance(out, torch.Tensor) else True, func
            return out

    images = torch.from_numpy(pixels(5, 2, 33, 44, 3))
    assert supported(33, 44, 20, 30)
    with IntegersOnly():
        lanczos_resize(images, 20, 30)


def test_launches_do_not_grow_with_the_images_of_a_chunk():
    def launches(count: int) -> int:
        with Recorder() as recorder:
            lanczos_resize(torch.empty(count, 36, 36, 3, dtype=torch.uint8, device="meta"), 24, 24)
        return len(recorder.ops)

    launches(1)
    assert launches(1) == launches(81)


def test_tables_are_bounded_and_shared_by_threads(no_tables, monkeypatch):
    monkeypatch.setattr(resize, "_MAX_TABLES", 4)
    images = pixels(6, 1, 20, 20, 3)
    expected = {size: by_pillow(images, size, size) for size in range(5, 15)}
    wrong: list[int] = []

    def work() -> None:
        for size, pillow in expected.items():
            if not np.array_equal(lanczos_resize(torch.from_numpy(images), size, size).numpy(), pillow):
                wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(resize._tables) == 4


def test_tables_made_in_inference_mode_are_usable_outside_it(no_tables):
    images = pixels(7, 1, 20, 20, 3)
    with torch.inference_mode():
        lanczos_resize(torch.from_numpy(images), 9, 9)
        resize._look_up(torch.from_numpy(images))
    check(images, 9, 9)
    resize._look_up(torch.from_numpy(images))


ALL_BYTES = np.stack([np.arange(256, dtype=np.uint8)] * 3, axis=-1).reshape(1, 16, 16, 3)


def test_normalize_equals_stock_for_every_byte():
    stock = VideoProcessor().preprocess(PIL.Image.fromarray(ALL_BYTES[0]))
    ours = normalize_uint8(torch.from_numpy(ALL_BYTES))
    assert ours.dtype == stock.dtype == torch.float32
    assert torch.equal(ours, stock)
    assert torch.equal(resize._look_up(torch.from_numpy(ALL_BYTES)).permute(0, 3, 1, 2), stock)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_normalize_has_the_strides_of_stock(count, height, width, seed):
    images = pixels(seed, count, height * 8, width * 8, 3)
    stock = VideoProcessor().preprocess([PIL.Image.fromarray(i) for i in images])
    ours = normalize_uint8(torch.from_numpy(images))
    assert torch.equal(ours, stock)
    assert ours.stride() == stock.stride()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_normalize_writes_into_any_strides(order, chunk, monkeypatch):
    monkeypatch.setattr(resize, "_CPU_CHUNK", chunk)
    images = torch.from_numpy(pixels(8, 3, 6, 7, 3))
    shape = (3, 3, 6, 7)
    memory = torch.full([shape[axis] + 1 for axis in order], 9.0)
    out = memory.permute(*np.argsort(order))[:3, :3, :6, :7]
    assert normalize_uint8(images, out=out) is out
    assert torch.equal(out, normalize_uint8(images))
    assert (memory == 9).sum() == memory.numel() - out.numel()


def test_normalize_rejects_other_tensors():
    images = torch.zeros(1, 4, 5, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="float32"):
        normalize_uint8(images.float())
    with pytest.raises(TypeError, match="bfloat16"):
        normalize_uint8(images, out=torch.empty(1, 3, 4, 5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 5\)"):
        normalize_uint8(images, out=torch.empty(1, 4, 5, 3))
