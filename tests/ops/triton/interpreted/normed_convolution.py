"""Bias and lengths against ATen's order on CUDA: its reduction over a strided axis, thread by thread, in NumPy."""

from __future__ import annotations

import aten
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import same

from wan_patches.ops import normed_convolution as ops
from wan_patches.ops.convolution import Convolution
from wan_patches.ops.triton.normed_convolution import add_bias_and_measure
from wan_patches.patching.fidelity import gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_THREADS, _SUMS = 4, 4  # that share a position; of each thread


def lengths(y):
    """The norm of `y` over its channels, `(batch, channels, ...)`, in fp32."""
    values = y.float().numpy()
    of_threads = []
    for thread in range(_THREADS):
        mine = values[:, thread::_THREADS]
        sums = [np.zeros_like(mine[:, 0]) for _ in range(_SUMS)]
        for turn in range(mine.shape[1]):
            sums[turn % _SUMS] = aten.fma(mine[:, turn], mine[:, turn], sums[turn % _SUMS])
        for other in sums[1:]:
            sums[0] = sums[0] + other
        of_threads.append(sums[0])
    distance = _THREADS // 2
    while distance:
        for thread in range(distance):
            of_threads[thread] = of_threads[thread] + of_threads[thread + distance]
        distance //= 2
    return torch.from_numpy(np.sqrt(of_threads[0])).unsqueeze(1)


def drawn(shape, dtype):
    """Channels and positions of very different magnitudes."""
    scale = 10 ** torch.empty(shape[0], shape[1], *shape[2:]).uniform_(-3, 2)
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96, 2, 32, 33), (2, 192, 1, 9, 12), (1, 384, 1, 16, 20), (1, 64, 1, 8, 16)])
def test_bits_are_those_of_aten(shape, dtype):
    y, bias = drawn(shape, dtype), torch.randn(shape[1]).to(dtype)
    expected = y + bias.view(-1, 1, 1, 1)
    found = add_bias_and_measure(y, bias, torch.float32)
    same(y, expected)
    same(found, lengths(expected))
    torch.testing.assert_close(found, expected.float().norm(2, 1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(dtype):
    y, bias = torch.zeros(1, 96, 1, 8, 16, dtype=dtype), torch.zeros(96, dtype=dtype)
    y[0, 3, 0, 0] = torch.inf
    y[0, 5, 0, 1] = torch.nan
    y[0, :, 0, 2] = -0.0
    expected = y + bias.view(-1, 1, 1, 1)
    found = add_bias_and_measure(y, bias, torch.float32)
    same(y, expected)
    same(found, lengths(expected))


def test_another_order_is_noticed():
    """The same channels elsewhere."""
    y, bias = torch.randn(1, 96, 1, 32, 32), torch.zeros(96)
    found = add_bias_and_measure(y[:, torch.randperm(96)], bias, torch.float32)
    assert (found != lengths(y)).float().mean() > 0.1  # the root hides most of it


@pytest.fixture
def as_aten(as_on_cuda, monkeypatch):
    """A GPU's order of squares, and its bias: after the convolution."""
    convolve = F.conv3d

    def biased(x, weight, bias, *options):
        y = convolve(x, weight, None, *options)
        return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))

    def norm(y, *_, **__):
        return lengths(y).to(y.dtype)

    monkeypatch.setattr(F, "conv3d", biased)
    monkeypatch.setattr(torch.Tensor, "norm", norm)
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda y, *_, **__: lengths(y))


def arguments(dtype, channels=64, bias=True):
    x, weight = torch.randn(1, 4, 3, 10, 22).to(dtype), torch.randn(channels, 4, 3, 3, 3).to(dtype)
    bias = torch.randn(channels).to(dtype) if bias else None
    return x, Convolution(weight, bias, (1, 1, 1), (1, 1, 1), 1), True


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_dispatch_and_gate(dtype, as_aten):
    args = arguments(dtype)
    expected = ops.normed_convolution.reference(*args)
    for _ in range(2):  # at first sight, and after it
        for ours, theirs in zip(ops.normed_convolution(*args), expected, strict=True):
            same(ours, theirs)
    (verdict,) = gate.verdicts()
    assert (verdict.form, verdict.exact) == ("bias and lengths in one kernel", True)


@torch.no_grad()
def test_what_aten_adds_otherwise_takes_another_way(as_aten):
    refuses = ops.by_kernel.refusal
    assert refuses(*arguments(torch.float32)) is None
    assert refuses(*arguments(torch.float32, bias=False))
    assert refuses(*arguments(torch.float32, channels=60))  # not sixteen in turn
    assert refuses(*arguments(torch.float32, channels=48))  # two positions for a thread
    assert refuses(*arguments(torch.float32, channels=1024))  # several blocks for a position
    x, *others = arguments(torch.float32)
    assert refuses(x[..., :-1].contiguous(), *others) is None
    assert refuses(x[..., :16].contiguous(), *others)  # 8 * 14 positions: fewer than threads of a block
    assert refuses(x[..., :-1, :-1].contiguous(), *others)  # 7 * 19: no multiple of the vector
    assert refuses(x.to(memory_format=torch.channels_last_3d), *others)


def test_gpus_of_another_order_keep_their_own_norm(as_on_cuda):
    """As a CPU, whose norm adds otherwise."""
    args = arguments(torch.bfloat16)
    expected = ops.normed_convolution.reference(*args)
    for _ in range(2):
        for ours, theirs in zip(ops.normed_convolution(*args), expected, strict=True):
            same(ours, theirs)
    assert gate.verdicts()[0].form == "bias and lengths in one kernel"
    assert not gate.verdicts()[0].exact
