"""Rotary embedding with a table value per channel: its form for CPUs, against reference and installed diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import embeddings

from wan_patches.ops.rope_per_channel import PairTables, apply_rotary_emb_per_channel, in_chunks
from wan_patches.patching import tally


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 9000, 12, 128), (2, 517, 3, 6), (3, 100, 2, 98)])
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "part"])
@pytest.mark.parametrize("heads", ["one table", "each"])
@pytest.mark.parametrize("batch", ["one table", "each"])
def test_halves(shape, dtype, layout, heads, batch, any_size):
    torch.manual_seed(0)
    n, seq, n_heads, dim = shape
    x = torch.randn(n, seq, n_heads, 2 * dim if layout == "part" else dim).to(dtype)[..., :dim]
    if layout == "heads first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    tables = PairTables(*torch.randn(4, n if batch == "each" else 1, seq, n_heads if heads == "each" else 1, dim // 2))
    expected = apply_rotary_emb_per_channel.reference(x, tables, True)
    actual = apply_rotary_emb_per_channel(x, tables, True)
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(actual, expected)
    assert {way.form for way in tally.counted()} == {in_chunks.name}
    if heads == batch == "one table":
        cos, sin = (torch.cat(values, dim=-1)[0, :, 0] for values in (tables[:2], tables[2:]))
        assert torch.equal(actual, embeddings.apply_rotary_emb(x, (cos, sin), True, -2, 1))


def test_meaning():
    x, tables = torch.randn(1, 3, 2, 8), torch.randn(4, 1, 3, 1, 4)
    for halves in (False, True):
        matrix = torch.zeros(3, 8, 8)
        for i in range(4):
            a, b = (i, i + 4) if halves else (2 * i, 2 * i + 1)
            cos_a, cos_b, sin_a, sin_b = tables[:, 0, :, 0, i]
            matrix[:, a, a], matrix[:, a, b], matrix[:, b, b], matrix[:, b, a] = cos_a, -sin_a, cos_b, sin_b
        expected = torch.einsum("sij,bshj->bshi", matrix, x)
        torch.testing.assert_close(apply_rotary_emb_per_channel(x, PairTables(*tables), halves), expected)
