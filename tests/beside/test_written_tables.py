"""Whoever writes to rotary tables, or to what they are made of, in whatever way, gets what stock gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")

FAMILIES_HERE = [
    name
    for name in ("wan_t2v", "wan_vace", "wan_animate", "skyreels_v2_t2v", "chronoedit", "sana_video", "helios")
    if name in available()
]


def _times(array):
    array *= 0.5


#: In-place halving of a tensor, of which only the first says so to anybody.
WRITES = {
    "in place": lambda t: t.mul_(0.5),
    "through .data": lambda t: t.data.mul_(0.5),
    "through .numpy()": lambda t: _times(t.numpy()),
    "through shared memory": lambda t: _times(np.asarray(memoryview(t.numpy()))),
    "through its storage": lambda t: torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).mul_(0.5),
    "through dlpack": lambda t: torch.from_dlpack(t.detach()).mul_(0.5),
}


def _sources(model):
    return [buffer for name, buffer in model.rope.named_buffers() if "freqs" in name]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_writes_to_buffers_within_and_between_generations(name, write, pipelines, against_stock):
    pipe = pipelines(name)
    if not _sources(pipe.transformer):
        pytest.skip("this version keeps them as complex numbers")
    kept = [source.clone() for source in _sources(pipe.transformer)]

    def run():
        calls, found = [], []

        def between(module, args, output):
            calls.append(1)
            if len(calls) == 3:
                for source in _sources(pipe.transformer):
                    WRITES[write](source)

        hook = pipe.transformer.register_forward_hook(between)
        try:
            for _ in range(2):
                found.append(pipe(**FAMILIES[name].inputs(steps=2, output_type="latent")).frames)
                for source in _sources(pipe.transformer):
                    WRITES[write](source)
        finally:
            hook.remove()
            for source, before in zip(_sources(pipe.transformer), kept):
                source.data.copy_(before)
        assert not torch.equal(*found)
        return found

    against_stock(run, looks=False)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_writes_to_tables_that_somebody_was_handed(name, write, pipelines, against_stock):
    """A hook on the embedding, which stock hands a fresh table in each forward."""
    pipe = pipelines(name)

    def halve(module, args, output):
        for table in output if isinstance(output, tuple) else (output,):
            WRITES[write](table)

    def run():
        hook = pipe.transformer.rope.register_forward_hook(halve)
        try:
            return pipe(**FAMILIES[name].inputs(steps=3, output_type="latent")).frames
        finally:
            hook.remove()

    against_stock(run, looks=False)
