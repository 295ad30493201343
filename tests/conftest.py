"""What every test starts from: no network, and stock diffusers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest

import wan_patches

STAND_IN = Path(__file__).with_name("emulated_device") / "torch_npu_stand_in.py"


@pytest.fixture(autouse=True)
def _stock_before_and_after():
    wan_patches.disable()
    yield
    wan_patches.disable()


@pytest.fixture
def one_thread():
    """Small models only wait for more, and much so on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def _at_calls_of_diffusers(then):
    """`then()` runs before the body of each of its functions."""

    def profile(frame, event, _):
        if event == "call" and "/diffusers/" in frame.f_code.co_filename:
            sys.setprofile(None)
            then()
            sys.setprofile(profile)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture
def toggled():
    """What a function gives while patches come or go at a few of the calls in it, chosen by each seed.

    `toggled(run, seeds, **options)`; `options` are those of `enable`.
    """

    def results(run, seeds, **options):
        calls = 0

        def count():
            nonlocal calls
            calls += 1

        with _at_calls_of_diffusers(count):
            run()
        for seed in seeds:
            yield one(run, calls, random.Random(seed), options)

    def one(run, calls, pick, options):
        points = set(pick.sample(range(calls), min(calls, pick.choice((1, 2, 6, 20)))))
        nth, on = 0, pick.random() < 0.5

        def switch():
            wan_patches.enable(**options) if on else wan_patches.disable()

        def call():
            nonlocal nth, on
            if nth in points:
                on = not on
                switch()
            nth += 1

        switch()
        try:
            with _at_calls_of_diffusers(call):
                return run()
        finally:
            wan_patches.disable()

    return results


@pytest.fixture
def torch_npu_stand_in(monkeypatch):
    """A module that stands where torch_npu and mindiesd would be; see its docstring."""
    spec = importlib.util.spec_from_file_location("torch_npu_stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (spec.name, "torch_npu", "mindiesd"):
        monkeypatch.setitem(sys.modules, name, module)
    from wan_patches.fidelity import gate
    from wan_patches.ops import npu

    npu.forget()
    gate.reset()
    yield module
    npu.forget()
    gate.reset()
