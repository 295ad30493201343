"""What is between the layers of a block, and norms of queries and keys, against what is installed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, Drawn, amounts, assert_same, hunt, outcome, patched, tensors

from wan_patches.bindings.qk import qk_norm
from wan_patches.ops import modulation
from wan_patches.ops.dispatch import at_any_size

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Block:
    """Hidden states, what the layers make of them, and the modulation: for all tokens or for each."""

    x: Drawn
    of_layers: tuple[Drawn, ...]
    temb: Drawn
    table: Drawn
    affine: bool
    context: int  # tokens that are generated, of Helios
    also_small: bool  # so that what is small takes the fast form too
    chunk: int


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    batch, seq = draw(st.sampled_from((1, 1, 2, 3))), draw(st.integers(1, 30))
    dim = draw(st.one_of(st.sampled_from((8, 16, 48)), st.integers(1, 40)))
    dtypes = draw(st.sampled_from(((torch.float32,), (torch.bfloat16,), (torch.float16,), FLOATS)))
    of_temb = draw(st.sampled_from(((1, 6, dim), (batch, 6, dim), (batch, seq, 6, dim))))
    x = draw(tensors((batch, seq, dim), dtypes, grad=True))
    like = dtypes if draw(st.booleans()) else (x.dtype,)
    return Block(
        x,
        tuple(draw(tensors((batch, seq, dim), like)) for _ in range(3)),
        draw(tensors(of_temb, draw(st.sampled_from((dtypes, FLOATS))))),
        draw(tensors((1, 6, dim), (torch.float32, torch.float32, *FLOATS))),
        draw(st.booleans()),
        draw(st.integers(0, seq)),
        draw(st.sampled_from((True, True, True, False))),
        draw(st.sampled_from((1, 50, 1 << 19))),
    )


def _around(block: Block) -> SimpleNamespace:
    """A block of stock's norms, whose layers return what was drawn."""
    dim = block.x.shape[-1]
    made = [drawn.make() for drawn in block.of_layers]
    layers = {name: lambda *_, y=y, **__: y for name, y in zip(("attn1", "attn2", "ffn"), made)}
    plain = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
    norm2 = FP32LayerNorm(dim, 1e-6, elementwise_affine=block.affine)
    return SimpleNamespace(
        **layers, norm1=plain, norm2=norm2, norm3=plain, scale_shift_table=block.table.make(), guidance_cross_attn=False
    )


def _plain(seq: int, dim: int, dtype: torch.dtype, per_token: bool) -> Block:
    temb = (1, seq, 6, dim) if per_token else (1, 6, dim)
    x, table = Drawn.plain((1, seq, dim), dtype), Drawn.plain((1, 6, dim))
    return Block(x, (x,) * 3, Drawn.plain(temb, dtype), table, True, seq, True, 50)


def _say_something(x: Drawn) -> bool:
    """Whether strides do: along an axis of one element torch's own operations choose any."""
    return 1 not in x.shape


@amounts()
def test_blocks_have_the_bits_of_stock(examples, monkeypatch):
    taken, form = [], modulation.modulated_norm_in_chunks
    fast = form.function
    monkeypatch.setattr(form, "function", lambda *args: taken.append(1) or fast(*args))
    with patched("modulation") as places:
        pairs = {
            place.patch.module: (place.stock, place.function)
            for place in places
            if place.target.qualname.endswith("TransformerBlock.forward") and "vace" not in place.patch.module
        }

        @given(st.sampled_from(sorted(pairs)), blocks())
        @example(min(pairs), _plain(9, 16, torch.bfloat16, per_token=False))
        @example(min(pairs), _plain(9, 16, torch.bfloat16, per_token=True))
        def check(where, block):
            monkeypatch.setattr(modulation, "_CHUNK", block.chunk)
            last = (block.context,) if "helios" in where else ()

            def run(forward):
                with torch.set_grad_enabled(block.x.grad):
                    return outcome(
                        lambda: forward(_around(block), block.x.make(), None, block.temb.make(), None, *last)
                    )

            stock, ours = pairs[where]
            with at_any_size() if block.also_small else contextlib.nullcontext():
                assert_same(run(ours), run(stock), strides=_say_something(block.x))

        hunt(check, examples)
    assert taken  # or this says nothing about the fast form


@st.composite
def normed(draw: st.DrawFn) -> tuple[Drawn, torch.dtype, float | None, bool, bool]:
    dim = draw(st.one_of(st.sampled_from((64, 128, 1536)), st.integers(1, 300)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 20)), dim)
    x = draw(tensors(shape, grad=True))
    of_weight = draw(st.sampled_from((x.dtype, x.dtype, *FLOATS)))
    eps = draw(st.sampled_from((None, 1e-6, 1e-5, 0.0)))
    return x, of_weight, eps, draw(st.sampled_from((True, True, False))), draw(st.sampled_from((True, True, False)))


@amounts()
def test_norms_of_queries_and_keys_have_the_bits_of_torch(examples):
    @given(normed())
    @example((Drawn.plain((1, 9, 128), torch.bfloat16), torch.bfloat16, 1e-6, True, True))
    def check(case):
        x, dtype, eps, affine, also_small = case
        norm = torch.nn.RMSNorm(x.shape[-1], eps=eps, elementwise_affine=affine, dtype=dtype)
        if affine:
            torch.nn.init.uniform_(norm.weight)
        with torch.set_grad_enabled(x.grad):
            with at_any_size() if also_small else contextlib.nullcontext():
                ours = outcome(lambda: qk_norm(norm, x.make()))
            torchs = outcome(lambda: norm(x.make()))
            assert_same(ours, torchs, strides=_say_something(x))

    hunt(check, examples)
