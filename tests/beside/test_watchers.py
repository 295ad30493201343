"""Whoever stands between a pipeline and its modules is handed what stock hands him, and as often."""

from __future__ import annotations

import functools
import random

import pytest
import torch

pytest.importorskip("transformers")

import wan_patches
from wan_patches.testing.families import FAMILIES, available

from .watching import WAYS, modules_of, seen, watching

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]

#: One of each kind of pipeline. All families, classes and ways are for the night.
NAMES = ["wan22_i2v", "wan_vace", "skyreels_v2_df_i2v", "chronoedit", "sana_video_i2v", "helios_i2v"]


@functools.lru_cache(maxsize=1)
def pipeline(name):
    return FAMILIES[name].build(dtype=torch.bfloat16)


def compare(name, pick):
    pipe = pipeline(name)

    def run():
        with watching(modules, way) as calls:
            return calls, seen(torch.as_tensor(pipe(**FAMILIES[name].inputs(steps=1, output_type="np"))[0]))

    for modules, way in pick([(modules, way) for modules in modules_of(pipe).values() for way in WAYS]):
        calls, video = run()
        with wan_patches.enabled(strict=True):
            found, patched = run()
        about = f"{way} of {type(modules[0]).__name__}"
        assert len(calls) == len(found), about
        for nth, (theirs, ours) in enumerate(zip(calls, found)):
            assert ours == theirs, f"{about}, call {nth}"
        assert patched == video, about


@pytest.mark.parametrize("name", [name for name in NAMES if name in available()])
def test_some_watchers_are_handed_what_stock_hands_them(name):
    compare(name, lambda places: random.Random(name).sample(places, 5))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", available())
def test_every_watcher_is_handed_what_stock_hands_it(name):
    compare(name, lambda places: places)
