"""Layouts over two processes under gloo, against the same pipelines in one process with as many threads."""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan_patches.executor.layouts import LAYOUTS, place
from wan_patches.executor.layouts.context import _only_accelerator

CPU = torch.device("cpu")
SECONDS = 240

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
assert spec is not None
assert spec.loader is not None
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got in each case; of those that are about a pipeline, in the chosen ones."""
    wanted = chosen | {case.replace("context", "stock", 1) for case in chosen}
    run = [case for case in ranks.CASES if case in wanted or case.rsplit(" ", 1)[1] not in ranks.MODELS]
    folder = tmp_path_factory.mktemp("ranks")
    processes = []
    try:
        for rank in range(2):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(HERE / "ranks.py"), str(rank), str(folder), *run]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log[-3000:] for log in logs)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@functools.cache
def alone(name: str, layout: str = "cfg") -> list[np.ndarray]:
    """The videos of the pipeline in this process."""
    return ranks.videos(ranks.build(name), name, layout)


def given(results: list[dict[str, Any]], case: str) -> list[Any]:
    for rank in results:
        if isinstance(rank[case], Exception):
            raise rank[case]
    return [rank[case] for rank in results]


#: Of the cases that are about a pipeline, those that every change is tried with.
LOOP = (
    "context ulysses wan22_i2v", "context ulysses helios_40", "context ring wan22_i2v", "sharded wan_t2v_bf16",
    "sharded wan22_i2v", "sharded wan_vace", "cfg wan_t2v_bf16", "cfg wan22_i2v", "cfg wan_vace", "cfg helios",
    "cfg skyreels_v2_df",
)  # fmt: skip


def cases(*starts: str) -> list[Any]:
    """The cases that begin so, and the pipeline each is about."""
    found = [(case, case.rsplit(" ", 1)[1]) for case in ranks.CASES if case.startswith(starts)]
    marks = {case: () if case in LOOP else (pytest.mark.slow,) for case, _ in found}
    return [pytest.param(case, name, marks=marks[case]) for case, name in found if name in ranks.MODELS]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@pytest.mark.parametrize(("case", "name"), cases("sharded", "cfg"))
def test_video_has_the_bits_of_one_process(case, name, results):
    for rank in given(results, case):
        assert same(rank["videos"], alone(name, case.split()[0]))


@pytest.mark.parametrize(("case", "name"), cases("context"))
def test_context_has_the_bits_of_stock_and_nearly_those_of_one_process(case, name, results):
    first, _ = given(results, case)
    by_hand = case.replace("context", "stock", 1)
    if by_hand in ranks.CASES:
        assert same(first["videos"], given(results, by_hand)[0]["videos"])
    for video, expected in zip(first["videos"], alone(name, "context")):
        assert np.abs(video - expected).max() < 1e-4


@pytest.mark.parametrize(("case", "name"), cases("cfg"))
def test_cfg_halves_the_calls_of_the_denoiser(case, name, results):
    pipe = ranks.build(name)
    with ranks.counted(pipe) as calls:
        ranks.videos(pipe, name)
    unguided = ranks.build(name)
    with ranks.counted(unguided) as single:
        unguided(**ranks.inputs(name, seed=3, guidance_scale=1.0))
    expected = (len(calls) - len(single)) // 2 + len(single)
    first, second = given(results, case)
    assert first["calls"] == expected
    assert expected <= second["calls"] <= expected + 3  # what the output is like, for each kind of input


@pytest.mark.parametrize(("case", "name"), cases("sharded"))
def test_sharded_rank_holds_half_of_the_weights(case, name, results):
    first, second = given(results, case)
    for part in first["shard"]:
        # FSDP pads what it cannot halve, such as tables of one row: much here and nothing in large models
        assert 0.5 <= first["shard"][part] < 0.52
        assert 1.0 <= first["shard"][part] + second["shard"][part] < 1.02


def test_sharded_model_says_what_it_said_before(results):
    for rank in given(results, "sharded properties"):
        assert rank.pop("share") == pytest.approx(0.5, abs=0.01)
        assert rank == dict.fromkeys(rank, True)


@pytest.mark.parametrize("layout", ["cfg", "sharded"])
def test_a_failed_request_leaves_nothing_behind(layout, results):
    for rank in given(results, f"{layout} after a failure"):
        assert same(rank["videos"], alone("wan_t2v"))


@pytest.mark.parametrize("how", ["in place", "around"])
def test_cfg_takes_a_compiled_model(how, results):
    for rank in given(results, f"cfg compiled {how}"):
        assert same(rank["videos"], alone("wan_t2v")[:1])


def test_cfg_takes_a_model_with_a_cache_across_steps(results):
    expected = ranks.videos(ranks.cached(ranks.build("wan_t2v")), "wan_t2v")
    assert not same(expected, alone("wan_t2v"))
    for rank in given(results, "cfg cached"):
        assert same(rank["videos"], expected)


def test_cfg_watches_a_scheduler_given_later(results):
    for rank in given(results, "cfg another scheduler"):
        assert rank["watched"]
        assert same(rank["videos"], alone("wan_t2v")[:1])


def test_cfg_lets_a_model_give_nan(results):
    assert given(results, "cfg not a number") == [True, True]


REFUSED: dict[str, tuple[type[Exception], str]] = {
    "cfg cast": (RuntimeError, "WanPipeline reads the conditional branch before it calls the unconditional one"),
    "cfg without uncond": (RuntimeError, "Lying takes a step without the unconditional branch"),
    "cfg batched": (ValueError, "SanaVideoPipeline: its denoiser has no `cache_context`"),
    "cfg no context": (ValueError, "ChronoEditPipeline: it does not call its denoiser once for each branch"),
    "context tensor": (ValueError, "no tensor parallel plan .*parallel='ulysses'"),
    "context native ring": (ValueError, "'native' returns no log-sum-exp.*set_attention_backend"),
    "context heads": (ValueError, "cannot divide the 3 heads .* by 2: use parallel='ring'.*ulysses_anything=True"),
    "context no plan": (ValueError, "SanaVideoTransformer3DModel has no context parallel plan"),
    "context unknown": (ValueError, "unknown parallel mode 'usp'; known: ulysses, ring, tensor"),
    "context degree": (ValueError, "divides by 4, but the group has 2 devices"),
    "context backend": (ValueError, "_native_math.*does not support context parallelism.*set_attention_backend"),
    "sharded quantised": (ValueError, "packed weights of a quantised WanTransformer3DModel"),
    "sharded offloaded": (ValueError, "cannot be combined with offloading"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_laid_out_is_refused_in_both_ranks(case, results):
    error, message = REFUSED[case]
    for rank in results:
        with pytest.raises(error, match=message):
            raise rank[case]


def test_every_case_is_judged():
    judged = {param.values[0] for param in cases("context", "sharded", "cfg", "stock")} | set(REFUSED)
    single = {"sharded properties", "cfg another scheduler", "cfg not a number", "cfg cached", "context anything"}
    single |= {"context device"}
    single |= {f"{layout} after a failure" for layout in ("cfg", "sharded")}
    single |= {f"cfg compiled {how}" for how in ("in place", "around")}
    assert judged | single == set(ranks.CASES)


def test_denoisers_of_a_pipeline_share_a_mesh_and_know_their_device(results):
    for rank in given(results, "context device"):
        assert rank == {"device": True, "mesh": True}


def test_ulysses_anything_is_used_as_given(results):
    for video, expected in zip(given(results, "context anything")[0]["videos"], alone("wan_three_heads", "context")):
        assert np.abs(video - expected).max() < 1e-4


# In this process


def test_torch_says_again_what_the_accelerator_is(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with _only_accelerator(CPU):
        assert torch._C._get_accelerator().type == "cpu"
        assert torch.accelerator.device_count() == 1
    assert torch._C._get_accelerator().type == "cuda"
    assert torch.accelerator.device_count() == 0


class Recorder:
    """A fake pipeline that can be moved."""

    def __init__(self) -> None:
        self.moves: list[torch.device] = []

    def to(self, device: torch.device) -> None:
        self.moves.append(device)


@pytest.mark.parametrize("layout", ["inline", "replicas"])
def test_pipelines_are_moved_unless_they_are_managed_or_cannot_be(layout):
    pipe = Recorder()
    place(pipe, layout, CPU)
    assert pipe.moves == [CPU]
    pipe.hf_device_map = {"": 0}
    place(pipe, layout, CPU)
    assert pipe.moves == [CPU]
    place(lambda **_: None, layout, CPU)


@pytest.mark.parametrize("offload", ["group", "sequential", "none"])
def test_a_pipeline_that_is_offloaded_or_there_is_not_moved(offload, monkeypatch):
    pipe = ranks.build("wan_t2v")
    if offload == "group":
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    elif offload == "sequential":
        pipe.transformer._hf_hook = type("Hook", (), {"execution_device": CPU})()
    if offload != "none":
        pipe.vae.to("meta")
    monkeypatch.setattr(type(pipe), "to", lambda *_: pytest.fail("moved"))
    place(pipe, "inline", CPU)


def test_what_bitsandbytes_has_packed_stays_where_it_is(monkeypatch):
    pipe = ranks.build("wan_t2v")
    pipe.transformer.is_loaded_in_4bit = True
    pipe.vae.to("meta")
    moved = []
    for name in ("transformer", "vae", "text_encoder"):
        monkeypatch.setattr(getattr(pipe, name), "to", lambda *_, name=name: moved.append(name))
    place(pipe, "replicas", CPU)
    assert sorted(moved) == ["text_encoder", "vae"]


@pytest.mark.parametrize(
    ("layout", "wanted"), [("context", "2 or more"), ("sharded", "2 or more"), ("cfg", "exactly 2")]
)
def test_layouts_of_several_devices_refuse_one(layout, wanted):
    with pytest.raises(ValueError, match=f"layout '{layout}' needs {wanted}.* devices in a group, not 1"):
        place(ranks.build("wan_t2v"), layout, CPU)


@pytest.mark.parametrize("layout", ["context", "sharded", "cfg"])
def test_what_is_no_pipeline_is_refused_by_name(layout):
    with pytest.raises(ValueError, match="needs a diffusers pipeline with a `transformer` or a `unet`; Recorder has"):
        place(Recorder(), layout, CPU)


def test_unknown_layouts_and_misplaced_options_are_refused():
    with pytest.raises(ValueError, match=f"unknown layout 'auto'; known: {', '.join(LAYOUTS)}"):
        place(Recorder(), "auto", CPU)
    with pytest.raises(ValueError, match="belongs to the layout 'context', not to 'cfg'"):
        place(Recorder(), "cfg", CPU, "ring")
