"""Threads that switch patches on and off while others generate."""

from __future__ import annotations

import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.patching.codeswap import functions_behind
from wan_patches.testing.families import FAMILIES

SECONDS = 6.0
LONGEST = 120.0  # for three generations of each beside all the others
TOGGLERS = 8
CHOICES = [None, ["rope"], ["conditioning"], ["rope", "frames"], ["preprocess", "conditioning"], []]


@pytest.fixture(autouse=True)
def _many_switches(one_thread: None) -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # more chances to go wrong
    yield
    sys.setswitchinterval(interval)


def target_functions() -> dict[tuple[str, str], types.FunctionType]:
    """Every function that a patch changes in modules that are loaded."""
    found = {}
    for report in wan_patches.status().reports:
        module = sys.modules.get(report.module)
        for qualname in report.targets if module else ():
            value: Any = module
            for name in qualname.split("."):
                value = vars(value).get(name, None) if value is not None else None
            if functions := functions_behind(value, getattr(module, "__file__", None)):
                found[report.module, qualname] = functions[-1]
    return found


def toggle(stop: threading.Event, seed: int) -> None:
    pick = random.Random(seed)
    while not stop.is_set():
        what = pick.randrange(4)
        if what == 0:
            wan_patches.enable(pick.choice(CHOICES))
        elif what == 1:
            wan_patches.disable()
        elif what == 2:
            with wan_patches.enabled(pick.choice(CHOICES), gate=pick.random() < 0.5):
                time.sleep(pick.random() / 1000)
                with wan_patches.enabled(pick.choice(CHOICES)):
                    time.sleep(pick.random() / 1000)
        else:
            str(wan_patches.status())
        time.sleep(pick.random() / 1000)


def latents(seed: int) -> Callable[[], np.ndarray]:
    """A forward pass of a transformer, large enough for the fast form of the rotary embedding."""
    model = FAMILIES["wan_t2v"].build(seed=seed, transformer={"num_layers": 1}).transformer
    generator = torch.Generator().manual_seed(seed)
    call = {
        "hidden_states": torch.randn(1, 16, 3, 20, 20, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        "return_dict": False,
    }

    @torch.no_grad()
    def generate() -> np.ndarray:
        return model(**call)[0].numpy()

    return generate


def video(seed: int) -> Callable[[], np.ndarray]:
    pipe = FAMILIES["wan22_i2v"].build(seed=seed, transformer={"num_layers": 1})
    return lambda: pipe(**FAMILIES["wan22_i2v"].inputs(seed=seed, frames=5)).frames


def test_eight_threads_toggle_while_two_generate_stock_bits():
    generators = [latents(1), video(2)]
    expected = [generate() for generate in generators]
    functions = target_functions()
    originals = {key: function.__code__ for key, function in functions.items()}
    assert len(originals) >= 4
    stop, errors = threading.Event(), []
    counts, saw_ours = [0, 0], [0]

    def watched(target: Callable[..., None], *args: Any) -> Callable[[], None]:
        def run() -> None:
            try:
                target(*args)
            except BaseException as error:
                errors.append(error)
                stop.set()

        return run

    def work(nth: int) -> None:
        while not stop.is_set():
            assert np.array_equal(generators[nth](), expected[nth])
            counts[nth] += 1
            saw_ours[0] += any(f.__code__ is not originals[key] for key, f in functions.items())

    threads = [threading.Thread(target=watched(toggle, stop, seed), daemon=True) for seed in range(TOGGLERS)]
    threads += [threading.Thread(target=watched(work, nth), daemon=True) for nth in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONGEST
    stop.wait(SECONDS)
    while min(counts) < 3 and time.monotonic() < deadline and not stop.wait(0.1):  # a slow or busy machine
        pass
    stop.set()
    for thread in threads:
        thread.join(15)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors
    assert min(counts) >= 3, counts
    assert saw_ours[0] > 0  # patches were in while videos were made

    assert len(wan_patches._registry._frames) == 1
    wan_patches.disable()
    assert {report.state for report in wan_patches.status().reports} == {"off"}
    for key, function in functions.items():
        assert function.__code__ is originals[key], key
    assert all(np.array_equal(generate(), wanted) for generate, wanted in zip(generators, expected, strict=True))
    with wan_patches.enabled():  # and it still works
        assert any(function.__code__ is not originals[key] for key, function in functions.items())
        assert not wan_patches.status().skipped()
    assert all(function.__code__ is originals[key] for key, function in functions.items())


def test_a_context_that_outlives_another_threads_context_leaves_nothing_behind():
    """Contexts of threads overlap without nesting."""
    FAMILIES["wan_t2v"].build()
    functions = target_functions()
    originals = {key: function.__code__ for key, function in functions.items()}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with wan_patches.enabled(["rope"]):
            inside.set()
            leave.wait(10)

    with wan_patches.enabled(["frames"]):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert [report.name for report in wan_patches.status().reports if report.state == "active"].count("rope") >= 1
    leave.set()
    thread.join(10)
    assert {report.state for report in wan_patches.status().reports} == {"off"}
    assert all(function.__code__ is originals[key] for key, function in functions.items())
