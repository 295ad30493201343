"""The RMS norm against `torch.nn.RMSNorm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_patches.ops import rms_norm as op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, seq, dim = draw(st.integers(1, 3)), draw(st.integers(1, 23)), draw(st.sampled_from((1, 8, 24, 96, 640)))
    dtype = draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(("dense", "part of qkv", "transposed")))
    x = torch.randn(batch, seq, 3 * dim if layout == "part of qkv" else dim).to(dtype)
    if layout == "part of qkv":
        x = x.chunk(3, dim=-1)[1]
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.randn(dim).to(dtype) if draw(st.booleans()) else None
    return x, weight, draw(st.sampled_from((1e-6, 1e-5, None))), draw(st.booleans())


def _stock(x, weight, eps, cast):
    return F.rms_norm(x.float() if cast else x, x.shape[-1:], weight, eps).type_as(x)


@pytest.fixture
def fast_forms(monkeypatch):
    calls, form = [], op.in_chunks.function
    monkeypatch.setattr(op.in_chunks, "function", lambda *args: calls.append(1) or form(*args))
    return calls


def test_has_the_bits_of_torch(fast_forms, any_size, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK", 200)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        expected, actual = _stock(*case), op.rms_norm(*case)
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)

    with torch.no_grad():
        check()
    assert len(fast_forms) > 50


@pytest.mark.parametrize(
    ("dim", "eps", "cast"), [(1536, 1e-6, False), (5120, 1e-6, False), (64, None, True), (128, None, False)]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_real_sizes_and_threads(dtype, threads, dim, eps, cast, fast_forms):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x, weight = torch.randn(1, 6_500_000 // dim, dim).to(dtype), torch.randn(dim).to(dtype)
        assert torch.equal(op.rms_norm(x, weight, eps, cast), _stock(x, weight, eps, cast))
    finally:
        torch.set_num_threads(before)
    assert fast_forms


@pytest.mark.parametrize("shape", [(1, 4097, 2240), (2, 1500, 24, 128), (9_000_000, 1), (300, 30_001)])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_norm_of_diffusers(dtype, threads, shape):
    """The reference is compared with diffusers' class in the tests of the patch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x = torch.randn(shape).to(dtype)
        for weight in (torch.randn(shape[-1]).to(dtype), None):
            assert op.twice_rounded_in_chunks.why_not(x, weight, 1e-6) is None
            assert torch.equal(op.twice_rounded(x, weight, 1e-6), op.twice_rounded.reference(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)


def test_rows_that_torch_splits_between_threads_are_refused():
    assert op.twice_rounded_in_chunks.why_not(torch.randn(300, 1 << 15), None, 1e-6)


def test_trial_detects_another_order_in_the_norm_of_diffusers(monkeypatch):
    op._is_exact_twice.cache_clear()
    form = op.twice_rounded_in_chunks.function
    monkeypatch.setattr(op.twice_rounded_in_chunks, "function", lambda x, weight, eps: form(x, weight, 2 * eps))
    assert not op._is_exact_twice(torch.float32, 640, 1)
    op._is_exact_twice.cache_clear()


@torch.no_grad()
def test_torch_is_used_if_its_order_of_operations_differs(fast_forms, any_size, monkeypatch):
    monkeypatch.setattr(op, "_is_exact", lambda *args: False)
    x = torch.randn(1, 700, 640)
    assert torch.equal(op.rms_norm(x, None, 1e-6), F.rms_norm(x, (640,), None, 1e-6))
    assert fast_forms == []


def test_trial_detects_another_order_of_operations(monkeypatch):
    op._is_exact.cache_clear()
    form = op.in_chunks.function
    monkeypatch.setattr(op.in_chunks, "function", lambda x, weight, eps, cast: form(x, weight, 2 * eps, cast))
    assert not op._is_exact(torch.float32, 640, 1)
    op._is_exact.cache_clear()


def test_gradients_are_those_of_torch(fast_forms, any_size):
    def grads(norm):
        torch.manual_seed(0)
        x, weight = torch.randn(1, 9, 24, requires_grad=True), torch.randn(24, requires_grad=True)
        norm(x, weight).square().sum().backward()
        return x.grad, weight.grad

    ours = grads(lambda x, weight: op.rms_norm(x, weight, 1e-6))
    stock = grads(lambda x, weight: F.rms_norm(x, (24,), weight, 1e-6))
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    assert fast_forms == []
