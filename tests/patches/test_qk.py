"""Attention of every model family, stock against patched."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import wan_patches
from wan_patches.ops import rms_norm as op
from wan_patches.ops import rope
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity, gate

pytestmark = pytest.mark.upstream

ATTENTION = {
    "transformer_wan": "WanAttention",
    "transformer_wan_animate": "WanAttention",
    "transformer_chronoedit": "WanAttention",
    "transformer_skyreels_v2": "SkyReelsV2Attention",
    "transformer_helios": "HeliosAttention",
}
DIM, SEQ = 48, 30


@pytest.fixture
def fast_forms(any_size, monkeypatch):
    dtypes = torch.float32, torch.bfloat16, torch.float16
    if not all(op._is_exact(dtype, DIM, torch.get_num_threads()) for dtype in dtypes):
        pytest.skip("torch's own norm has another order here: no form is taken")  # torch 2.5
    calls, form = [], op.in_chunks.function
    monkeypatch.setattr(op.in_chunks, "function", lambda *args: calls.append(1) or form(*args))
    monkeypatch.setattr(op, "_is_exact", lambda *args: True)  # whose trial is a call as well
    monkeypatch.setattr(op, "_CHUNK", 7 * DIM)
    return calls


def _attention(module, dtype=torch.bfloat16, dim=DIM, heads=2, **more):
    try:
        library = importlib.import_module(f"diffusers.models.transformers.{module}")
        kind = getattr(library, ATTENTION[module])
    except (ImportError, AttributeError):
        pytest.skip("this diffusers has none")
    torch.manual_seed(0)
    processor = getattr(library, ATTENTION[module].replace("Attention", "AttnProcessor"))()
    attention = kind(dim=dim, heads=heads, dim_head=dim // heads, eps=1e-6, processor=processor, **more).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return attention.to(dtype)


def _call(attention, module, dtype=torch.bfloat16, text=None, tables=None):
    torch.manual_seed(1)
    x = torch.randn(2, SEQ, attention.norm_q.weight.numel()).to(dtype)
    more = {"original_context_length": SEQ} if module == "transformer_helios" else {}
    with torch.no_grad():
        return attention(x, text, None, tables, **more)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", ATTENTION)
def test_attention_is_bit_identical_to_stock(module, dtype, fused, fast_forms):
    attention = _attention(module, dtype)
    if fused:
        attention.fuse_projections()
    expected = _call(attention, module, dtype)
    with wan_patches.enabled(["qk"]):
        assert fast_forms == []
        assert torch.equal(_call(attention, module, dtype), expected)
    assert len(fast_forms) == 2


@pytest.mark.parametrize("module", ["transformer_wan", "transformer_chronoedit"])
def test_image_keys_are_bit_identical_to_stock(module, fast_forms):
    attention = _attention(module, added_kv_proj_dim=DIM, cross_attention_dim_head=24)
    text = torch.randn(2, 512 + 5, DIM).bfloat16()
    expected = _call(attention, module, text=text)
    with wan_patches.enabled(["qk"]):
        assert torch.equal(_call(attention, module, text=text), expected)
    assert len(fast_forms) == 3


@pytest.mark.parametrize("other", ["hook", "own forward", "other kind", "global hook", "compiled"])
def test_norm_that_is_not_plain_torch_is_called(other, fast_forms):
    module = "transformer_wan"
    attention, seen = _attention(module), []
    handle = None
    if other == "hook":
        attention.norm_q.register_forward_hook(lambda *args: seen.append(1))
    elif other == "own forward":
        forward = attention.norm_q.forward
        attention.norm_q.forward = lambda x: seen.append(1) or forward(x)
    elif other == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda norm, *args: seen.append(1) if norm is attention.norm_q else None
        )
    elif other == "compiled":
        forward = attention.norm_q.forward
        attention.norm_q._compiled_call_impl = lambda x: seen.append(1) or forward(x)
    else:

        class Own(torch.nn.RMSNorm):
            def forward(self, x):
                seen.append(1)
                return super().forward(x)

        attention.norm_q.__class__ = Own
    try:
        expected = _call(attention, module)
        with wan_patches.enabled(["qk"]):
            assert torch.equal(_call(attention, module), expected)
    finally:
        if handle is not None:
            handle.remove()
    assert seen == [1, 1]
    assert len(fast_forms) == (0 if other == "global hook" else 1)


@pytest.mark.parametrize("fidelity", ["exact", "close"])
def test_norms_with_a_replaced_class_forward_are_called(fidelity, fast_forms, monkeypatch):
    attention, seen, stock = _attention("transformer_wan"), [], torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: seen.append(1) or stock(self, x) / 2)
    expected = _call(attention, "transformer_wan")
    with wan_patches.enabled(["qk"], fidelity=fidelity):
        assert torch.equal(_call(attention, "transformer_wan"), expected)
    assert seen == [1] * 4
    assert fast_forms == []


def test_norms_after_hook_removal_are_plain_torch(fast_forms):
    attention = _attention("transformer_wan")
    expected = _call(attention, "transformer_wan")
    for norm in (attention.norm_q, attention.norm_k):
        norm.forward = norm.forward  # what removed hooks leave
    with wan_patches.enabled(["qk"]):
        assert torch.equal(_call(attention, "transformer_wan"), expected)
    assert fast_forms == [1, 1]


@pytest.fixture
def fused(as_on_cuda, monkeypatch):
    """Kernels are usable, and exact arithmetic stands for that of norm and rotation; how often it ran."""
    calls, rotation = [], rope.apply_rotary_emb.reference

    def rms_norm_rope(x, weight, eps, cos, sin, heads):
        calls.append(heads)
        normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps) * weight.double()
        return rotation(normed.unflatten(-1, (heads, -1)), cos.double(), sin.double()).to(x.dtype)

    def rotate(q, k, cos, sin):
        return rotation(q, cos, sin), None if k is None else rotation(k, cos, sin)

    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.close", SimpleNamespace(rms_norm_rope=rms_norm_rope))
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.rope", SimpleNamespace(rotate=rotate))
    return calls


def _tables(module, head_dim=24):
    torch.manual_seed(2)
    angles = torch.rand(1, SEQ, 1, head_dim // 2).repeat_interleave(2, -1) * 10
    if module == "transformer_helios":
        return torch.cat((angles.cos(), angles.sin()), -1).squeeze(2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("text", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("module", ATTENTION)
def test_close_attention_norms_and_rotates_in_one_pass(module, text, fused):
    attention = _attention(module, cross_attention_dim_head=24) if text else _attention(module)
    words = torch.randn(2, 9, DIM).bfloat16() if text else None
    tables = None if text else _tables(module)
    expected = _call(attention, module, text=words, tables=tables)
    with wan_patches.enabled(["rope", "qk"], fidelity="close"):
        states = {r.module.rpartition(".")[2]: r for r in wan_patches.status().of("qk") if r.fidelity is Fidelity.CLOSE}
        if states[module].state == "skipped":
            pytest.skip(states[module].reason)
        for _ in range(2):
            found = _call(attention, module, text=words, tables=tables)
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert len(fused) == (0 if text else 4)
    assert {verdict.fidelity for verdict in gate.verdicts()} == (set() if text else {Fidelity.CLOSE})
    assert all(verdict.exact for verdict in gate.verdicts())


def test_unknown_rotation_is_applied_after_the_norm(fused):
    attention = _attention("transformer_wan")
    expected = _call(attention, "transformer_wan", tables=_tables("transformer_wan"))
    with wan_patches.enabled(["qk"], fidelity="close"):  # `rope` is not in force
        found = _call(attention, "transformer_wan", tables=_tables("transformer_wan"))
    assert torch.equal(found, expected)
    assert fused == []


@pytest.fixture
def in_one(as_on_cuda, monkeypatch):
    """The kernel for norm and rotation is usable, and stock's operations stand for its arithmetic; how often it ran."""
    calls, rotation = [], rope.apply_rotary_emb.reference

    def rms_norm_rope(x, weight, eps, cos, sin, heads):
        calls.append(heads)
        normed = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return rotation(normed.unflatten(2, (heads, -1)), cos, sin)

    def rotate(q, k, cos, sin):
        return rotation(q, cos, sin), None if k is None else rotation(k, cos, sin)

    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.0"))
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.rms_norm", SimpleNamespace(rms_norm_rope=rms_norm_rope))
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.rope", SimpleNamespace(rotate=rotate))
    widths = SimpleNamespace(HAS_GATHER=True, MAX_DIM=8192, TILE=512)
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.layer_norm", widths)
    return calls


@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize("module", ATTENTION)
def test_norm_and_rotation_in_one_kernel_are_bit_identical_to_stock(module, fused_projections, in_one):
    attention, tables = _attention(module, dim=512, heads=4), _tables(module, 128)
    if fused_projections:
        attention.fuse_projections()
    expected = _call(attention, module, tables=tables)
    with wan_patches.enabled(["rope", "qk"]):
        states = {r.module.rpartition(".")[2]: r for r in wan_patches.status().of("qk") if r.fidelity is Fidelity.EXACT}
        if states[module].state == "skipped":
            pytest.skip(states[module].reason)
        for _ in range(2):
            assert torch.equal(_call(attention, module, tables=tables), expected)
    assert in_one == [4] * 6  # of queries and of keys: at first sight, to confirm it, and after it
    (verdict,) = gate.verdicts()
    assert (verdict.op, verdict.exact) == (op.rms_norm_rope_qk.name, True)


@pytest.mark.parametrize("why", ["text", "hook of keys", "rope", "width", "difference"])
def test_norms_that_no_kernel_takes_are_bit_identical_to_stock(why, in_one, monkeypatch):
    module = "transformer_wan"
    attention = _attention(module, **({} if why == "width" else {"dim": 512, "heads": 4}))
    tables = _tables(module, 24 if why == "width" else 128)
    text = torch.randn(2, 9, 512).bfloat16() if why == "text" else None
    if why == "hook of keys":
        attention.norm_k.register_forward_hook(lambda *args: args[2] * 2)
    if why == "difference":
        kernel = sys.modules["wan_patches.ops.triton.rms_norm"]
        exact = kernel.rms_norm_rope
        monkeypatch.setattr(kernel, "rms_norm_rope", lambda *args: exact(*args) * 1.01)
    expected = _call(attention, module, text=text, tables=None if why == "text" else tables)
    with wan_patches.enabled(["qk"] if why == "rope" else ["rope", "qk"]):
        for _ in range(2):
            found = _call(attention, module, text=text, tables=None if why == "text" else tables)
            assert torch.equal(found, expected)
    assert len(in_one) == (2 if why == "difference" else 0)
    taken = {way.form for way in tally.counted() if way.op == op.rms_norm_rope_qk.name and way.is_fast}
    assert taken == ({"the norms, then the rotation of both"} if why in ("width", "difference") else set())


# Norms of diffusers' own class

_WAYS = {
    "as usual": (None, {}),
    "of heads": ("heads", {}),
    "without weights": (None, {"elementwise_affine": False}),
    "with a bias": (None, {"bias": True}),
    "weights in fp32": (None, {}),
    "weights in bf16": (None, {}),
    "a part of a projection": ("part", {}),
    "heads before tokens": ("transposed", {}),
    "heads before tokens, one sample": ("transposed, one", {}),
    "one token": ("one", {}),
}


def _input(layout, dtype):
    torch.manual_seed(2)
    x = torch.randn(2, SEQ, 3 * DIM).to(dtype) * 3
    if layout == "part":
        return x[..., :DIM]
    x = x[..., :DIM].contiguous()
    if layout == "one":
        return x[0, 0]
    if layout is not None:
        x = x.unflatten(2, (-1, 24))
    x = x[:1] if layout == "transposed, one" else x
    return x if layout in (None, "heads") else x.transpose(1, 2)


def _norm_of_diffusers(x, dtype, **options):
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(3)
    norm = RMSNorm(x.shape[-1], 1e-6, **options)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm.to(dtype)


def _own_forms():
    return {way.form for way in tally.counted() if way.op == op.twice_rounded.name}


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_diffusers_are_bit_identical_to_stock(way, dtype, any_size, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK", 7 * DIM)
    layout, options = _WAYS[way]
    x = _input(layout, dtype)
    norm = _norm_of_diffusers(
        x, {"weights in fp32": torch.float32, "weights in bf16": torch.bfloat16}.get(way, dtype), **options
    )
    with torch.no_grad():
        stock = norm(x)
        tally.reset()
        with wan_patches.enabled(["qk"]):
            ours = norm(x)
    assert (ours.dtype, ours.stride()) == (stock.dtype, stock.stride())
    assert torch.equal(ours, stock)
    fits = norm.weight is None or norm.weight.dtype == dtype
    left = way in ("with a bias", "a part of a projection", "one token")
    assert _own_forms() == ({"a few tokens at a time"} if fits and not left else {""})


def test_hooks_of_norms_of_diffusers_run(any_size):
    x, seen = _input(None, torch.bfloat16), []
    norm = _norm_of_diffusers(x, torch.bfloat16)
    norm.register_forward_hook(lambda module, args, result: seen.append(result.clone()) or result + 1)
    with torch.no_grad():
        stock = norm(x)
        with wan_patches.enabled(["qk"]):
            assert torch.equal(norm(x), stock)
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert _own_forms() == {"a few tokens at a time"}


def test_norms_of_diffusers_have_the_gradients_of_stock(any_size):
    x = _input(None, torch.float32)
    norm = _norm_of_diffusers(x, torch.float32)

    def gradients():
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        norm(leaf).square().sum().backward()
        return leaf.grad, norm.weight.grad.clone()

    stock = gradients()
    tally.reset()
    with wan_patches.enabled(["qk"]):
        assert all(map(torch.equal, gradients(), stock))
    assert _own_forms() == {""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_norms_of_diffusers_are_stock(dtype, any_size):
    x = _input(None, dtype)
    norm = _norm_of_diffusers(x, dtype)
    results, graphs = [], []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    for patches in ([], ["qk"]):
        torch.compiler.reset()
        with wan_patches.enabled(patches), torch.no_grad():
            results.append(torch.compile(norm, backend=backend, fullgraph=True)(x))
    assert torch.equal(*results)
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


def test_norms_of_diffusers_on_other_devices_are_stock(any_size):
    x = _input(None, torch.bfloat16).to("meta")
    norm = _norm_of_diffusers(x, torch.bfloat16).to("meta")
    tally.reset()
    with wan_patches.enabled(["qk"]), torch.no_grad():
        assert norm(x).shape == x.shape
    assert _own_forms() == {""}
