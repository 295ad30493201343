"""verify on an accelerator: its random state, its own formulations, and what the first-sight gate keeps away."""

from __future__ import annotations

import pytest
import torch

from wan_patches import verify
from wan_patches.ops import rope
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.npu_emulated


@pytest.fixture
def pipe(device):
    return FAMILIES["wan_t2v"].build().to("npu")


def inputs():
    return FAMILIES["wan_t2v"].inputs(frames=5, steps=1, generator=None)


def wrong(x, cos, sin):
    out = rope.apply_rotary_emb.reference(x, cos, sin)
    return torch.nextafter(out.cpu(), torch.full(out.shape, torch.inf)).to(out.device)


def test_a_pipeline_verifies_there(pipe):
    found = verify(pipe, **inputs())
    assert found.exact, found
    assert found.device.startswith("npu")
    assert {stage.name for stage in found.stages} >= {"text", "denoise", "decode", "postprocess"}
    assert any(verdict.op == "rotary embedding" and verdict.exact for verdict in found.status.verdicts)


def test_what_the_gate_keeps_away_is_told(pipe, monkeypatch):
    monkeypatch.setattr(rope.by_stacking, "function", wrong)
    found = verify(pipe, repeat=0, **inputs())
    assert found.exact
    assert any(
        "disables the form stack + flatten of rotary embedding on this device: differs" in note for note in found.notes
    )


def test_what_passes_the_gate_and_then_differs_is_named(pipe, monkeypatch):
    right, calls = rope.by_stacking.function, []

    def wears_out(x, cos, sin):
        calls.append(x)
        return right(x, cos, sin) if len(calls) <= 8 else wrong(x, cos, sin)

    monkeypatch.setattr(rope.by_stacking, "function", wears_out)
    found = verify(pipe, repeat=0, **inputs())
    assert [[patch.name for patch in culprit.patches] for culprit in found.culprits] == [["rope"]]
