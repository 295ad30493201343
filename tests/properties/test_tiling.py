"""The cross-fade of tiles, through the methods of the installed autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, Drawn, amounts, assert_same, hunt, outcome, patched, tensors

from wan_patches.ops import tiling

pytestmark = pytest.mark.upstream

#: How many rows and columns of half dtypes are too few for the fast form.
USUAL = dict(tiling._FEW)
NEVER = dict.fromkeys(USUAL, 0)


@dataclass(frozen=True)
class Fade:
    first: Drawn
    second: Drawn
    extent: object
    chunk: int
    few: dict
    threads: int


@st.composite
def fades(draw: st.DrawFn) -> Fade:
    few = (st.sampled_from((1, 2, 3, most, 1, 2, 3, most, 0)) for most in (2, 4, 6))
    shape = draw(st.tuples(*few, *[st.one_of(st.integers(4, 40), st.integers(1, 40), st.integers(0, 4))] * 2))
    other = list(shape)
    if draw(st.booleans()):  # the tile at the edge is smaller; other axes than the faded must agree
        other[draw(st.sampled_from((3, 4, 3, 4, 3, 4, 0, 1, 2)))] = draw(st.integers(0, 40))
    dtype = draw(st.sampled_from((torch.float32, *FLOATS)))
    dtypes = draw(st.sampled_from(((dtype,), (dtype,), (dtype,), FLOATS)))
    return Fade(
        draw(tensors(shape, (dtype,))),
        draw(tensors(other, dtypes, repeats=draw(st.sampled_from((False, False, False, True))))),
        draw(
            st.one_of(
                st.integers(2, 45), st.integers(2, 45), st.integers(-3, 300), st.sampled_from((True, 4.0, None, "4"))
            )
        ),
        draw(st.sampled_from((1, 500, tiling._CHUNK))),
        draw(st.sampled_from((NEVER, USUAL))),
        draw(st.sampled_from((1, 1, 2, 3))),
    )


def _repeated(axis: int, extent: int) -> Fade:
    shape = tuple(2 if nth == axis else 1 for nth in range(5))
    return Fade(Drawn.plain(shape), Drawn.plain(shape, repeated=axis), extent, chunk=1, few=NEVER, threads=1)


@amounts()
def test_fades_have_the_bits_of_stock(examples, monkeypatch):
    taken, fast = [], tiling.chunked
    monkeypatch.setattr(tiling, "chunked", lambda *args: taken.append(1) or fast(*args))
    before = torch.get_num_threads()
    with patched("vae") as places:
        methods = {place.target.qualname: place for place in places if ".blend_" in place.target.qualname}
        if not methods:
            pytest.skip("this diffusers has no tiling for Wan's VAE")

        @given(st.sampled_from(sorted(methods)), fades())
        @example("AutoencoderKLWan.blend_v", Fade(*[Drawn.plain((1, 3, 2, 24, 16))] * 2, 20, 500, NEVER, 1))
        @example("AutoencoderKLWan.blend_v", _repeated(3, 2))  # rows, then frames, that are one in memory
        @example("AutoencoderKLWan.blend_h", _repeated(2, 1))
        def check(method, case):
            place = methods[method]
            monkeypatch.setattr(tiling, "_CHUNK", case.chunk)
            monkeypatch.setattr(tiling, "_FEW", case.few)
            torch.set_num_threads(case.threads)

            def fade(function):
                first, second = case.first.make(), case.second.make()
                result = function(None, first, second, case.extent)
                assert result is second
                assert_same(first, case.first.make())
                return result

            results = [outcome(lambda f=f: fade(f)) for f in (place.function, place.stock)]
            assert_same(*results)

        try:
            hunt(check, examples)
        finally:
            torch.set_num_threads(before)
    assert taken
