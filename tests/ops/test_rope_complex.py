"""Products of complex numbers against the installed diffusers' own, at sizes where stock's threads share the work."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import embeddings

from wan_patches.ops import rope_complex
from wan_patches.ops.rope_complex import apply_complex_rotary_emb, in_chunks
from wan_patches.patching import tally


@pytest.fixture(params=[1, 2, 3, 4, 5, 6])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1000, 12, 128), (2, 517, 3, 64), (1, 8191, 2, 96), (1, 777, 5, 32)])
def test_bits_of_stock(shape, dtype, x_dtype, threads, any_size):
    torch.manual_seed(0)
    x = torch.randn(shape).to(x_dtype)
    for batch, heads in ((1, 1), (shape[0], 1), (1, shape[2])):
        angles = torch.rand(batch, shape[1], heads, shape[3] // 2, dtype=dtype) * 100
        freqs = torch.polar(torch.ones_like(angles), angles)
        expected = apply_complex_rotary_emb.reference(x, freqs, dtype)
        actual = apply_complex_rotary_emb(x, freqs, dtype)
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(actual, expected)
        if heads == 1:  # as Lumina has them
            assert torch.equal(actual, embeddings.apply_rotary_emb(x, freqs.squeeze(2), use_real=False))
    pairs = x.numel() // 2
    share = -(-pairs // min(threads, -(-pairs // 32768)))  # of one of stock's threads
    is_fast = x_dtype != dtype and (share == pairs or share % 16 == 0)
    assert {way.form for way in tally.counted()} == {in_chunks.name if is_fast else ""}


def test_threads_that_share_a_row_are_left_to_stock(any_size, one_thread):
    x = torch.randn(1, 1024, 3, 96).bfloat16()
    freqs = torch.polar(torch.ones(1, 1024, 1, 48), torch.rand(1, 1024, 1, 48))
    found = {}
    for threads in (4, 5):
        torch.set_num_threads(threads)
        found[threads] = in_chunks.why_not(x, freqs, torch.float32)
    assert found[4] is None
    assert "threads share a row" in str(found[5])


def test_inexact_processor_is_detected(any_size, monkeypatch):
    """Where complex products of a few tokens round differently, the probe must keep stock's operations."""
    exact = in_chunks.function
    monkeypatch.setattr(in_chunks, "function", lambda *args: exact(*args) * (1 + 2**-7))
    rope_complex._is_exact.cache_clear()
    apply_complex_rotary_emb.forget()
    try:
        x = torch.randn(1, 1000, 4, 64).bfloat16()
        freqs = torch.polar(torch.ones(1, 1000, 1, 32), torch.rand(1, 1000, 1, 32))
        expected = apply_complex_rotary_emb.reference(x, freqs, torch.float32)
        assert torch.equal(apply_complex_rotary_emb(x, freqs, torch.float32), expected)
    finally:
        rope_complex._is_exact.cache_clear()
        apply_complex_rotary_emb.forget()


def test_random_state_of_the_user_is_unchanged(any_size):
    rope_complex._is_exact.cache_clear()
    before = torch.get_rng_state()
    x, angles = torch.ones(1, 1000, 4, 64).bfloat16(), torch.ones(1, 1000, 1, 32)
    apply_complex_rotary_emb(x, torch.polar(angles, angles), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
