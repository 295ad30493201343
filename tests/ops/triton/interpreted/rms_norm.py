"""RMS norm and rotary embedding in one pass against ATen's order on CUDA, and stock's rotation after it."""

from __future__ import annotations

import aten
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import same

from wan_patches.ops import rms_norm as ops
from wan_patches.ops import rope
from wan_patches.ops.triton.rms_norm import rms_norm_rope
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(40, 128), (12, 128), (24, 128), (8, 64), (1, 512)]  # 14B and Helios, 1.3B, 5B; others
EPS = 1e-6


def normed(x, weight):
    rows = x.float().reshape(-1, x.shape[-1]).numpy()
    return torch.from_numpy(aten.rms_norm(rows, weight.float().numpy(), EPS)).reshape(x.shape).to(x.dtype)


def stock(x, weight, cos, sin, heads):
    return rope.apply_rotary_emb.reference(normed(x, weight).unflatten(2, (heads, -1)), cos, sin)


def drawn(*shape, dtype):
    """With the outliers that the queries and keys of real models have, at any scale."""
    outliers = 1 + 20 * (torch.rand(shape[-1]) > 0.99)
    return (torch.randn(shape) * outliers * 10 ** torch.empty(*shape[:-1], 1).uniform_(-4, 3)).to(dtype)


def tables(batch, seq, dim):
    """Views of every other channel, as diffusers' tables of all channels give them."""
    angles = torch.rand(batch, seq, 1, dim // 2) * 100
    return angles.cos().repeat_interleave(2, -1)[..., 0::2], angles.sin().repeat_interleave(2, -1)[..., 1::2]


@pytest.mark.parametrize("dim", [4, 516, 1536, 5120])
def test_emulation_computes_the_norm(dim):
    x, weight = torch.randn(8, dim) * 3 + 1, torch.randn(dim)
    found = torch.from_numpy(aten.rms_norm(x.numpy(), weight.numpy(), EPS)).double()
    exact = F.rms_norm(x.double(), (dim,), weight.double(), EPS)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), HEADS)
@pytest.mark.parametrize("of_tables", [1, 2])
def test_norm_and_rotation(heads, dim, of_tables, dtype):
    fused = drawn(2, 5, 3 * heads * dim, dtype=dtype)  # the projections are of a fused one
    x, weight = fused.chunk(3, dim=-1)[1], torch.randn(heads * dim).to(dtype)
    cos, sin = tables(of_tables, 5, dim)
    same(rms_norm_rope(x, weight, EPS, cos, sin, heads), stock(x, weight, cos, sin, heads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(dtype):
    x, weight = drawn(1, 8, 1536, dtype=dtype), torch.randn(1536).to(dtype)
    x[0, 0], x[0, 1] = 0, -0.0
    x[0, 2, 700], x[0, 3, 3], x[0, 4, -1] = float("inf"), -float("inf"), float("nan")
    x[0, 5] = 1e-30 if dtype == torch.bfloat16 else torch.finfo(dtype).tiny / 4  # subnormal bf16 is misread there
    x[0, 6] = torch.finfo(dtype).max
    cos, sin = tables(1, 8, 128)
    with np.errstate(all="ignore"):
        same(rms_norm_rope(x, weight, EPS, cos, sin, 12), stock(x, weight, cos, sin, 12))


@pytest.mark.parametrize("channels", range(512, 8193, 512))
def test_every_width(channels):
    _compare_rows(channels // 128, 128, 4)


@pytest.mark.parametrize(("heads", "dim"), HEADS[:2])
def test_many_rows(heads, dim):
    _compare_rows(heads, dim, 40)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "dim"), HEADS)
def test_thousands_of_rows(heads, dim):
    _compare_rows(heads, dim, 3000)


def _compare_rows(heads, dim, count):
    x, weight = drawn(1, count, heads * dim, dtype=torch.float32), torch.randn(heads * dim)
    cos, sin = tables(1, count, dim)
    same(rms_norm_rope(x, weight, EPS, cos, sin, heads), stock(x, weight, cos, sin, heads))


def test_another_order_is_noticed():
    x, weight = drawn(1, 20, 5120, dtype=torch.float32), torch.ones(5120)
    moved = x.reshape(1, 20, 10, 128, 4).roll(1, 3).reshape_as(x)  # to the next thread
    cos, sin = torch.ones(1, 20, 1, 64), torch.zeros(1, 20, 1, 64)
    found = rms_norm_rope(moved, weight, EPS, cos, sin, 40).flatten(2).reshape(1, 20, 10, 128, 4).roll(-1, 3)
    assert not torch.equal(found.reshape_as(x), normed(x, weight))


@pytest.fixture
def as_aten(as_on_cuda, monkeypatch):
    """The reference has the order of CUDA."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.0"))
    monkeypatch.setattr(ops.F, "rms_norm", lambda x, shape, weight, eps: normed(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_dispatch_and_gate(dtype, as_aten):
    fused = drawn(2, 6, 3 * 512, dtype=dtype).unflatten(2, (3, 4, 128))
    query, key, weights = fused[:, :, 0], fused[:, :, 1], tuple(torch.randn(2, 512).to(dtype))
    args = (query, key, weights, (EPS, EPS), *tables(1, 6, 128))
    expected = ops.rms_norm_rope_qk.reference(*args)
    for _ in range(2):  # at first sight, and after it
        for ours, theirs in zip(ops.rms_norm_rope_qk(*args), expected, strict=True):
            same(ours, theirs)
    (verdict,) = gate.verdicts()
    assert (verdict.form, verdict.exact) == ("one kernel each, in the order of ATen's norm", True)
    assert verdict.form in {way.form for way in tally.counted()}


@torch.no_grad()
def test_norm_of_another_order_takes_the_other_form(as_on_cuda, monkeypatch):
    """The order of CPUs; in bf16 all of few values have the same bits."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.0"))
    query, key, weights = *torch.randn(2, 1, 1, 4, 128).bfloat16(), tuple(torch.randn(2, 512).bfloat16())
    args = (query, key, weights, (EPS, EPS), *tables(1, 1, 128))
    expected = ops.rms_norm_rope_qk.reference(*args)
    assert all(map(torch.equal, ops.in_one(*args), expected))
    for _ in range(2):
        assert all(map(torch.equal, ops.rms_norm_rope_qk(*args), expected))
    verdicts = {verdict.form: verdict.exact for verdict in gate.verdicts() if verdict.op == ops.rms_norm_rope_qk.name}
    assert verdicts == {ops.in_one.name: False, ops.one_after_the_other.name: True}


@torch.no_grad()
def test_other_norms_take_the_other_form(as_aten, monkeypatch):
    cos, sin = tables(1, 4, 128)
    x, weight = torch.randn(1, 4, 4, 128), torch.randn(512)

    def reason(x=x, weight=weight, eps=EPS, cos=cos, sin=sin):
        return ops.in_one.why_not(x, x, (weight, weight), (eps, eps), cos, sin)

    assert reason() is None
    assert "width" in reason(torch.randn(1, 4, 5, 128), torch.randn(640))
    assert "width" in reason(torch.randn(1, 4, 5, 1024), torch.randn(5120), cos=cos.tile(8), sin=sin.tile(8))
    assert "next to each other" in reason(torch.randn(1, 4, 4, 128).transpose(1, 2))
    assert "weight" in reason(weight=weight.bfloat16())
    assert "weight" in reason(eps=0.0)
    assert "unaligned" in reason(torch.empty(4 * 512 + 1)[1:].view(1, 4, 4, 128))
    assert "tables" in reason(cos=cos.bfloat16())
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0"))
    assert "2.9" in reason()


def test_wrong_widths_raise():
    for channels, heads in ((516, 4), (8704, 68), (1536, 8)):
        cos, sin = tables(1, 1, channels // heads)
        with pytest.raises(ValueError, match="not a multiple of 512 channels up to 8192"):
            rms_norm_rope(torch.randn(1, 1, channels), torch.randn(channels), EPS, cos, sin, heads)
