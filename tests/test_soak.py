"""Round after round of enabling, generating and disabling: nothing grows."""

from __future__ import annotations

import gc
import os
import sys
import types
from collections import Counter
from dataclasses import dataclass

import numpy as np
import psutil
import pytest

import wan_patches
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

#: Rounds before the first look: caches of diffusers, torch and the allocator fill, every choice gets its code.
WARM_UP = 5

#: Resident bytes that a round may leave: less than its latents (1 KiB) or its video (30 KiB) have.
RESIDENT = 1000

#: Small blocks of Python that a round may leave: any object is one at least.
BLOCKS = 0.5

CHOICES = [None, ["rope"], ["frames", "vae"], ["conditioning"], []]


@dataclass(frozen=True)
class Inventory:
    """What is alive: objects by type, code objects, names in the modules that patches are for."""

    objects: Counter[str]
    codes: int
    names: dict[str, int]

    @classmethod
    def take(cls) -> Inventory:
        gc.collect()
        alive = gc.get_objects()
        kinds = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in alive)
        modules = {report.module for report in wan_patches.status().reports} & set(sys.modules)
        return cls(kinds, len(_codes(alive)), {name: len(vars(sys.modules[name])) for name in modules})


def _memory() -> tuple[int, int]:
    """Small blocks of Python, and resident bytes."""
    sys._clear_type_cache()  # of up to 4096 names of attributes
    for _ in range(3):
        gc.collect()
    return sys.getallocatedblocks(), psutil.Process(os.getpid()).memory_info().rss


def _codes(alive: list[object]) -> set[int]:
    """The code objects that functions and containers hold; the collector itself does not know them."""
    found = set()
    for thing in alive:
        if type(thing) in (types.FunctionType, dict, list, tuple):
            found |= {id(held) for held in gc.get_referents(thing) if type(held) is types.CodeType}
    return found


def _round(pipe, family, nth):
    wan_patches.enable()
    frames = pipe(**FAMILIES[family].inputs(size=(32, 16), frames=5, steps=1)).frames
    with wan_patches.enabled(CHOICES[nth % len(CHOICES)], gate=bool(nth % 2)):
        wan_patches.status()
    wan_patches.disable()
    return frames


@pytest.mark.parametrize("rounds", [10, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize("family", ["wan22_i2v", pytest.param("wan_t2v", marks=pytest.mark.slow)])
def test_rounds_leave_nothing_behind(family, rounds):
    pipe = FAMILIES[family].build()
    long = rounds >= 1000
    first = _round(pipe, family, 0)
    for nth in range(100 if long else WARM_UP):
        _round(pipe, family, nth)
    Inventory.take()  # makes what the next would count
    before = Inventory.take()
    for nth in range(WARM_UP + rounds):
        if nth == WARM_UP:  # rounds take back what the allocator gave away after the inventory
            memory = _memory()
        frames = _round(pipe, family, nth)
        assert np.array_equal(frames, first)
    del frames
    blocks, resident = (now - then for now, then in zip(_memory(), memory))
    after = Inventory.take()
    grown = after.objects - before.objects
    figures = (
        f"{family}, {rounds} rounds: objects {dict(grown)}, code objects {after.codes - before.codes:+}, "
        f"blocks {blocks:+}, resident {resident / 2**20:+.1f} MiB"
    )
    print(figures)
    assert not {kind: count for kind, count in grown.items() if count >= rounds // 2}, figures
    assert after.codes == before.codes, figures
    assert after.names == before.names, figures
    if long:
        assert blocks < BLOCKS * rounds, figures
        assert resident < RESIDENT * rounds, figures
