"""The rotary embedding's kernel against the functions that the installed diffusers runs."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from comparing import same

from wan_patches.ops.triton.rope import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stock(x, cos, sin):
    from diffusers.models.transformers import transformer_wan

    call = inspect.unwrap(transformer_wan.WanAttnProcessor.__call__)
    code = next(c for c in call.__code__.co_consts if getattr(c, "co_name", "") == "apply_rotary_emb")
    return types.FunctionType(code, transformer_wan.__dict__)(x, cos, sin)


def tables(seq, dim, batch=1):
    angles = torch.rand(batch, seq, 1, dim // 2) * 100
    full = angles.repeat_interleave(2, dim=-1)
    return full.cos(), full.sin()


def check(q, k, cos, sin):
    q_out, k_out = rotate(q, k, cos[..., 0::2], sin[..., 1::2])
    same(q_out, stock(q, cos, sin))
    same(k_out, stock(k, cos, sin))
    alone, nothing = rotate(q, None, cos[..., 0::2], sin[..., 1::2])
    same(alone, q_out)
    assert nothing is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    # of the published models; heads that do not fill a tile; channels that are no power of two; the least
    [(1, 5, 40, 128), (2, 7, 12, 128), (1, 3, 5, 96), (2, 4, 3, 44), (1, 2, 33, 64), (3, 1, 1, 2), (1, 2, 2, 6)],
)
def test_bits_of_stock(shape, dtype):
    for batch in (1, shape[0]):
        q, k = torch.randn(2, *shape).to(dtype)
        check(q, k, *tables(shape[1], shape[3], batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection_and_permuted_input(dtype):
    cos, sin = tables(6, 64)
    q, k, _ = torch.randn(2, 6, 3 * 4 * 64).to(dtype).chunk(3, dim=-1)
    check(q.unflatten(2, (4, -1)), k.unflatten(2, (4, -1)), cos, sin)
    permuted = torch.randn(2, 4, 6, 64).to(dtype).transpose(1, 2)
    check(permuted, permuted.contiguous(), cos, sin)
    check(torch.randn(1 + 6 * 4 * 64).to(dtype)[1:].view(1, 6, 4, 64), permuted[:1], cos, sin)  # not aligned
    check(torch.randn(2, 6, 64, 4).to(dtype).transpose(2, 3), permuted, cos, sin)  # pairs are not neighbours
    check(torch.randn(1, 1, 4, 64).to(dtype).expand(2, 6, -1, -1), permuted, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    x = torch.randn(1, 32, 4, 64)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-42, 3e38, -3e38])
    x.view(-1)[torch.randperm(x.numel())[:2000]] = special.repeat(250)
    cos, sin = tables(32, 64)
    cos[:, :4], sin[:, 4:8] = 0, 0
    check(x.to(dtype), x.flip(1).to(dtype), cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_tables_of_helios(dtype, batch):
    helios = pytest.importorskip("diffusers.models.transformers.transformer_helios")
    q, k = torch.randn(2, 2, 9, 4, 64).to(dtype)
    packed = torch.cat(tables(9, 64, batch), dim=-1).squeeze(2)
    cos, sin = packed.unsqueeze(-2).chunk(2, dim=-1)
    ours = rotate(q, k, cos[..., 0::2], sin[..., 1::2])
    same(ours[0], helios.apply_rotary_emb_transposed(q, packed))
    same(ours[1], helios.apply_rotary_emb_transposed(k, packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_and_gate(dtype, as_on_cuda, monkeypatch):
    """As on a GPU, where `apply_rotary_emb` takes the kernel once it has proved itself."""
    from diffusers.models.transformers import transformer_wan

    import wan_patches
    from wan_patches.bindings.qk import rotate_both
    from wan_patches.ops import rope
    from wan_patches.patching.fidelity import gate

    q, k = torch.randn(2, 1, 8, 4, 64).to(dtype)
    cos, sin = tables(8, 64)
    expected = stock(q, cos, sin), stock(k, cos, sin)
    for _ in range(2):
        for ours, theirs in zip(rope.apply_rotary_emb_qk(q, k, cos[..., 0::2], sin[..., 1::2]), expected):
            same(ours, theirs)
    (verdict,) = gate.verdicts()
    assert (verdict.op, verdict.exact) == ("rotary embedding of queries and keys", True)
    calls = []
    monkeypatch.setattr(rope.both_by_kernel, "function", lambda *args: calls.append(args) or expected)
    assert rope.apply_rotary_emb_qk(q, k, cos[..., 0::2], sin[..., 1::2]) is expected
    assert len(calls) == 1

    rope.apply_rotary_emb_qk(q, k[:, :, :2], cos[..., 0::2], sin[..., 1::2])  # fewer heads: two calls
    rope.apply_rotary_emb_qk(q.requires_grad_(), k, cos[..., 0::2], sin[..., 1::2])
    assert len(calls) == 1
    q.requires_grad_(False)

    def nested():
        call = transformer_wan.WanAttnProcessor.__call__
        code = next(c for c in call.__code__.co_consts if getattr(c, "co_name", "") == "apply_rotary_emb")
        return types.FunctionType(code, call.__globals__)

    rotate_both(nested(), q, k, cos, sin)  # stock's function: nothing is known of it
    assert len(calls) == 1
    with wan_patches.enabled(["rope", "qk"]):
        rotate_both(nested(), q, k, cos, sin)
    assert len(calls) == 2


def test_kernel_that_rounds_differently_is_detected(as_on_cuda, monkeypatch, caplog):
    from wan_patches.ops import rope
    from wan_patches.patching.fidelity import gate

    both = rope.both_by_kernel.function
    monkeypatch.setattr(rope.both_by_kernel, "function", lambda *args: tuple(x * (1 + 2**-20) for x in both(*args)))
    q, k = torch.randn(2, 1, 8, 4, 64)
    cos, sin = tables(8, 64)
    for _ in range(2):
        ours = rope.apply_rotary_emb_qk(q, k, cos[..., 0::2], sin[..., 1::2])
        same(ours[0], stock(q, cos, sin))
        same(ours[1], stock(k, cos, sin))
    found = {verdict.form: verdict.exact for verdict in gate.verdicts() if verdict.op.endswith("queries and keys")}
    assert found == {"one kernel": False, "each by itself": True}
