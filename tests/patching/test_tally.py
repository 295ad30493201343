"""What `status()` reports of calls: the form that ran, the reason for a fallback, and patches that no call reached."""

from __future__ import annotations

import pytest
import torch

import wan_patches
from wan_patches.ops import rope
from wan_patches.ops.dispatch import SMALL
from wan_patches.patching import tally
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = "diffusers.models.transformers.transformer_wan"


@pytest.fixture
def pipe():
    return FAMILIES["wan_t2v"].build()


def call(pipe):
    return pipe(**FAMILIES["wan_t2v"].inputs(steps=1, frames=5))


def notes():
    reports = [report for report in wan_patches.status().reports if report.module == MODULE]
    return {report.name: report.note for report in reports if report.state == "active"}


def test_calls_are_reported_by_patch(pipe):
    with wan_patches.enabled():
        assert not any(report.ways for report in wan_patches.status().reports)
        call(pipe)
        (report,) = [report for report in wan_patches.status().of("rope") if report.module == MODULE]
        assert (report.calls, report.fast) == (8, 0)
        assert report.note == f"not taken: {SMALL} (8)"
        (frames,) = wan_patches.status().of("frames")
        assert frames.note == "fast in 1 of 1 calls"
        assert f"active: not taken: {SMALL.split()[0]}" in " ".join(str(wan_patches.status(verbose=True)).split())
    assert not any(report.note for report in wan_patches.status().reports)  # of what is off


def test_fast_calls_and_reasons_for_fallbacks_are_reported(pipe, any_size, monkeypatch):
    heads, refusal = [], rope.complex_rows.refusal
    monkeypatch.setattr(rope.complex_rows, "refusal", lambda *args: heads.append(1) or refusal(*args))
    with wan_patches.enabled():
        call(pipe)
        assert notes()["rope"] == "fast in 8 of 8 calls"
        assert heads == [1]  # asked once for a kind of input
        pipe.transformer.requires_grad_(True)
        rope.apply_rotary_emb(*(torch.randn(1, 2, 1, n, requires_grad=True) for n in (4, 2, 2)))
        assert notes()["rope"] == "fast in 8 of 8 calls"  # that call came from here


def test_replaced_processor_is_reported_as_no_call(pipe):
    """As beside other libraries' processors."""
    theirs = type(pipe.transformer.blocks[0].attn1.processor)

    class Processor(theirs):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    for block in pipe.transformer.blocks:
        block.attn1.set_processor(Processor())
        block.attn2.set_processor(Processor())
    with wan_patches.enabled():
        call(pipe)
        found = notes()
    assert found["rope"] == found["qk"] == "no call arrived: something else runs in its place"
    assert found["modulation"].startswith("not taken")


def test_compiled_calls_are_not_counted(pipe):
    torch._dynamo.reset()
    with wan_patches.enabled(["rope", "modulation"]):
        pipe.transformer.compile(backend="eager")
        call(pipe)
        assert notes()["rope"] == "no call counted: those of compiled code are not countable"
    assert not tally.counted()
    torch._dynamo.reset()


def test_listeners_are_per_thread():
    import threading

    heard = {}

    def work(name):
        heard[name] = []
        with tally.listening(heard[name].append):
            for _ in range(50):
                tally.count(name, "form")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: {way.op for way in ways} for name, ways in heard.items()} == {name: {name} for name in "abcd"}
    assert all(len(ways) == 50 for ways in heard.values())
