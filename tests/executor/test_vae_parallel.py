"""A VAE that two and three processes share under gloo, against the installed one in one process, one thread each."""

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
from hypothesis import given as generated
from hypothesis import strategies as st

from wan_patches import ParallelExecutor
from wan_patches.executor.layouts import place
from wan_patches.vae_parallel import balanced, parallelize_vae

SECONDS = 400
CPU = torch.device("cpu")
HERE = Path(__file__).parent

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
if not hasattr(autoencoders.AutoencoderKLWan, "tiled_decode"):
    pytest.skip("this diffusers has no tiling for Wan's VAE", allow_module_level=True)

spec = importlib.util.spec_from_file_location("vae_ranks", HERE / "vae_ranks.py")
assert spec is not None
assert spec.loader is not None
ranks = importlib.util.module_from_spec(spec)
sys.modules["vae_ranks"] = ranks  # executors' workers find its functions under that name
spec.loader.exec_module(ranks)

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]

SIZES = [2, pytest.param(3, marks=pytest.mark.slow)]


def run(folder: Path, size: int, cases: list[str]) -> list[dict[str, Any]]:
    """What each rank got in each case."""
    processes = []
    try:
        for rank in range(size):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(HERE / "vae_ranks.py"), str(rank), str(size), str(folder), *cases]
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
    logs = [(folder / f"{rank}.log").read_text() for rank in range(size)]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(log[-3000:] for log in logs)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(size)]


@pytest.fixture(scope="module", params=SIZES, ids=["2-ranks", "3-ranks"])
def results(
    request: pytest.FixtureRequest, chosen: set[str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    left = {f"tiles {name}" for name in ranks.TILED if name not in chosen}
    cases = [case for case in ranks.CASES if case not in left and not case.startswith("compiled")]  # those take long
    return run(tmp_path_factory.mktemp("ranks"), request.param, cases)


@pytest.fixture(scope="module")
def pipelines(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("pipelines"), 2, [case for case in ranks.PIPELINES if case in chosen])


def given(results: list[dict[str, Any]], case: str) -> list[Any]:
    for rank in results:
        if isinstance(rank[case], (Exception, str)):
            raise AssertionError(rank[case])
    return [rank[case] for rank in results]


@functools.cache
def stock(case: Any) -> torch.Tensor:
    return case(ranks.alone)


def outcome(call: Any) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


# Tiles


LARGE = ("decode 1x15x21", "encode 1x120x168", "encode 9x61x95", "encode 1x64x200")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith(LARGE) else name for name in ranks.TILED],
)
def test_tiles_have_the_bits_of_stock(name, results):
    expected = outcome(lambda: stock_tiled(name))
    for rank in results:
        found = rank[f"tiles {name}"]
        if isinstance(expected, type):  # what stock cannot compute
            assert isinstance(found, expected)
            continue
        assert isinstance(found, torch.Tensor), found
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@functools.cache
def stock_tiled(name: str) -> torch.Tensor:
    from dataclasses import replace

    case = ranks.TILED[name]
    return replace(case, tiles=None, patched=False)(ranks.alone, with_tiles(case))


def with_tiles(case: Any) -> Any:
    model = ranks.vae(case.family, case.dtype)
    model.enable_tiling(**case.tiles)
    return model


def test_the_tiled_cases_are_tiled():
    untiled = ranks.Case("decode", (1, 2, 9, 11))
    assert not torch.equal(stock(untiled), stock_tiled("decode 2x9x11 fp32"))


def test_tiling_is_turned_on_and_off_again(results):
    expected = stock_tiled("decode 2x9x11 fp32")
    for rank in given(results, "turned on"):
        assert rank["inside"] == (True, True, "AutoencoderKLWan")
        assert rank["after"] == (False, True)
        assert rank["same"]
        assert torch.equal(rank["result"], expected)


def test_every_tile_is_computed_once_and_the_work_is_balanced(results):
    found = given(results, "shares")
    model, tiles = ranks.vae(), []
    model.decoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].numel()))
    ranks.Case("decode", (1, 1, 21, 15), tiles=ranks.SMALL)(ranks.alone, model)
    assert len(set(tiles)) > 2
    assert sorted(part for rank in found for part in rank) == sorted(tiles)
    # what no distribution can be better than, and a little
    assert max(map(sum, found)) <= 1.2 * max(max(tiles), sum(tiles) / len(found))


def test_when_a_rank_fails_all_say_so_and_go_on(results):
    *others, last = given(results, "failing")
    assert last["said"] == "KeyError: 'nothing'"
    message = f"RuntimeError: rank {len(others)} of a parallel VAE failed with KeyError: 'nothing'"
    assert [rank["said"] for rank in others] == [message] * len(others)
    expected = ranks.Case("decode", (1, 1, 9, 11), tiles=ranks.SMALL)(ranks.alone)
    for rank in (*others, last):
        assert torch.equal(rank["result"], expected)


@generated(st.dictionaries(st.integers(0, 40), st.integers(1, 1000)), st.integers(1, 9))
def test_no_rank_has_much_more_than_another(sizes, count):
    owners = balanced(sizes, count)
    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[tile] for tile in sizes if owners[tile] == rank) for rank in range(count)]
    assert set(owners.values()) <= set(range(count))
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_large_tiles_are_given_away_first():
    assert balanced({0: 1, 1: 1, 2: 1, 3: 3}, 2) == {3: 0, 0: 1, 1: 1, 2: 1}


# Slabs


@pytest.mark.parametrize("name", ranks.SLABS)
def test_slabs_follow_stock_without_tiling(name, results):
    expected = stock(ranks.SLABS[name])
    first, *others = given(results, f"slabs {name}")
    assert first.shape == expected.shape
    assert (first - expected).abs().max() <= 1e-5
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        *((kind, 1.01) for kind in ranks.CLOSELY if kind[0] in ranks.available()),
        *((kind, 1.1) for kind in ranks.ROUGHLY if kind[0] in ranks.available()),
    ],
)
def test_slabs_are_as_near_to_float64_as_stock(kind, times, results):
    family, method, *sizes = kind
    start = f"{family} {method} {'x'.join(map(str, sizes))} "
    ours, theirs = [], []
    for name in (name for name in ranks.SLABS if name.startswith(start)):
        exact = reference(name)
        ours.append((given(results, f"slabs {name}")[0] - exact).abs().mean().item())
        theirs.append((stock(ranks.SLABS[name]) - exact).abs().mean().item())
    assert len(ours) == 3
    assert sum(ours) <= times * sum(theirs)


@functools.cache
def reference(name: str) -> torch.Tensor:
    return ranks.SLABS[name].reference()


REFUSED: dict[str, tuple[type[Exception], str]] = {
    "refused small": (ValueError, "ranks cannot share 1 rows or 1 columns of latents"),
    "refused tiling": (ValueError, "requires tiling to be off: call disable_tiling"),
    "refused tiling later": (RuntimeError, "requires tiling to be off, but it was turned on since"),
    "refused twice": (ValueError, "this AutoencoderKLWan is already parallel"),
    "refused bypassed": (RuntimeError, "computed without calling them as modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused_in_all_ranks(case, results):
    error, message = REFUSED[case]
    for rank in results:
        with pytest.raises(error, match=message):
            raise rank[case]


# Both


@pytest.mark.parametrize("mode", ["tiles", "spatial"])
def test_with_gradients_every_rank_computes_everything(mode, results):
    expected = ranks.recorded(mode)
    for found in given(results, f"recorded {mode}"):
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tiles", "spatial"])
def test_a_compiled_decode(mode, tmp_path):
    expected = ranks.compiled(mode)
    for found in given(run(tmp_path, 2, [f"compiled {mode}"]), f"compiled {mode}"):
        assert (found - expected).abs().max() <= (0 if mode == "tiles" else 1e-5)


def test_a_group_of_some_ranks(results):
    tiled, untiled = (ranks.Case("decode", (1, 1, 9, 11), tiles=tiles)(ranks.alone) for tiles in (ranks.SMALL, None))
    *outside, first, second = given(results, "subgroup")
    assert outside == [None] * len(outside)
    for by_tiles, by_slabs in (first, second):
        assert torch.equal(by_tiles, tiled)
        assert (by_slabs - untiled).abs().max() <= 1e-5


# Pipelines


@functools.cache
def alone(name: str) -> np.ndarray:
    return ranks.video(ranks.tiled(name), name)


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("context wan22_i2v", "sharded wan_vace", "cfg wan_animate", "cfg wan22_ti2v")
        else pytest.param(case, marks=pytest.mark.slow)
        for case in ranks.PIPELINES
    ],
)  # fmt: skip
def test_layouts_share_the_vae_with_the_bits_of_one_process(case, pipelines):
    layout, name = case.split()
    for rank in pipelines:
        if layout == "context" and isinstance(rank[case], RuntimeError) and "needs diffusers 0.36" in str(rank[case]):
            pytest.skip(str(rank[case]))
    try:
        expected = alone(name)
    except RuntimeError as error:  # diffusers 0.35 cannot encode tiles of the residual VAE
        if {str(rank[case]) for rank in pipelines} == {str(error)}:
            pytest.skip(f"stock cannot do it: {error}")
        raise
    for found in given(pipelines, case):
        assert np.array_equal(found, expected)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("vae_parallel", "layout"),
    [pytest.param(True, "cfg", marks=pytest.mark.slow), pytest.param("spatial", "sharded", marks=pytest.mark.slow)],
)
def test_an_executor_shares_the_vae(vae_parallel, layout):
    import vae_ranks

    name = "wan22_i2v"
    build = vae_ranks.tiled if vae_parallel is True else vae_ranks.untiled
    with ParallelExecutor(
        functools.partial(build, name), devices=["cpu", "cpu"], threads=1, layout=layout, vae_parallel=vae_parallel
    ) as executor:
        future = executor.submit(**vae_ranks.request(name))
        found = future.result().frames
    if vae_parallel is True:
        assert np.array_equal(found, alone(name))
    else:
        assert np.abs(found - ranks.video(ranks.untiled(name), name)).max() < 1e-4


# In this process


class Recorder:
    """A fake pipeline."""

    vae = torch.nn.Identity()


@pytest.mark.parametrize("layout", ["inline", "replicas"])
def test_layouts_of_one_device_refuse_it(layout):
    with pytest.raises(ValueError, match="one device works on a request; vae_parallel=True is for context, cfg"):
        place(Recorder(), layout, CPU, vae_parallel=True)
    with pytest.raises(ValueError, match="one device works on a request; vae_parallel='tiles' is for context, cfg"):
        ParallelExecutor(Recorder, devices=["cpu"] * (1 + (layout == "replicas")), layout=layout, vae_parallel="tiles")


def test_other_pipelines_and_modes_are_refused():
    with pytest.raises(ValueError, match="the `vae` of Recorder is Identity"):
        place(Recorder(), "cfg", CPU, vae_parallel=True)
    with pytest.raises(ValueError, match="unknown vae_parallel='rows'; known: True, False, 'tiles', 'spatial'"):
        place(Recorder(), "cfg", CPU, vae_parallel="rows")
    with pytest.raises(ValueError, match="unknown mode 'rows'; known: tiles, spatial"):
        parallelize_vae(ranks.vae(), mode="rows")
    with pytest.raises(ValueError, match="Identity cannot be made parallel; AutoencoderKLWan can"):
        parallelize_vae(torch.nn.Identity())
    with pytest.raises(RuntimeError, match="call init_process_group in every rank"):
        parallelize_vae(ranks.vae())


@pytest.mark.parametrize("mode", ["tiles", "spatial"])
def test_unknown_code_is_refused_and_left_as_it_is(mode, monkeypatch):
    from wan_patches.vae_parallel import parallelize

    monkeypatch.setattr(parallelize, "Ranks", lambda group: None)
    method = {"tiles": "tiled_encode", "spatial": "_encode"}[mode]
    monkeypatch.setattr(autoencoders.AutoencoderKLWan, method, lambda self, x: x)
    model = ranks.vae()
    with pytest.raises(RuntimeError, match=f"AutoencoderKLWan.{method} differs from all known versions"):
        parallelize_vae(model, mode=mode)
    assert type(model) is autoencoders.AutoencoderKLWan
    assert not model.use_tiling
