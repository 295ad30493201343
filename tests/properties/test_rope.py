"""Every rotary embedding that is patched, against what the installed diffusers has there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, Drawn, amounts, assert_same, hunt, nested, outcome, patched, tensors

from wan_patches.ops import rope
from wan_patches.ops.dispatch import at_any_size

pytestmark = pytest.mark.upstream


@dataclass(frozen=True)
class Rotation:
    """Input of one rotary embedding: `tables` is one tensor where cosines and sines are packed, else two."""

    x: Drawn
    tables: tuple[Drawn, ...]
    threads: int
    also_small: bool  # so that what is small takes the fast form too


def _or_rarely(value: int, other: int) -> st.SearchStrategy[int]:
    return st.sampled_from((*[value] * 9, other))


@st.composite
def rotations(draw: st.DrawFn, packed: bool) -> Rotation:
    batch, heads = draw(st.sampled_from((1, 1, 2, 3, 0))), draw(st.integers(1, 6))
    seq = draw(st.one_of(st.integers(0, 9), st.integers(1, 300), st.integers(1, 300)))
    dim = draw(st.one_of(st.sampled_from((32, 64, 96, 128)), st.integers(1, 70).map(lambda half: 2 * half)))
    odd = draw(_or_rarely(dim, dim + 1))
    of_batch = draw(st.sampled_from((1, batch)))
    of_seq = draw(_or_rarely(seq, seq + 1))  # what does not fit must fail as in stock
    shape = (of_batch, of_seq, 2 * dim) if packed else (of_batch, of_seq, draw(_or_rarely(1, heads)), dim)
    dtypes = (*[torch.float32] * 12, *FLOATS)
    return Rotation(
        draw(tensors((batch, seq, heads, odd), grad=True)),
        tuple(draw(tensors(shape, dtypes)) for _ in range(1 if packed else 2)),
        draw(st.sampled_from((1, 1, 2, 3))),
        draw(st.booleans()),
    )


def _plain(packed: bool, seq: int, of_seq: int, grad: bool = False) -> Rotation:
    tables = (Drawn.plain((1, of_seq, 128)),) if packed else (Drawn.plain((1, of_seq, 1, 64)),) * 2
    return Rotation(replace(Drawn.plain((1, seq, 4, 64)), grad=grad), tables, threads=1, also_small=False)


@amounts()
@pytest.mark.parametrize("packed", [False, True], ids=["two tables", "packed"])
def test_rotary_embeddings_have_the_bits_of_stock(packed, examples, monkeypatch):
    taken, fast = [], rope.complex_rows.function
    monkeypatch.setattr(rope.complex_rows, "function", lambda *args: taken.append(1) or fast(*args))
    before = torch.get_num_threads()
    with patched("rope") as places:
        pairs = {}
        for place in places:
            (edit,) = place.target.edits
            if (edit.nested is None) is packed:
                functions = place.stock, place.function
                found = [nested(f, edit.nested) for f in functions] if edit.nested else functions
                pairs[f"{place.patch.module}.{place.target.qualname}"] = found
        if not pairs:
            pytest.skip("this diffusers has none")

        @given(st.sampled_from(sorted(pairs)), rotations(packed))
        @example(min(pairs), _plain(packed, 300, 300))
        @example(min(pairs), _plain(packed, 1, 2, grad=True))  # autograd's way must not let tables enlarge `x`
        def check(where, case):
            stock, ours = pairs[where]
            torch.set_num_threads(case.threads)
            x, tables = case.x.make(), [table.make() for table in case.tables]
            with at_any_size() if case.also_small else contextlib.nullcontext():
                assert_same(outcome(lambda: ours(x, *tables)), outcome(lambda: stock(x, *tables)))
            assert_same(x, case.x.make())

        try:
            hunt(check, examples)
        finally:
            torch.set_num_threads(before)
    assert taken  # or this says nothing about the fast form
