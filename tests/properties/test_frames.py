"""Decoded videos to frames, through the method of the installed diffusers."""

from __future__ import annotations

import pytest
from diffusers.video_processor import VideoProcessor
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Drawn, amounts, assert_same, hunt, outcome, patched, tensors

from wan_patches.ops import frames

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]


@st.composite
def videos(draw: st.DrawFn):
    channels = draw(st.sampled_from((3, 3, 3, 3, 1, 2, 4)))
    batch, length = draw(st.sampled_from((1, 1, 2, 3, 0))), draw(st.sampled_from((1, 2, 3, 5, 7, 0)))
    height, width = draw(st.tuples(*[st.one_of(st.integers(1, 20), st.integers(4, 20), st.integers(0, 3))] * 2))
    return draw(tensors((batch, channels, length, height, width), grad=True))


@amounts()
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_frames_have_the_bits_of_stock(output_type, examples, monkeypatch):
    taken, ops = [], {name: getattr(frames, name) for name in ("video_to_uint8", "video_to_float")}
    for name, op in ops.items():
        monkeypatch.setattr(frames, name, lambda *args, op=op, **more: taken.append(1) or op(*args, **more))
    step = frames._CPU_CHUNK
    with patched("frames") as (place,):

        @given(videos(), st.sampled_from((True, True, True, False)), st.sampled_from((1, 500, step)))
        @example(Drawn.plain((1, 3, 2, 8, 8)), True, frames._CPU_CHUNK)
        def check(case, normalized, chunk):
            monkeypatch.setattr(frames, "_CPU_CHUNK", chunk)
            processor, video = VideoProcessor(vae_scale_factor=8, do_normalize=normalized), case.make()
            results = [outcome(lambda f=f: f(processor, video, output_type)) for f in (place.function, place.stock)]
            assert_same(*results)
            assert_same(video, case.make())

        hunt(check, examples)
    assert taken
