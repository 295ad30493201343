"""The kernel of the rotary embedding per channel against diffusers' shared function."""

from __future__ import annotations

import pytest
import torch
from comparing import same
from diffusers.models import embeddings

from wan_patches.ops.triton.rope_per_channel import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, cos, sin, halves):
    """x: `(batch, seq, heads, head_dim)`; cos, sin: `(seq, head_dim)`."""
    stock = embeddings.apply_rotary_emb(x, (cos, sin), True, -2 if halves else -1, 1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    if halves:
        tables = (*cos.chunk(2, -1), *sin.chunk(2, -1))
    else:
        tables = cos[..., 0::2], cos[..., 1::2], sin[..., 0::2], sin[..., 1::2]
    same(rotate(x, tables, halves), stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    "shape",
    # of published models; heads that do not fill a tile; channels that are no power of two; the least
    [(1, 5, 24, 128), (2, 7, 48, 64), (1, 3, 5, 96), (2, 4, 3, 44), (3, 1, 1, 2), (1, 2, 2, 6)],
)
def test_bits_of_stock(shape, dtype, halves):
    check(torch.randn(shape).to(dtype), *torch.randn(2, shape[1], shape[3]), halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
def test_views(dtype, halves):
    cos, sin = torch.randn(2, 6, 64)
    for part in torch.randn(2, 6, 3 * 4 * 64).to(dtype).chunk(3, dim=-1):
        check(part.unflatten(2, (4, -1)), cos, sin, halves)
    check(torch.randn(2, 4, 6, 64).to(dtype).transpose(1, 2), cos, sin, halves)
    check(torch.randn(1 + 6 * 4 * 64).to(dtype)[1:].view(1, 6, 4, 64), cos, sin, halves)  # not aligned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
def test_tables_of_samples_and_heads(dtype, halves):
    from wan_patches.ops.rope_per_channel import PairTables, apply_rotary_emb_per_channel

    x = torch.randn(2, 5, 3, 32).to(dtype)
    for batch in (1, 2):
        for heads in (1, 3):
            tables = PairTables(*torch.randn(4, batch, 5, heads, 16))
            same(rotate(x, tables, halves), apply_rotary_emb_per_channel.reference(x, tables, halves))


@pytest.mark.parametrize("halves", [False, True])
def test_dispatch_and_gate(halves, as_on_cuda):
    """As on a GPU, where the op takes the kernel once it has proved itself."""
    from wan_patches.ops.rope_per_channel import PairTables, apply_rotary_emb_per_channel
    from wan_patches.patching import tally
    from wan_patches.patching.fidelity import gate

    x, tables = torch.randn(1, 8, 4, 64).bfloat16(), PairTables(*torch.randn(4, 1, 8, 1, 32))
    for _ in range(2):
        same(
            apply_rotary_emb_per_channel(x, tables, halves),
            apply_rotary_emb_per_channel.reference(x, tables, halves),
        )
    (verdict,) = gate.verdicts()
    assert (verdict.form, verdict.exact) == ("one kernel", True)
    assert "one kernel" in {way.form for way in tally.counted()}
