"""Rotary embeddings that are patched, against what the installed diffusers has there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, Drawn, amounts, assert_same, hunt, nested, outcome, patched, tensors

from wan_patches.ops import rope, rope_per_channel
from wan_patches.ops.dispatch import at_any_size
from wan_patches.patches.rope import CALL

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
            if CALL not in place.patch.calls:  # other models' functions have other arguments: see below
                continue
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


@st.composite
def shared_rotations(draw: st.DrawFn) -> tuple[Rotation, int, int]:
    """Input of diffusers' shared function, with its options `use_real_unbind_dim` and `sequence_dim`."""
    case, sequence_dim = draw(rotations(packed=False)), draw(st.sampled_from((1, 1, 2, 2, 3)))
    dtypes = (*[torch.float32] * 12, *FLOATS)
    seq, dim = case.x.shape[2 if sequence_dim == 2 else 1], case.x.shape[3]
    shape = (draw(_or_rarely(seq, seq + 1)), draw(_or_rarely(dim, dim + 2)))
    tables = tuple(draw(tensors(shape, dtypes)) for _ in range(2))
    return replace(case, tables=tables), draw(st.sampled_from((-1, -1, -2, -2, 0))), sequence_dim


@amounts()
def test_the_shared_function_has_the_bits_of_stock(examples, monkeypatch):
    taken = set()
    for form in (rope.complex_rows, rope_per_channel.in_chunks):
        monkeypatch.setattr(
            form, "function", lambda *args, form=form, fast=form.function: taken.add(form.name) or fast(*args)
        )
    before = torch.get_num_threads()
    with patched("rope") as places:
        (place,) = (place for place in places if place.patch.module == "diffusers.models.embeddings")

        usual = Rotation(Drawn.plain((2, 300, 4, 64)), (Drawn.plain((300, 64)),) * 2, threads=1, also_small=True)

        @given(shared_rotations(), st.booleans())
        @example((usual, -1, 1), True)
        @example((usual, -2, 1), False)
        def check(drawn, alike):
            case, unbind, sequence_dim = drawn
            torch.set_num_threads(case.threads)
            x, tables = case.x.make(), [table.make() for table in case.tables]
            if alike:  # pairs of equal values, as models have them
                tables = [table[..., ::2].repeat_interleave(2, -1)[..., : table.shape[-1]] for table in tables]
            args = x, tables, True, unbind, sequence_dim
            with at_any_size() if case.also_small else contextlib.nullcontext():
                assert_same(outcome(lambda: place.function(*args)), outcome(lambda: place.stock(*args)))
            assert_same(x, case.x.make())

        try:
            hunt(check, examples)
        finally:
            torch.set_num_threads(before)
    assert len(taken) == 2  # or this says nothing about the fast forms
