"""Whole pipelines on a device that takes kernels: dispatch, gate and kernels together, against stock's bits.

Run by `test_kernels.py`, with the plugin `with_kernels`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import order_of_cuda
import pytest
import torch
import with_kernels
from triton.runtime.interpreter import InterpretedFunction

import wan_patches
from wan_patches.patching import tally
from wan_patches.testing.families import FAMILIES, available

IN_ORDER = "in the order of ATen's norm"
SILU = "RMS norm + SiLU"  # on CPUs ATen's SiLU is another than the kernel's
CONVOLUTIONS = {
    "convolution + residual",
    "convolution + lengths",
}  # on CPUs the bias is added before the sum is rounded
OF_CONVOLUTIONS = ("residual_convolution.", "normed_convolution.")
DIFFERS = "differs from the stock formulation"

#: Of Helios and of TI2V, which has a row of modulation for each token, nightly.
NAMES = [
    pytest.param(name, marks=() if name == "wan22_i2v" else pytest.mark.slow)
    for name in ("wan22_i2v", "helios", "wan22_ti2v")
    if name in available()
]
FEW = {"wan22_i2v": {"frames": 5}, "wan22_ti2v": {"frames": 5}, "helios": {"steps": 1}}
FORWARDS = 4  # with and without the prompt; two steps, or one of two chunks
LAYERS = 2


def expected(name, *, in_one):
    """Kernels of one call, but for the autoencoder: with norms in one pass, or around torch's norms."""
    forwards, blocks = FORWARDS, FORWARDS * LAYERS
    if name == "helios":
        norms, residuals = {"modulate": 2 * blocks + forwards, "cast": blocks}, {"gated_residual": 2 * blocks}
    else:
        norms = {"modulate": forwards + 2 * blocks, "cast": blocks}
        residuals = {"gated_residual": blocks} if in_one else {"gated_residual": 2 * blocks, "add_and_cast": blocks}
    if in_one:
        kernels = {"layer_norm.layer_norm": sum(norms.values()), "rms_norm.rms_norm_rope": 2 * blocks}
    else:
        kernels = {"modulation.modulate": norms["modulate"], "rope.kernel": blocks}
    return kernels | {f"modulation.{kernel}": calls for kernel, calls in residuals.items()}


@pytest.fixture(scope="module")
def pipelines():
    return {}


@pytest.fixture
def build(pipelines):
    """Builds a pipeline with 512 channels, which norms in one pass take."""

    def built(name):
        if name not in pipelines:
            pipelines[name] = on_cpu(name).to(with_kernels.NAME)
        return pipelines[name]

    return built


def on_cpu(name):
    return FAMILIES[name].build(dtype=torch.bfloat16, head_dim=128, transformer={"num_attention_heads": 4})


@pytest.fixture
def as_on_cuda():
    with order_of_cuda.operations():
        yield


def run(pipe, name, **more):
    """Returns the frames, the kernels that ran, and how many calls each form of an op served."""
    with_kernels.launches.clear()
    tally.reset()
    frames = pipe(**FAMILIES[name].inputs(**FEW[name], **more)).frames
    if isinstance(frames, torch.Tensor):  # latents
        frames = frames.float().cpu().numpy()
    assert np.isfinite(frames).all()
    assert frames.std() > 0
    forms = Counter()
    for way, calls in tally.counted().items():
        forms[way.op, way.form] += calls
    launched = {name: n for name, n in with_kernels.launches.items() if not name.startswith(OF_CONVOLUTIONS)}
    return frames, Counter(launched), forms


def stock_and_patched(pipe, name, **options):
    """Returns kernels and forms of a second call, and the verdicts; both calls have stock's bits."""
    stock, none, _ = run(pipe, name)
    assert not none
    with wan_patches.enabled(**options):
        first, *_ = run(pipe, name)
        again, kernels, forms = run(pipe, name)
        verdicts = wan_patches.status().verdicts
    assert np.array_equal(stock, first)
    assert np.array_equal(stock, again)
    return kernels, forms, verdicts


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_exact_where_operations_have_the_order_of_cuda(name, build, as_on_cuda):
    kernels, forms, verdicts = stock_and_patched(build(name), name)
    assert all(verdict.exact for verdict in verdicts if verdict.op not in CONVOLUTIONS), verdicts
    of_autoencoder = {kernel: calls for kernel, calls in kernels.items() if kernel.startswith("norm_silu.")}
    assert sum(of_autoencoder.values()) > 30
    assert not any(calls for (op, form), calls in forms.items() if op == SILU and not form)
    assert kernels == expected(name, in_one=True) | of_autoencoder


@pytest.mark.parametrize("name", [name for name in ("wan22_i2v", "helios") if name in available()])
def test_norms_of_another_order_are_rejected_and_the_next_form_is_taken(name, build):
    kernels, _, verdicts = stock_and_patched(build(name), name)
    verdicts = [verdict for verdict in verdicts if verdict.op not in CONVOLUTIONS]
    rejected = {verdict.op for verdict in verdicts if not verdict.exact}
    norms = {"modulated norm", "cast norm" if name == "helios" else "residual norm"}
    assert rejected == {*norms, "RMS norms and rotary embedding of queries and keys", SILU}
    for verdict in verdicts:
        assert verdict.exact == (verdict.op != SILU and IN_ORDER not in verdict.form), verdict
        assert verdict.reason == ("" if verdict.exact else DIFFERS)
    assert kernels == expected(name, in_one=False)


def test_close_kernels_run_and_are_as_near_to_stock_as_rounding_is(build):
    """Latents of a whole call; stock's own error is that of bf16, measured against the same weights in fp32."""
    name, latents = "wan22_i2v", {"output_type": "latent"}
    pipe = build(name)
    stock, none, _ = run(pipe, name, **latents)
    with wan_patches.enabled(fidelity="close"):
        run(pipe, name, **latents)
        close, kernels, _ = run(pipe, name, **latents)
        verdicts = wan_patches.status().verdicts
    assert not none
    assert all(verdict.exact for verdict in verdicts if verdict.op not in {SILU, *CONVOLUTIONS}), verdicts
    blocks = FORWARDS * LAYERS
    assert kernels == {
        "close.layer_norm_modulate": FORWARDS + 3 * blocks,
        "close.rms_norm_rope": 2 * blocks,
        "modulation.gated_residual": blocks,
    }
    exact, *_ = run(on_cpu(name).to(torch.float32), name, **latents)
    of_stock, apart = np.abs(stock - exact).mean(), np.abs(close - stock).mean()
    assert 0 < apart <= 2**0.5 * of_stock  # of two independent errors of that size


def test_kernels_that_raise_are_tried_once_and_torch_computes(build, monkeypatch):
    """As without a C compiler, with which Triton builds what launches kernels."""
    tried = []

    def no_compiler(kernel, *args, **kwargs):
        tried.append(kernel)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(InterpretedFunction, "run", no_compiler)
    pipe, name = build("wan22_i2v"), "wan22_i2v"
    stock, *_ = run(pipe, name)
    with wan_patches.enabled():
        first, *_ = run(pipe, name)
        of_first = len(tried)
        again, _, forms = run(pipe, name)
        status = wan_patches.status()
    assert np.array_equal(stock, first)
    assert np.array_equal(stock, again)
    failed = [verdict for verdict in status.verdicts if not verdict.exact]
    assert len(tried) == of_first == len(failed) > 20
    assert all("raised RuntimeError: Failed to find C compiler" in verdict.reason for verdict in failed)
    taken = {op: form for op, form in forms if form}
    assert taken["rotary embedding"] == "stack + flatten"
    assert taken["modulated norm"] == taken["gated residual"] == "in place"
    assert "Failed to find C compiler" in str(status)
