"""The cross-fade of tiles, against the installed `AutoencoderKLWan.blend_v` and `blend_h`."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_patches.ops import tiling
from wan_patches.ops.tiling import DTYPES, blend, chunked, cross_fade, vectorised
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
if not hasattr(autoencoders.AutoencoderKLWan, "blend_v"):
    pytest.skip("this diffusers has no tiling for Wan's VAE", allow_module_level=True)

pytestmark = pytest.mark.upstream

STOCK = {
    -2: functools.partial(autoencoders.AutoencoderKLWan.blend_v, None),
    -1: functools.partial(autoencoders.AutoencoderKLWan.blend_h, None),
}
INF, NAN = float("inf"), float("nan")


def tiles(shape, dtype, dim=-1, second=None, seed=0):
    """Two tiles with values of all magnitudes; the second has another length along `dim`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [list(shape), list(shape)]
    shapes[1][dim] = second or shape[dim]
    made = []
    for sizes in shapes:
        values = torch.randn(sizes, generator=generator) * torch.randint(-12, 6, sizes, generator=generator).exp2()
        made.append(values.to(dtype))
    return made


def same_bits(a, b):
    # nan has many encodings, and which of them comes out depends on the lane of the processor
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    assert torch.equal(a.nan_to_num(0, INF, -INF).view(integers), b.nan_to_num(0, INF, -INF).view(integers))


def check(first, second, extent, dim):
    mine, kept = second.clone(), first.clone()
    expected = STOCK[dim](first.clone(), second, extent)
    assert blend(first, mine, extent, dim) is mine
    same_bits(mine, expected)
    same_bits(first, kept)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extent", [-3, 0, 1, 2, 7, 16, 33, 64, 500])
def test_blends_have_the_bits_of_stock(extent, dtype, dim):
    check(*tiles((2, 3, 5, 40, 48), dtype), extent, dim)
    check(*tiles((1, 16, 2, 64, 64), dtype, dim, second=9), extent, dim)
    check(*tiles((1, 3, 1, 7, 130), dtype, dim, second=100), extent, dim)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 4, 6, 40, 40))),
    second=st.integers(1, 40),
    extent=st.integers(0, 45),
    dim=st.sampled_from([-2, -1]),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([1, 500, 1 << 19]),
    seed=st.integers(0, 9),
)
def test_any_tiles(shape, second, extent, dim, dtype, chunk, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "_CHUNK", chunk)
        patch.setattr(tiling, "_FEW", dict.fromkeys((-2, -1), 0))
        check(*tiles(shape, dtype, dim, second, seed), extent, dim)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_kept(dtype, dim):
    first, second = tiles((1, 3, 2, 24, 24), dtype)
    for nth, value in enumerate((NAN, INF, -INF, -0.0)):
        first[0, 0, 0, :, nth::7] = value
        second[0, 1, :, nth::5] = value
        second[0, 0, 0, nth::3] = value
    check(first, second, 20, dim)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (4, 3, 2, 1, 0)])
def test_any_strides(order, dtype, dim):
    back = sorted(range(5), key=order.__getitem__)
    first, second = (tile.permute(order).contiguous().permute(back) for tile in tiles((2, 3, 5, 40, 48), dtype))
    check(first, second, 16, dim)
    check(first[..., 1:, 2:], second[..., 1:, 2:], 16, dim)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_forms_are_bit_identical(dtype, dim):
    tail, head = tiles((1, 3, 5, 17, 23), dtype)
    expected = cross_fade.reference(tail, head, dim)
    same_bits(expected, STOCK[dim](tail, head.clone(), 100))
    same_bits(vectorised(tail, head, dim), expected)
    chunked(tail, head, dim)
    same_bits(head, expected)


def test_fused_multiply_add_is_detected():
    tail, head = tiles((1, 3, 5, 17, 23), torch.float32)
    falling, rising = tiling._weights(head, -2)
    assert not torch.equal(torch.addcmul(tail * falling, head, rising), cross_fade.reference(tail, head, -2))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in DTYPES:
            check(*tiles((1, 3, 41, 64, 128), dtype), 48, -2)
            check(*tiles((1, 3, 41, 64, 128), dtype), 48, -1)
    finally:
        torch.set_num_threads(before)


def test_scratch_is_small_compared_to_the_overlap(monkeypatch):
    sizes = []
    mul = torch.mul
    monkeypatch.setattr(torch, "mul", lambda *args, out: sizes.append(out.numel()) or mul(*args, out=out))
    first, second = tiles((1, 3, 81, 128, 256), torch.float32)
    check(first, second, 64, -2)
    assert len(sizes) > 2
    assert max(sizes) <= tiling._CHUNK


def test_inexact_processor_uses_the_plain_form(monkeypatch):
    monkeypatch.setattr(tiling, "_is_exact", lambda dtype: False)
    monkeypatch.setattr(tiling, "chunked", lambda *_: pytest.fail("used"))
    check(*tiles((1, 3, 5, 17, 23), torch.float32), 5, -1)


def test_other_devices_are_verified_by_the_gate(as_on_cuda):
    first, second = tiles((1, 3, 5, 17, 23), torch.bfloat16)
    expected = STOCK[-1](first, second.clone(), 6)
    for _ in range(2):  # at first sight, and after it
        tail, head = first[..., -6:], second.clone()[..., :6]
        same_bits(cross_fade(tail, head, -1), expected[..., :6])
    assert [verdict.exact for verdict in gate.verdicts()] == [True]
    assert sorted((way.form, way.reason) for way in tally.counted()) == [
        ("", tally.FIRST_SIGHT),
        ("all rows at once", ""),
    ]
