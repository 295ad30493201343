"""Counted memory traffic: single calls, launches of kernels, and a block of a published model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F

import wan_patches
from wan_patches.bench import shapes, traffic
from wan_patches.bench.traffic import META, Call, counting, on_paper
from wan_patches.ops import rope

N = 1 << 10


def _bytes(call):
    with counting() as calls:
        call()
    return [(found.name, found.bytes) for found in calls]


def test_a_call_reads_its_inputs_and_writes_its_output():
    x, y, half = torch.ones(N), torch.ones(N), torch.ones(N, dtype=torch.bfloat16)
    assert _bytes(lambda: x + y) == [("add", 3 * 4 * N)]
    assert _bytes(lambda: x + x) == [("add", 2 * 4 * N)]  # one tensor is read once
    assert _bytes(lambda: x.add_(y)) == [("add_", 3 * 4 * N)]
    assert _bytes(lambda: x.copy_(y)) == [("copy_", 2 * 4 * N)]
    assert _bytes(lambda: torch.mul(x, y, out=x)) == [("mul", 2 * 4 * N)]
    assert _bytes(lambda: half.float()) == [("_to_copy", (2 + 4) * N)]
    assert _bytes(lambda: x.zero_()) == [("zero_", 4 * N)]


def test_views_allocations_and_expanded_axes_count_nothing():
    x, row = torch.ones(N, 8), torch.ones(1, 8)
    assert _bytes(lambda: x.view(8, N).t()[1:]) == []
    assert _bytes(lambda: torch.empty_like(x)) == []
    assert _bytes(lambda: x + row.expand(N, 8)) == [("add", (2 * N + 1) * 8 * 4)]


def test_operations_of_matrix_products_are_counted():
    with counting() as calls:
        torch.ones(4, 8) @ torch.ones(8, 16)
    assert calls[-1] == Call("mm", "", (4 * 8 + 8 * 16 + 4 * 16) * 4, flops=2 * 4 * 8 * 16, dtype=torch.float32)


@pytest.fixture
def attention():
    query, key, value = torch.empty(3, 1, 4, 64, 32, device=META, dtype=torch.bfloat16)
    return lambda: F.scaled_dot_product_attention(query, key, value)


def test_attention_and_rms_norm_are_one_call_on_paper(attention):
    with on_paper() as calls:
        assert attention().shape == (1, 4, 64, 32)
    (found,) = calls
    assert found.flops == 4 * 4 * 64 * 64 * 32
    assert found.bytes == pytest.approx(4 * 4 * 64 * 32 * 2, rel=0.1)  # the sums of rows beside it
    x, weight = torch.empty(N, 64, device=META), torch.empty(64, device=META)
    with on_paper() as calls:
        F.rms_norm(x, (64,), weight)
    fused = hasattr(torch.ops.aten, "_fused_rms_norm")
    assert (Counter(call.name for call in calls) == {"rms_norm": 1}) == fused


def test_ops_take_their_kernels_on_paper_and_nothing_is_left_behind():
    pytest.importorskip("triton")
    x = torch.empty(1, 512, 12, 128, device=META, dtype=torch.bfloat16)
    tables = torch.empty(2, 1, 512, 1, 64, device=META).unbind()
    before = traffic.Op.__call__
    with torch.no_grad(), on_paper() as calls:
        rope.apply_rotary_emb(x, *tables)
    table = 512 * 64 * 4
    assert calls == [Call("kernel", "rotary embedding", 2 * x.nbytes + 2 * table, is_kernel=True)]
    assert traffic.Op.__call__ is before
    assert x.is_meta
    assert not rope.apply_rotary_emb.decisions()


def test_the_bias_of_a_convolution_is_a_pass_of_its_own_on_paper():
    x, weight, bias = (torch.empty(size, device=META) for size in ((1, 4, 3, 8, 8), (6, 4, 1, 1, 1), (6,)))
    with on_paper() as calls:
        F.conv3d(x, weight, bias)
    assert [call.name for call in calls] == ["convolution", "add_"]
    out = 6 * 3 * 8 * 8 * 4
    assert calls[0].bytes == x.nbytes + weight.nbytes + out
    assert calls[1].bytes == 2 * out + bias.nbytes
    assert calls[0].flops == 2 * 4 * 6 * 3 * 8 * 8


def _forward(name, layers):
    """The calls of a forward without matrix products and attention, and the elements of its hidden states."""
    shape = shapes.SHAPES[name]
    shape = replace(shape, config={**shape.config, "num_layers": layers})
    model = shapes.build_on_paper(shape, torch.bfloat16)
    arguments = shapes.inputs(shape, model, META, torch.bfloat16)
    with torch.no_grad(), on_paper() as calls:
        model(**arguments)
    elements = shape.tokens * model.config.num_attention_heads * model.config.attention_head_dim
    return [call for call in calls if not call.flops], elements


def _block(name):
    """Bytes for each element of the hidden states that one block adds to a forward, and its calls by name."""
    (one, elements), (two, _) = (_forward(name, layers) for layers in (1, 2))
    added = Counter(call.op or call.name for call in two) - Counter(call.op or call.name for call in one)
    return sum(call.bytes for call in two) / elements - sum(call.bytes for call in one) / elements, added


@pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="torch before 2.9 has no RMS norm of its own"
)
@pytest.mark.skipif(not hasattr(diffusers, "WanTransformer3DModel"), reason="no Wan")
@pytest.mark.parametrize(
    ("name", "version", "stock_bytes", "most"),
    [("14b-480p", "2.9.0", 249, 49.5), ("14b-480p", "2.8.0", 249, 57), ("ti2v-5b", "2.9.0", 381, 70)],
)
def test_a_block_moves_few_bytes_between_its_products(name, version, stock_bytes, most, monkeypatch):
    """RMS norms of torch before 2.9 are several kernels, but counted as one."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    stock, _ = _block(name)
    with wan_patches.enabled():
        moved, calls = _block(name)
    assert round(stock) == stock_bytes
    assert moved <= most
    assert calls.total() <= 12
    assert calls["residual norm"] == 2
    assert calls["RMS norms and rotary embedding of queries and keys"] == (3 if version == "2.8.0" else 2)


@pytest.mark.skipif(not hasattr(diffusers, "AutoencoderKLWan"), reason="no Wan")
@pytest.mark.parametrize(("dtype", "stock_passes", "most"), [(torch.float32, 43.1, 13.1), (torch.bfloat16, 61.2, 13.2)])
def test_a_residual_block_of_the_autoencoder_makes_few_passes(dtype, stock_passes, most):
    """Over its hidden state, beside what its two convolutions read and write: in the last blocks of a decoder."""
    pytest.importorskip("triton")
    with META:
        vae = diffusers.AutoencoderKLWan().eval()
    torch.nn.Module.to(vae, dtype=dtype)
    block = vae.decoder.up_blocks[-1].resnets[-1]
    x = torch.empty(1, block.in_dim, 4, 480, 832, device=META, dtype=dtype)

    def passes():
        vae.clear_cache()
        with on_paper() as calls:
            block(torch.empty_like(x[:, :, :1]), vae._feat_map, [0])
            block(torch.empty_like(x), vae._feat_map, [0])
            calls.clear()
            block(torch.empty_like(x), vae._feat_map, [0])
        assert sum(call.flops > 0 for call in calls) == 2
        return sum(call.bytes for call in calls if not call.flops) / x.nbytes

    with torch.no_grad():
        stock = passes()
        with wan_patches.enabled(["vae"]):
            found = passes()
    assert round(stock, 1) == stock_passes
    assert found <= most
