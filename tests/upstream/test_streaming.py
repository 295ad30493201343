"""Frames that come chunk by chunk, in every family: those of the installed diffusers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

#: Their pipelines do more with decoded videos than make frames of them.
AT_THE_END = ("wan_animate", "skyreels_v2_df_v2v", "chronoedit", "sana_video")


def joined(chunks, output_type):
    parts = [chunk.frames for chunk in chunks]
    if output_type == "pil":
        return [list(itertools.chain(*videos)) for videos in zip(*parts)]
    return torch.cat(parts, dim=1) if output_type == "pt" else np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(("output_type", "patched"), [("np", False), ("pil", True), ("pt", False)])
def test_chunks_are_the_frames_of_stock(name, output_type, patched):
    family, chunks = FAMILIES[name], []
    pipe = family.build()

    def inputs():
        torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
        return family.inputs(output_type=output_type)

    stock = pipe(**inputs()).frames
    if patched:
        wan_patches.enable()
    output = wan_patches.stream_frames(pipe, chunks.append, **inputs())
    assert identical(joined(chunks, output_type), stock)
    assert output.frames is None
    starts = [chunk.start for chunk in chunks]
    if name.startswith(AT_THE_END):
        assert starts == [0]
        assert "may process the decoded video further" in chunks[0].reason
    else:
        assert starts == [0, *range(1, len(stock[0]), 4)]
        assert not any(chunk.reason for chunk in chunks)
