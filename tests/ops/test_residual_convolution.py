"""Convolution, bias and residual: what ATen computes, with a stand-in for the kernel."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from wan_patches.ops.convolution import Convolution
from wan_patches.ops.residual_convolution import residual_convolution
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate


def case(dtype=torch.float32):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 5, 8, 9), torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    return tuple(value.to(dtype) for value in (x, weight, bias, torch.randn(2, 6, 3, 6, 7)))


def stock(x, weight, bias, shortcut):
    return F.conv3d(x, weight, bias) + shortcut


def ours(x, weight, bias, shortcut):
    return residual_convolution(x, Convolution(weight, bias, (1, 1, 1), (1, 1, 1), 1), shortcut)


@pytest.fixture
def kernel(as_on_cuda, monkeypatch):
    """Takes the way of GPUs on the CPU, with torch's additions in the kernel's place; yields the kernel's calls."""
    calls = []

    def add(y, bias, shortcut):
        calls.append(y)
        y += bias.view(-1, 1, 1, 1)
        y += shortcut

    stand_in = SimpleNamespace(add_bias_and_residual=add)
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.residual_convolution", stand_in)
    return calls


def whole(args):
    """The same with small whole numbers, whose sums are exact in any order."""
    return tuple((value * 4).round() for value in args)


@torch.no_grad()
def test_bias_and_residual_are_added_after_the_convolution(kernel):
    args = whole(case())
    expected = stock(*args)
    shortcut = args[3].clone()
    for _ in range(2):
        assert torch.equal(ours(*args), expected)
        assert torch.equal(args[3], shortcut)
    assert len(kernel) == 2
    (verdict,) = gate.verdicts()
    assert verdict.exact


@torch.no_grad()
def test_a_library_that_adds_the_bias_otherwise_keeps_it(kernel):
    """oneDNN, in bf16, rounds once after the bias."""
    args = case(torch.bfloat16)
    expected = stock(*args)
    assert not torch.equal(F.conv3d(*args[:2]) + args[2].view(-1, 1, 1, 1), F.conv3d(*args[:3]))
    for _ in range(2):
        assert torch.equal(ours(*args), expected)
    assert len(kernel) == 1
    (verdict,) = gate.verdicts()
    assert not verdict.exact


@pytest.mark.parametrize("change", ["no bias", "strided shortcut", "one channel", "channels last", "dtype"])
@torch.no_grad()
def test_other_arguments_run_stock_operations(change, kernel):
    x, weight, bias, shortcut = whole(case())
    if change == "no bias":
        bias = None
    elif change == "strided shortcut":
        shortcut = shortcut.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif change == "one channel":
        shortcut = shortcut[:, :1]
    elif change == "channels last":
        x, weight = (value.to(memory_format=torch.channels_last_3d) for value in (x, weight))
    else:
        x, weight, bias, shortcut = x.double(), weight.double(), bias.double(), shortcut.double()
    for _ in range(2):
        found = ours(x, weight, bias, shortcut)
        assert torch.equal(found, stock(x, weight, bias, shortcut))
    assert kernel == []


@torch.no_grad()
def test_cpus_run_stock_operations():
    args = case()
    assert torch.equal(ours(*args), stock(*args))
    assert not any(way.form for way in tally.counted() if way.op == residual_convolution.name)
