"""Layer norm in one pass, in ATen's order."""

from __future__ import annotations

import re

import pytest
import torch

CAPABILITIES = [80, 90, 100]


def test_order_is_that_of_aten(interpret):
    interpret("layer_norm")


def arguments(dtype, dim, residual=True, weight=False, bias=False, modulated=True, rows=1):
    from wan_patches.ops.triton import layer_norm

    x = torch.randn(1, 9, dim).to(dtype)
    gate, scale, shift = torch.randn(1, rows or 9, 6, dim)[:, :, :3].unbind(2)
    if not rows:  # a row for each token, to be added to another
        gate, scale, shift = ((torch.randn(1, 1, dim), part.to(dtype)) for part in (gate, scale, shift))
    affine = [torch.randn(dim) if given else None for given in (weight, bias)]
    rest = (*affine, *((scale, shift) if modulated else (None, None)), 1e-6, 4 if rows == 2 else None)
    if residual:
        call = lambda: layer_norm.residual_layer_norm_modulate(x, x, gate, *rest)  # noqa: E731
    else:
        call = lambda: layer_norm.layer_norm_modulate(x, *rest)  # noqa: E731
    return layer_norm, "_layer_norm", call


def count(text, operation):
    return len(re.findall(rf"\b{re.escape(operation)}\b", text))


def multiply_adds(dtype, dim):
    """Those of the statistics, in a thread."""
    share = 4 // dtype.itemsize  # of ATen's 128 threads
    values = 2 * dim // 128 - 1  # two for each; the first mean is the first value
    unions = 2 * (4 * share + 1) + 2 * (2 + 1)  # two where two threads unite: of lanes, then of warps
    return share * values + unions


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [5120, 1536, 3072, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_kernel(compiled, dtype, dim, capability):
    """Rounds as ATen does; moves 16 bytes at a time and each value once; keeps all in registers."""
    built = compiled(*arguments(dtype, dim), capability)
    text = built.asm["ptx"]
    assert count(text, "fma.rn.f32") == text.count("fma.") == multiply_adds(dtype, dim)
    assert (count(text, "div.rn.f32"), count(text, "rsqrt.approx.ftz.f32")) == (1, 1)
    assert "rcp" not in text  # reciprocals are constants
    assert text.count("approx") == text.count("ftz") == 1
    size = 512 * dtype.itemsize  # bytes that the threads move at once, 16 each
    of_hidden, of_row = dim * dtype.itemsize // size, dim * 4 // size
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == 2 * of_hidden + 3 * of_row
    assert text.count("st.global.v4.b32") == text.count("st.global") == 2 * of_hidden
    spilled = re.findall(r"\b(?:LDL|STL)\b", built.asm["sass"])
    assert len(spilled) <= 2 * (dtype == torch.float16)  # fp16 may spill one register, once


@pytest.mark.parametrize(("rows", "loads"), [(2, 20), (9, 20), (0, 10 + 20)])
def test_rows_of_other_kinds_are_read_once(compiled, rows, loads):
    built = compiled(*arguments(torch.bfloat16, 5120, rows=rows))
    text = built.asm["ptx"]
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == 2 * 10 + 3 * loads
    assert text.count("fma.") == multiply_adds(torch.bfloat16, 5120)
    assert not re.search(r"\b(?:LDL|STL)\b", built.asm["sass"])


@pytest.mark.parametrize(
    ("given", "more"), [((True, True), 80), ((True, False), 0), ((False, True), 80), ((False, False), 0)]
)
def test_bias_is_added_as_aten_does(compiled, given, more):
    """Fused with the product by the weight, or by the root."""
    weight, bias = given
    args = arguments(torch.bfloat16, 5120, residual=False, weight=weight, bias=bias, modulated=False)
    text = compiled(*args).asm["ptx"]
    assert text.count("fma.") == multiply_adds(torch.bfloat16, 5120) + more
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == 10 + 20 * sum(given)
