"""A warm pipeline: everything is decided before the first request, and the random state is as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.patching import tally
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(**more):
    return FAMILIES["wan_t2v"].inputs(frames=5, steps=2, **more)


def test_the_first_request_after_warming_finds_all_decisions_made(any_size):
    pipe = FAMILIES["wan_t2v"].build()
    generator = torch.Generator().manual_seed(3)
    states = generator.get_state(), torch.get_rng_state()
    expected = pipe(**inputs(generator=torch.Generator().manual_seed(3))).frames
    with wan_patches.enabled():
        found = wan_patches.warm(pipe, **inputs(generator=generator))
        assert torch.equal(generator.get_state(), states[0])
        assert torch.equal(torch.get_rng_state(), states[1])
        assert found.kinds >= found.fast > 5
        assert found.first_seconds > 0 < found.later_seconds
        assert f"{found.kinds} kinds of input decided" in str(found)
        tally.reset()
        assert np.array_equal(pipe(**inputs(generator=generator)).frames, expected)
        again = wan_patches.warm(pipe, **inputs())
    assert (again.kinds, again.fast) == (0, 0)


def test_two_steps_are_the_default(monkeypatch):
    taken = []

    class Pipeline:
        def __call__(self, num_inference_steps=50, size=1):
            taken.append((num_inference_steps, size))
            return torch.zeros(1)

    wan_patches.warm(Pipeline(), size=3)
    wan_patches.warm(Pipeline(), num_inference_steps=7)
    assert taken == [(2, 3)] * 2 + [(7, 1)] * 2


def test_objects_that_cannot_be_called_are_rejected():
    with pytest.raises(TypeError, match="warm expects a pipeline or another callable, not int"):
        wan_patches.warm(3)
