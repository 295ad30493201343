"""RMS norm and SiLU against the installed `WanRMS_norm`, without a kernel and with a stand-in for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from wan_patches.bindings.vae import _normalizes_in_fp32, _plain_norm
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


def call(norm, x):
    bias = norm.bias if isinstance(norm.bias, torch.Tensor) else None
    plain = partial(_plain_norm, norm)
    return op.norm_silu(x, plain, norm.scale, norm.gamma, bias, _normalizes_in_fp32(type(norm)))


def arithmetic(x, denominator, scale, gamma, bias):
    """What the kernel is to compute."""
    value = (x.float() / denominator.float()).to(x.dtype) * scale * gamma
    return F.silu(value + (0.0 if bias is None else bias))


@pytest.fixture
def kernel(as_on_cuda, monkeypatch):
    """The way of accelerators on the CPU, with torch's arithmetic in the kernel's place; what it was given."""
    import sys
    from types import SimpleNamespace

    calls = []

    def run(*args):
        calls.append(args)
        return arithmetic(*args)

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
@torch.no_grad()
def test_kernel_arguments_give_the_bits_of_the_norm(dtype, bias, kernel):
    norm, x = case(dtype, bias)
    expected = F.silu(norm(x))
    for _ in range(2):  # the second time without comparison
        assert_same(call(norm, x), expected)
    assert len(kernel) == 2
    (verdict,) = gate.verdicts()
    assert verdict.exact


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
    monkeypatch.setattr(op.by_kernel, "function", lambda *args: op.norm_silu.reference(*args) * 1.01)
    for _ in range(2):
        assert_same(call(norm, x), F.silu(norm(x)))
    (verdict,) = gate.verdicts()
    assert not verdict.exact


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
