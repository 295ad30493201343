"""The rotary embedding against the function that the installed diffusers runs."""

from __future__ import annotations

import contextlib
import inspect
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_patches.ops import rope

pytestmark = pytest.mark.upstream


def _stock_wan():
    from diffusers.models.transformers import transformer_wan

    call = inspect.unwrap(transformer_wan.WanAttnProcessor.__call__)
    code = next(c for c in call.__code__.co_consts if getattr(c, "co_name", "") == "apply_rotary_emb")
    return types.FunctionType(code, transformer_wan.__dict__)


def _tables(seq: int, dim: int, batch: int = 1, dtype: torch.dtype = torch.float32):
    angles = torch.rand(batch, seq, 1, dim // 2) * 100
    full = angles.repeat_interleave(2, dim=-1)
    return full.cos().to(dtype), full.sin().to(dtype)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    expected = _stock_wan()(x, cos, sin)
    for rotate in (rope.apply_rotary_emb, rope.stacked, rope.apply_rotary_emb.reference):
        actual = rotate(x, cos[..., 0::2], sin[..., 1::2])
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), rotate.__name__
    assert rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2]).stride() == expected.stride()


@contextlib.contextmanager
def _fast_calls():
    calls, fast = [], rope.complex_rows.function
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope.complex_rows, "function", lambda *args: calls.append(1) or fast(*args))
        yield calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1000, 12, 128),
        (2, 517, 3, 64),
        (1, 8191, 2, 96),
        (1, 777, 5, 32),
        (1, 4096, 20, 112),
        (2, 517, 3, 72),
        (1, 999, 5, 44),
    ],
)
def test_rope_is_bit_identical_to_stock(shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x = torch.randn(shape).to(dtype)
        cos, sin = _tables(shape[1], shape[3])
        with _fast_calls() as calls:
            rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2])
        assert calls  # or this test says nothing about the fast form
        _check(x, cos, sin)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 400),
    heads=st.integers(1, 6),
    half=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    table_dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_dtype(batch, seq, heads, half, dtype, table_dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, seq, heads, 2 * half, dtype=torch.float64).to(dtype)
    _check(x, *_tables(seq, 2 * half, batch if seed % 2 else 1, table_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_fused_projection_and_permuted_input(dtype):
    torch.manual_seed(0)
    cos, sin = _tables(600, 64)
    fused = torch.randn(2, 600, 3 * 4 * 64).to(dtype)
    for part in fused.chunk(3, dim=-1):
        _check(part.unflatten(2, (4, -1)), cos, sin)
    odd = torch.randn(1 + 600 * 4 * 64).to(dtype)[1:].view(1, 600, 4, 64)  # pairs that are not aligned
    _check(odd, cos, sin)
    permuted = torch.randn(2, 4, 600, 64).to(dtype).transpose(1, 2)
    expected = _stock_wan()(permuted, cos, sin)
    actual = rope.apply_rotary_emb(permuted, cos[..., 0::2], sin[..., 1::2])
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 2048, 4, 64)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-42, 3e38, -3e38])
    x.view(-1)[torch.randperm(x.numel())[:20000]] = special.repeat(2500)
    x = x.to(dtype)
    cos, sin = _tables(2048, 64)
    cos[:, :64], sin[:, 64:128] = 0, 0
    expected = _stock_wan()(x, cos, sin)
    actual = rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2])
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_helios_table_per_batch():
    helios = pytest.importorskip("diffusers.models.transformers.transformer_helios")
    import wan_patches

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch in (1, 2):
            x = torch.randn(2, 1500, 4, 64).to(dtype)
            table = torch.cat(_tables(1500, 64, batch), dim=-1).squeeze(2)
            stock = helios.apply_rotary_emb_transposed(x, table)
            with wan_patches.enabled(["rope"]):
                assert torch.equal(helios.apply_rotary_emb_transposed(x, table), stock)


def _forget():
    rope._is_exact.cache_clear()
    rope.apply_rotary_emb.forget()


def test_inexact_processor_is_detected(monkeypatch):
    """Where complex products round differently, the probe must keep the plain formulation."""
    exact = rope.complex_rows.function
    monkeypatch.setattr(rope.complex_rows, "function", lambda x, cos, sin: exact(x, cos, sin) * (1 + 2**-7))
    _forget()
    try:
        _check(torch.randn(1, 3000, 4, 64), *_tables(3000, 64))
    finally:
        _forget()


def test_user_random_state_and_input_are_unchanged():
    _forget()
    torch.manual_seed(3)
    x = torch.randn(1, 3000, 4, 64)
    before, copy = torch.get_rng_state(), x.clone()
    cos, sin = _tables(3000, 64)
    torch.set_rng_state(before)
    rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, copy)


def test_autograd_and_transforms_see_plain_torch():
    cos, sin = _tables(3000, 64)
    half = cos[..., 0::2], sin[..., 1::2]
    x = torch.randn(1, 3000, 4, 64, requires_grad=True)
    stock_x = x.detach().clone().requires_grad_()
    rope.apply_rotary_emb(x, *half).square().sum().backward()
    _stock_wan()(stock_x, cos, sin).square().sum().backward()
    assert torch.equal(x.grad, stock_x.grad)
    batched = torch.func.vmap(lambda v: rope.apply_rotary_emb(v, *half))(x.detach()[None])
    assert torch.equal(batched[0], rope.apply_rotary_emb.reference(x.detach(), *half))
    primal, tangent = torch.func.jvp(lambda v: rope.apply_rotary_emb(v, *half), (x.detach(),), (x.detach(),))
    assert torch.equal(primal, tangent)  # it is linear
    with torch.device("meta"):
        assert rope.apply_rotary_emb(torch.empty(1, 3000, 4, 64), *[t.to("meta") for t in half]).is_meta


@pytest.mark.parametrize("learnt", [("cos",), ("sin",), ("cos", "sin"), ("x", "cos", "sin")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learnt_tables_have_the_gradients_of_stock(dtype, learnt):
    torch.manual_seed(0)
    cos, sin = _tables(600, 64)
    inputs = {"x": torch.randn(1, 600, 4, 64).to(dtype), "cos": cos, "sin": sin}

    def gradients(rotate):
        of = {name: value.clone().requires_grad_(name in learnt) for name, value in inputs.items()}
        rotate(**of).float().square().sum().backward()
        return [of[name].grad for name in learnt]

    stock = _stock_wan()
    expected = gradients(lambda x, cos, sin: stock(x, cos, sin))
    halves = gradients(lambda x, cos, sin: rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2]))
    assert all(map(torch.equal, halves, expected))
    both = gradients(lambda x, cos, sin: rope.apply_rotary_emb_qk(x.detach(), x, cos[..., 0::2], sin[..., 1::2])[1])
    assert all(map(torch.equal, both, expected))


def test_learnt_helios_table_has_the_gradients_of_stock():
    helios = pytest.importorskip("diffusers.models.transformers.transformer_helios")
    import wan_patches

    torch.manual_seed(0)
    x, table = torch.randn(1, 600, 4, 64), torch.cat(_tables(600, 64), dim=-1).squeeze(2).requires_grad_()

    def gradient():
        (found,) = torch.autograd.grad(helios.apply_rotary_emb_transposed(x, table).square().sum(), table)
        return found

    expected = gradient()
    with wan_patches.enabled(["rope"]):
        assert torch.equal(gradient(), expected)


def test_other_tables_use_plain_torch():
    class Watched(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            Watched.seen += function is torch.Tensor.mul
            return super().__torch_function__(function, types, args, kwargs)

    x, (cos, sin) = torch.randn(1, 600, 4, 64), _tables(600, 64)
    with _fast_calls() as calls:
        rotated = rope.apply_rotary_emb(x, cos[..., 0::2].as_subclass(Watched), sin[..., 1::2])
    assert type(rotated) is Watched
    assert not calls
    assert Watched.seen == 2
    assert torch.equal(rotated.as_subclass(torch.Tensor), _stock_wan()(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_dtype_and_device_do_not_matter(dtype):
    x, (cos, sin) = torch.randn(1, 3000, 4, 64).to(dtype), _tables(3000, 64)
    expected = _stock_wan()(x, cos, sin)
    before = torch.get_default_dtype()
    _forget()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), _fast_calls() as calls:
            actual = rope.apply_rotary_emb(x, cos[..., 0::2], sin[..., 1::2])
    finally:
        torch.set_default_dtype(before)
    assert calls
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 2])
def test_queries_and_keys_together_are_bit_identical_to_stock(dtype, heads):
    torch.manual_seed(0)
    query, key = torch.randn(1, 600, 4, 64).to(dtype), torch.randn(1, 600, heads, 64).to(dtype)
    cos, sin = _tables(600, 64)
    rotated = rope.apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])
    for actual, x in zip(rotated, (query, key), strict=True):
        expected = _stock_wan()(x, cos, sin)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize(
    ("shape", "tables", "dtype"),
    [
        ((2, 6, 4, 64), (1, 6, 1, 32), torch.float64),
        ((2, 6, 4, 64), (1, 6, 4, 32), torch.bfloat16),  # an angle for each head
        ((6, 4, 64), (6, 1, 32), torch.bfloat16),
        ((2, 0, 4, 64), (1, 0, 1, 32), torch.bfloat16),
        ((1, 2, 1024, 64), (1, 2, 1, 32), torch.bfloat16),  # more channels than one block goes through
    ],
)
def test_input_unsupported_by_the_kernel_uses_the_plain_formulation(shape, tables, dtype, monkeypatch):
    monkeypatch.setattr(rope.kernels, "is_usable", lambda device: True)
    x, (cos, sin) = torch.randn(shape).to(dtype), torch.randn(2, *tables)
    assert torch.equal(rope.apply_rotary_emb_qk(x, x, cos, sin)[1], rope.apply_rotary_emb.reference(x, cos, sin))
    assert rope.why_no_kernel(x, cos, sin)
    small, table = torch.randn(1, 2, 4, 64, dtype=torch.bfloat16), torch.randn(1, 2, 1, 32)
    assert rope.why_no_kernel(small, table, table) is None  # or the above would say nothing
    assert rope.why_no_kernel(small, table.bfloat16(), table)
