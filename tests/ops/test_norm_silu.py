"""RMS norm and SiLU against the installed `WanRMS_norm`, without a kernel and with a stand-in for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan_patches.bindings.vae import _normalizes_in_fp32, channel_norm
from wan_patches.ops import norm_silu as op
from wan_patches.patching.fidelity import gate

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
pytestmark = pytest.mark.upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype, bias=False, channels=12):
    torch.manual_seed(0)
    norm = autoencoders.WanRMS_norm(channels, images=False, bias=bias)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    norm.to(dtype)
    x = torch.randn(2, channels, 3, 7, 9).to(dtype)
    x[0, :, 0, 0] = 0
    return norm, x


def assert_same(result, expected):
    """Bit for bit; older diffusers divides zeros by zeros in fp16, and nan is not equal to itself."""
    torch.testing.assert_close(torch.Tensor(result), expected, rtol=0, atol=0, equal_nan=True)


def call(norm, x, kept=2):
    """The result, which is written to the inside of a window, and the last frames beside it."""
    window = F.pad(torch.zeros_like(x), (1, 1) * (x.dim() - 3))
    frames = window[..., 1:-1, 1:-1] if x.dim() == 5 else window[..., 1:-1]
    last = torch.empty_like(frames[:, :, -kept:], memory_format=torch.contiguous_format) if kept else None
    memory = op.Memory(frames, last)
    found = op.norm_silu(x, channel_norm(norm), memory)
    assert len(found) == (2 if kept else 1)
    if kept:
        assert_same(found[1], found[0][:, :, -kept:])
    assert not kept or (found[0] is frames) == (found[1] is last)
    return found[0]


def arithmetic(x, length, scale, gamma, bias, out, last):
    """What the kernel is to compute, and where it is to write."""
    denominator = length.clamp_min(1e-12).float()
    value = (x.float() / denominator).to(x.dtype) * scale * gamma
    out.copy_(F.silu(value + (0.0 if bias is None else bias)))
    if last is not None:
        last.copy_(out[:, :, -last.shape[2] :])


@pytest.fixture
def kernel(as_on_cuda, monkeypatch):
    """The way of accelerators on the CPU, with torch's arithmetic in the kernel's place; what it was given."""
    import sys
    from types import SimpleNamespace

    calls = []

    def run(*args):
        calls.append(args)
        arithmetic(*args)

    stand_in = SimpleNamespace(norm_silu=run)
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.norm_silu", stand_in)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_cpus_run_the_norm_itself(dtype, monkeypatch):
    monkeypatch.setattr(op.kernels, "is_usable", lambda device: pytest.fail("a CPU needs no kernel"))
    norm, x = case(dtype)
    assert_same(call(norm, x), F.silu(norm(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [2, 1, 0])
@torch.no_grad()
def test_kernel_arguments_give_the_bits_of_the_norm(dtype, bias, kept, kernel):
    norm, x = case(dtype, bias)
    expected = F.silu(norm(x))
    for _ in range(2):  # the second time without comparison
        assert_same(call(norm, x, kept), expected)
    assert len(kernel) == 2
    (verdict,) = gate.verdicts()
    assert verdict.exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_dtypes_are_cast_first_where_the_reduction_of_others_differs(dtype, kernel, monkeypatch):
    norm, x = case(dtype)
    if not _normalizes_in_fp32(type(norm)):
        pytest.skip("this diffusers casts nothing")
    reduce = torch.linalg.vector_norm

    def other(x, *args, **options):
        return reduce(x, *args, **options) * (1 if x.dtype == torch.float32 else 1.01)

    monkeypatch.setattr(torch.linalg, "vector_norm", other)
    expected = F.silu(norm(x))
    for _ in range(2):
        assert_same(call(norm, x), expected)
    assert [verdict.exact for verdict in gate.verdicts()] == [False, True]
    assert len(kernel) == 3


@torch.no_grad()
def test_weights_of_one_do_not_verify_a_kernel(kernel, monkeypatch):
    """As a norm has them before it is trained; with these, a kernel that leaves them out passes."""
    norm, x = case(torch.float32)
    torch.nn.init.ones_(norm.gamma)

    def without_weight(x, norm, scale, gamma, *more):
        return op.norm_silu.reference(x, norm, scale, norm.args[0].gamma, *more)

    monkeypatch.setattr(op.by_kernel, "function", without_weight)
    assert_same(call(norm, x), F.silu(norm(x)))
    (verdict,) = gate.verdicts()
    assert not verdict.exact


@torch.no_grad()
def test_differing_kernel_is_not_used(kernel, monkeypatch):
    norm, x = case(torch.bfloat16)
    for form in op.norm_silu.forms:
        monkeypatch.setattr(form, "function", lambda *args: tuple(y * 1.01 for y in op.norm_silu.reference(*args)))
    for _ in range(2):
        assert_same(call(norm, x), F.silu(norm(x)))
    assert not any(verdict.exact for verdict in gate.verdicts())


@pytest.mark.parametrize("change", ["dtype", "gamma", "strides", "dimensions"])
@torch.no_grad()
def test_other_inputs_run_the_norm_itself(change, kernel):
    norm, x = case(torch.float32)
    if change == "dtype":
        norm, x = norm.double(), x.double()
    elif change == "gamma":
        norm = norm.half()
    elif change == "strides":
        x = x.transpose(-1, -2)
    else:
        norm, x = autoencoders.WanRMS_norm(12), x[:, :, 0]
    assert_same(call(norm, x), F.silu(norm(x)))
    assert kernel == []
