"""Pipelines of the real architectures through every layout, against one process with as many threads."""

from __future__ import annotations

import functools
import os
import signal
import time

import fakes
import pytest
import torch
from PIL import Image
from processes import workers

import wan_patches
from wan_patches import ParallelExecutor
from wan_patches.bench.measure import identical
from wan_patches.executor import WorkerDied
from wan_patches.executor.images import Frame
from wan_patches.testing.families import FAMILIES

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left", "one_thread")]

TWO = {"devices": ["cpu", "cpu"], "spares": 0, "threads": 1}


def alone(name: str, dtype: torch.dtype = torch.float32, **inputs):
    return fakes.family(name, dtype)(**FAMILIES[name].inputs(**inputs)).frames


def executor(name: str, layout: str, dtype: torch.dtype = torch.float32, **options):
    return ParallelExecutor(functools.partial(fakes.family, name, dtype), layout=layout, **TWO, **options)


@pytest.mark.upstream
@pytest.mark.parametrize("patched", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["patched", "stock"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("wan22_i2v", torch.bfloat16), pytest.param("helios_i2v", torch.float32, marks=pytest.mark.slow)],
)
def test_replicas_give_the_video_of_one_process(name, dtype, patched):
    if not FAMILIES[name].available:
        pytest.skip(f"the installed diffusers has no {name}")
    kinds = ("np", "pil", "pt", "latent")
    expected = [alone(name, dtype, seed=seed, output_type=kind) for seed, kind in enumerate(kinds)]
    if patched:
        wan_patches.enable()
    with executor(name, "replicas", dtype) as ex:
        requests = [FAMILIES[name].inputs(seed=seed, output_type=kind) for seed, kind in enumerate(kinds)]
        outputs = list(ex.map(requests))
    for output, video in zip(outputs, expected):
        assert identical(output.frames, video)
    assert all(type(frame) is Frame for frame in outputs[1].frames[0])
    assert isinstance(outputs[1].frames[0][0], Image.Image)
    assert list(outputs[0].timings)[-1] == "postprocess"
    assert {"text", "denoise", "decode"} < set(outputs[0].timings)


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    [
        pytest.param("context", "wan22_i2v", torch.float32, marks=pytest.mark.slow),
        pytest.param("cfg", "wan_t2v", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("cfg", "helios_i2v", torch.float32, marks=pytest.mark.slow),
        ("sharded", "wan22_i2v", torch.bfloat16),
    ],
)
def test_groups_give_the_video_of_one_process(layout, name, dtype):
    wan_patches.enable()
    expected = [alone(name, dtype, seed=seed) for seed in range(2)]
    steps = []
    with executor(name, layout, dtype) as ex:
        for seed in range(2):
            future = ex.submit(
                **FAMILIES[name].inputs(seed=seed), on_progress=lambda _, at: steps.append((at.step, at.total))
            )
            assert identical(future.result().frames, expected[seed])
    assert steps[:2] == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_a_group_draws_the_same_noise_in_every_rank():
    inputs = FAMILIES["wan_t2v"].inputs() | {"generator": None}
    with executor("wan_t2v", "context") as ex:
        torch.manual_seed(1)
        first = ex.submit(**inputs).result().frames
    torch.manual_seed(1)
    torch.manual_seed(int(torch.randint(2**63 - 1, ())))
    assert identical(first, fakes.family("wan_t2v")(**inputs).frames)


@pytest.mark.slow
def test_a_group_leaves_a_request_together_and_goes_on():
    with executor("wan_t2v", "context") as ex:
        pids = {worker.pid for worker in workers()}
        running = ex.submit(**FAMILIES["wan_t2v"].inputs(steps=500))
        while running.progress is None:
            time.sleep(0.01)
        assert running.cancel()
        with pytest.raises(TimeoutError):
            ex.submit(**FAMILIES["wan_t2v"].inputs(steps=500), timeout=0.5).result(60)
        with pytest.raises(ValueError, match="height"):  # in all ranks
            ex.submit(**FAMILIES["wan_t2v"].inputs() | {"height": 33}).result(60)
        assert identical(ex.submit(**FAMILIES["wan_t2v"].inputs()).result().frames, alone("wan_t2v"))
        assert {worker.pid for worker in workers()} == pids


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_death_of_a_rank_fails_its_request_and_the_group_starts_again(rank):
    with executor("wan_t2v", "context", log=lambda *_: None) as ex:
        first = workers()
        running = ex.submit(**FAMILIES["wan_t2v"].inputs(steps=500))
        while running.progress is None:
            time.sleep(0.01)
        os.kill(first[rank].pid, signal.SIGKILL)
        error = running.exception(60)
        assert isinstance(error, WorkerDied)
        assert error.exit_code == -9
        assert error.rank == rank
        assert identical(ex.submit(**FAMILIES["wan_t2v"].inputs()).result(120).frames, alone("wan_t2v"))
        assert not any(worker.is_running() for worker in first)


@pytest.mark.slow
def test_a_rank_that_fails_alone_fails_the_request_and_the_group_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr("wan_patches.executor.groups.OTHER_RANKS", 1.0)
    there = tmp_path / "there"
    factory = functools.partial(fakes.fails_in_one_rank, str(there))
    with ParallelExecutor(factory, layout="context", log=lambda *_: None, **TWO) as ex:
        there.touch()
        with pytest.raises(fakes.CustomError, match="out of luck"):
            ex.submit(**FAMILIES["wan_t2v"].inputs()).result(60)
        there.unlink()
        assert identical(ex.submit(**FAMILIES["wan_t2v"].inputs()).result(120).frames, alone("wan_t2v"))


@pytest.mark.slow
def test_two_groups_work_side_by_side():
    options = {"devices": ["cpu"] * 4, "threads": 1, "group_size": 2, "layout": "cfg"}
    with ParallelExecutor(functools.partial(fakes.family, "wan_t2v"), **options) as ex:
        outputs = list(ex.map([FAMILIES["wan_t2v"].inputs(seed=seed) for seed in range(3)]))
    assert all(identical(output.frames, alone("wan_t2v", seed=seed)) for seed, output in enumerate(outputs))


@pytest.mark.slow
def test_a_pipeline_that_does_not_suit_the_layout_fails_the_constructor():
    with pytest.raises(ValueError, match="layout 'cfg' cannot divide ChronoEditPipeline"):
        executor("chronoedit", "cfg", log=lambda *_: None)
    with pytest.raises(ValueError, match="unknown parallel mode 'usp'"):
        executor("wan_t2v", "context", parallel="usp", log=lambda *_: None)
