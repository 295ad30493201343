"""Copies, waits and the gate in a profile, against the counters of an accelerator emulated on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import wan_patches
from wan_patches.ops import rope
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.npu_emulated


@pytest.fixture(scope="module")
def pipe(_device):
    return FAMILIES["wan_t2v"].build().to("npu")


def call(pipe):
    return pipe(**FAMILIES["wan_t2v"].inputs(size=(48, 32), frames=5, steps=1, output_type="np")).frames


def by_themselves(profile):
    """Without what this device, which has no operators of its own, copies inside of them."""
    return {row.what: row for row in profile.transfers if not row.inside}


def test_copies_and_reads_are_those_that_the_device_counts(device):
    x = torch.randn(10, 10)
    device.reset()
    with wan_patches.profile() as profile:
        on_device = x.to("npu")
        on_device.copy_(x, non_blocking=True)
        half = x.to("npu", torch.bfloat16)
        half.cpu()
        float(on_device[0, 0])
        torch.equal(on_device, on_device)
        on_device.nonzero()
        bool(on_device[0, 0] > 0)
        on_device[[0, 1]]
    uploads, downloads, waits = device.uploads(), device.downloads(), device.waits()
    rows = by_themselves(profile)
    assert rows["copy to device"].count == uploads.total() == 4
    assert rows["copy to device"].bytes == sum(size * n for size, n in uploads.items())
    assert rows["copy to host"].count == downloads.total() == 1
    assert rows["copy to host"].bytes == sum(size * n for size, n in downloads.items()) == 200
    found = Counter({what: row.waits for what, row in rows.items()})
    assert found == waits
    assert waits["copy to device"] == 3  # one was not waited for
    assert waits["aten::_local_scalar_dense"] == 2


def test_an_operator_that_runs_on_the_host_is_named(device):
    x = torch.ones(4).to("npu")
    with wan_patches.profile() as profile:
        x * 2
    inside = {row.what: row.count for row in profile.transfers if row.inside == "aten::mul"}
    assert inside["copy to host"] >= 1
    assert inside["copy to device"] == 1


def test_a_pipeline_copies_what_the_device_counts(pipe, device):
    call(pipe)
    device.reset()
    with wan_patches.enabled(), wan_patches.profile() as profile:
        call(pipe)
    rows, uploads, downloads = by_themselves(profile), device.uploads(), device.downloads()
    assert rows["copy to device"].count == uploads.total()
    assert rows["copy to device"].bytes == sum(size * n for size, n in uploads.items())
    assert rows["copy to host"].count == downloads.total()
    assert rows["copy to host"].bytes == sum(size * n for size, n in downloads.items())
    assert [row.device for row in profile.pipelines] == ["npu:0"]
    assert "copy to device" in str(profile)


def test_first_sight_is_told_apart_and_the_gates_reason_is_given(pipe, device, monkeypatch):
    with wan_patches.enabled(["rope"]):
        with wan_patches.profile(trace=False) as first:
            call(pipe)
        with wan_patches.profile(trace=False) as second:
            call(pipe)
    (row,), (later,) = first.ops, second.ops
    assert (row.first_sight, row.stock) == (1, 0)
    assert later.fast == later.calls == row.calls == row.fast + 1

    from wan_patches.patching.fidelity import gate

    gate.reset()
    monkeypatch.setattr(rope.by_stacking, "function", lambda x, cos, sin: x * 2)
    with wan_patches.enabled(["rope"]), wan_patches.profile(trace=False) as wrong:
        call(pipe)
    (row,) = wrong.ops
    assert (row.first_sight, row.fast) == (0, 0)
    ((reason, calls),) = row.reasons.items()
    assert reason.endswith("stack + flatten differs from the stock formulation")
    assert calls == row.calls
    assert wrong.transfers is None
    assert "were not counted" in str(wrong)


def test_the_device_is_waited_for_at_both_ends_of_an_operation(pipe, device, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.npu, "synchronize", lambda device=None: waits.append(device))
    with wan_patches.enabled(["rope"]), wan_patches.profile(trace=False) as profile:
        call(pipe)
    assert len(waits) > 2 * profile.ops[0].calls
    waits.clear()
    call(pipe)
    assert waits == []  # nobody watches
