"""The executor on a Ray cluster keeps the promises of the one on this machine."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from processes import wait_until

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.executor import Bounds, RemoteError, WorkerDied, WorkerHung
from wan_patches.testing.families import FAMILIES

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'wan-patches[ray]'")

from wan_patches.executor.ray import RayParallelExecutor  # noqa: E402

pytestmark = pytest.mark.timeout(120)

ONE = {"devices": 1}


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    """Ray on this machine, with CPUs that are only counted; no process of it outlives the module."""
    before = set(psutil.Process().children(recursive=True))
    options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200 << 20, "log_to_driver": False}
    ray.init("local", **options)  # whatever else runs on the machine
    yield
    ray.shutdown()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def _shared(_cluster):
    with RayParallelExecutor(fakes.fake, devices=2, threads=1) as executor:
        yield executor


@pytest.fixture
def executor(_shared):
    """Two workers, which must be as good as new after each test."""
    yield _shared
    assert _shared.submit(value="works").result(30) == "works"


def _pids(executor) -> set[int]:
    return set(executor.map([{"do": "pid", "steps": 1, "seconds": 0.2}] * 2))


def _until_running(request) -> None:
    while request.progress is None:
        assert not request.done()
        time.sleep(0.01)


# Values


def test_values_arrive_as_they_were(executor):
    value = {"a": torch.randn(3, 300, 300).to(torch.bfloat16), "b": [np.arange(99999), "text", None, {1, 2}]}
    got = executor.submit(value=value).result()
    assert torch.equal(got["a"], value["a"])
    assert np.array_equal(got["b"][0], value["b"][0])
    assert got["b"][1:] == value["b"][1:]
    assert executor.submit("echo", torch.empty(0, 3)).result().shape == (0, 3)


def test_images_arrive_and_are_decoded_when_looked_at(executor):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 240, 320, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    got = executor.submit(value=images).result()
    assert all("core" not in image._decoded for image in got)
    assert got == images
    assert got[1].convert("L").tobytes() == images[1].convert("L").tobytes()


def test_results_can_be_written_to_and_are_not_the_stores(executor):
    results = [executor.submit("big", n).result() for n in (1, 2)]
    results[0].frames += 10
    assert torch.equal(results[0].frames, torch.full((fakes.BIG,), 11, dtype=torch.int32))
    assert torch.equal(results[1].frames, torch.full((fakes.BIG,), 2, dtype=torch.int32))


def test_requests_are_spread_over_the_workers(executor):
    assert len(_pids(executor)) == 2
    assert os.getpid() not in _pids(executor)
    assert list(executor.map([{"value": n} for n in range(8)])) == [*range(8)]


def test_the_default_seed_and_generators_go_along(executor):
    expected = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(executor.submit("noise", torch.Generator().manual_seed(5)).result(), expected)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(torch.stack(list(executor.map([{"do": "noise"}] * 4))))
    assert torch.equal(draws[0], draws[1])


@pytest.mark.slow
def test_results_outlive_the_executor_and_ray(tmp_path):
    done = _script(
        tmp_path,
        """
        import fakes, gc, psutil, ray, torch
        from wan_patches.executor.ray import RayParallelExecutor

        with RayParallelExecutor(fakes.fake, devices=1, threads=3, address="local") as executor:
            assert ray.is_initialized()
            output = executor.submit("big", 7).result()
            print(executor.submit("environment", "HOME").result()[1])
        assert not ray.is_initialized()
        gc.collect()
        left = psutil.Process().children(recursive=True)
        assert not psutil.wait_procs(left, timeout=20)[1], left
        output.frames += 1
        print(output.frames.sum().item())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["3", str(8 * fakes.BIG)]


# Progress, cancel, timeouts


def test_progress_of_every_step(executor):
    seen = []
    future = executor.submit(
        value=1, steps=4, on_progress=lambda request, at: seen.append((request, at.step, at.total))
    )
    assert future.result() == 1
    assert seen == [(future, n, 4) for n in (1, 2, 3, 4)]
    assert future.timings["call"] >= 0


def test_frames_come_chunk_by_chunk():
    chunks, family = [], FAMILIES["wan_t2v"]
    with RayParallelExecutor(functools.partial(fakes.family, "wan_t2v"), **ONE, threads=1) as executor:
        request = executor.submit(on_frames=lambda _, chunk: chunks.append(chunk), **family.inputs(steps=1))
        assert request.result(60).frames is None
        whole = executor.submit(**family.inputs(steps=1)).result(60).frames
    assert [(chunk.start, chunk.reason) for chunk in chunks] == [(0, None), (1, None), (5, None)]
    assert identical(np.concatenate([chunk.frames for chunk in chunks], axis=1), whole)


def test_what_runs_can_be_cancelled_and_the_worker_lives_on(executor):
    pids = _pids(executor)
    running = executor.submit(steps=1000, seconds=100)
    _until_running(running)
    start = time.monotonic()
    assert running.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        running.result()
    assert _pids(executor) == pids
    assert time.monotonic() - start < 10


def test_a_request_times_out_and_the_worker_lives_on(executor):
    pids = _pids(executor)
    with pytest.raises(TimeoutError, match=r"took longer than its timeout of 0.3 s"):
        executor.submit(steps=1000, seconds=100, timeout=0.3).result(30)
    assert _pids(executor) == pids


@pytest.mark.slow
def test_a_worker_that_does_not_reach_its_next_step_is_replaced():
    with RayParallelExecutor(fakes.fake, **ONE, cancel_grace=0.5) as executor:
        pid = executor.submit("pid").result()
        with pytest.raises(TimeoutError):
            executor.submit("hang", 100, timeout=0.3).result(30)
        assert executor.submit("pid").result(60) != pid


# Errors


def test_an_exception_arrives_with_type_message_and_traceback(executor):
    error = executor.submit("fail", "bad prompt").exception()
    assert type(error) is fakes.CustomError
    assert (str(error), error.code) == ("bad prompt (7)", 7)
    assert "in fail\n    raise CustomError(7, value)" in str(error.__cause__)
    error = executor.submit("fail_oddly").exception()
    assert isinstance(error, RemoteError)
    assert str(error) == "fakes.Unportable: 1 and 2"


@pytest.mark.parametrize("do", ["unpicklable", "unloadable"])
def test_a_result_that_cannot_travel_is_an_error_of_that_future_only(executor, do):
    pids = _pids(executor)
    with pytest.raises((TypeError, ImportError), match=r"pickle|load in another"):
        executor.submit(do).result()
    assert _pids(executor) == pids


def test_a_request_that_cannot_travel_is_an_error_of_that_future_only(executor):
    with pytest.raises(TypeError, match="pickle"):
        executor.submit(value=threading.Lock()).result()
    with pytest.raises(ImportError, match="another process"):
        executor.submit(value=fakes.Unloadable()).result()


def test_a_dead_worker_loses_its_own_request_only(executor):
    lost = executor.submit("kill", signal.SIGKILL)
    others = [executor.submit(value=n, steps=2, seconds=0.1) for n in range(4)]
    with pytest.raises(WorkerDied, match=rf"worker \d \(pid \d+, node .+\) ended during request {lost.id}") as caught:
        lost.result(60)
    assert caught.value.exit_code is None
    assert caught.value.node == ray.util.get_node_ip_address()
    assert "actor" in str(caught.value.__cause__)
    assert [future.result(60) for future in others] == [*range(4)]


def test_a_worker_that_is_killed_while_it_runs_is_replaced(executor):
    pids = _pids(executor)
    running = executor.submit(steps=1000, seconds=100)
    _until_running(running)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        running.result(30)
    assert not _pids(executor) & pids


@pytest.mark.parametrize("do", ["stop", pytest.param("hold_the_lock", marks=pytest.mark.slow)])
def test_a_worker_that_gives_no_sign_of_life_is_started_again(do, caplog):
    with RayParallelExecutor(fakes.fake, **ONE, bounds=Bounds(answer=8.0)) as executor:
        (before,) = executor.health().workers
        assert before.device == f"CPU of node {ray.util.get_node_ip_address()}"
        request = executor.submit(do, 60)
        with pytest.raises(WorkerHung, match=rf"worker 0 \(pid {before.pid}, node .*\) gave no sign of life for 8 s"):
            request.result(60)
        assert "gave no sign of life for 8 s during request 1" in caplog.text
        assert executor.submit("pid").result(60) != before.pid


@pytest.mark.slow
def test_too_long_between_two_steps_and_a_load_that_hangs_have_bounds(tmp_path):
    with RayParallelExecutor(fakes.fake, **ONE, bounds=Bounds(step=2.0)) as executor:
        with pytest.raises(WorkerHung, match="made no step for 2 s during request 1"):
            executor.submit("hang", 60, steps=2, seconds=0.1).result(60)
        assert executor.submit(value=1).result(60) == 1
    with pytest.raises(WorkerHung, match="was not ready for 2 s while it loaded the pipeline"):
        RayParallelExecutor(functools.partial(fakes.slow_to_load, 60), **ONE, bounds=Bounds(load=2.0))


@pytest.mark.slow
def test_a_short_outage_costs_nothing_but_time(tmp_path):
    there = tmp_path / "there"
    there.touch()
    with RayParallelExecutor(functools.partial(fakes.while_there, str(there)), **ONE) as executor:
        there.unlink()
        killed, waiting = executor.submit("kill", signal.SIGKILL), executor.submit(value="late")
        assert isinstance(killed.exception(60), WorkerDied)
        wait_until(lambda: executor.health().workers[0].restarts >= 2)
        there.touch()
        assert waiting.result(60) == "late"


@pytest.mark.slow
def test_shutdown_ends_within_its_bound_whatever_runs():
    executor = RayParallelExecutor(fakes.fake, **ONE)
    running = executor.submit("hang", 100)
    wait_until(running.running)
    start = time.monotonic()
    executor.shutdown(timeout=1.0)
    assert time.monotonic() - start < 40
    assert running.cancelled()


@pytest.mark.slow
def test_a_worker_that_dies_idle_costs_no_request():
    with RayParallelExecutor(fakes.fake, **ONE) as executor:
        pid = executor.submit("pid").result()
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
        assert executor.submit("pid").result(60) != pid


@pytest.mark.slow
def test_the_last_lines_of_a_dead_worker_are_told(tmp_path):
    done = _script(
        tmp_path,
        """
        import fakes, ray
        from wan_patches import RayParallelExecutor

        ray.init(num_cpus=1, include_dashboard=False)
        with RayParallelExecutor(fakes.fake, devices=1) as executor:
            print("log:", executor.submit("kill", 9).exception(60).log)
        """,
    )
    assert "log: ('about to go',)" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_lost_request_is_tried_again(tmp_path):
    with RayParallelExecutor(fakes.fake, **ONE, retries=1) as executor:
        assert executor.submit("kill_once", str(tmp_path / "was here")).result(60) == "second time"


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_loaded_fails_the_constructor():
    with pytest.raises(fakes.CustomError, match="no such weights"):
        RayParallelExecutor(fakes.broken, devices=2)
    with pytest.raises(TypeError, match="returned 'int', which is not callable"):
        RayParallelExecutor(fakes.not_a_pipeline, **ONE)
    with pytest.raises(WorkerDied, match="while it loaded the pipeline"):
        RayParallelExecutor(fakes.kills_itself, **ONE)


# Patches


def test_workers_have_the_patches_that_are_enabled_here(executor):
    wan_patches.enable(patches=["frames", "rope"])
    assert executor.submit("patches").result() == ["frames", "rope"]
    wan_patches.disable()
    assert executor.submit("patches").result() == []


# Groups


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_give_what_one_process_gives_and_leave_nothing():
    from wan_patches.testing.families import FAMILIES

    inputs = FAMILIES["wan_t2v"].inputs(seed=1)
    inputs.pop("generator", None)
    expected = fakes.family("wan_t2v")(**inputs, generator=torch.Generator().manual_seed(4)).frames
    with RayParallelExecutor(
        functools.partial(fakes.family, "wan_t2v"), layout="context", devices=2, threads=1
    ) as executor:
        seen = []
        request = executor.submit(
            **inputs, generator=torch.Generator().manual_seed(4), on_progress=lambda _, at: seen.append(at.step)
        )
        assert np.abs(request.result().frames - expected).max() < 1e-4
        assert seen == [*range(1, len(seen) + 1)]
        running = executor.submit(**inputs | {"num_inference_steps": 500})
        _until_running(running)
        assert running.cancel()
        running = executor.submit(**inputs | {"num_inference_steps": 500})
        _until_running(running)
        os.kill(executor.health().workers[1].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"worker 1 \(pid .*\) ended"):
            running.result(60)
        request = executor.submit(**inputs, generator=torch.Generator().manual_seed(4))
        assert np.abs(request.result().frames - expected).max() < 1e-4
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}


# Options and ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "inline"}, "needs no Ray; use ParallelExecutor"),
        ({"layout": "rows"}, "unknown layout 'rows'"),
        ({"layout": "context", "devices": 1}, "needs groups of 2 devices, and there are 1"),
        ({"devices": ["cuda:0"]}, "Ray chooses the devices; give a number"),
        ({"devices": 0}, "nothing to run on"),
        ({"resources": {"GPU": 1}}, "each worker needs 1 GPU, and the cluster has 0 GPU"),
        ({"resources": {}}, "name what each worker needs"),
        ({"parallel": "ring"}, 'is for layout="context"'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RayParallelExecutor(fakes.fake, **options)


def test_patience_is_the_old_name_of_the_cancel_grace():
    with pytest.warns(DeprecationWarning, match="cancel_grace"), pytest.raises(ValueError, match="patience=0: give"):
        RayParallelExecutor(fakes.fake, patience=0)


def test_a_factory_that_does_not_pickle_is_explained():
    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be sent to workers"):
        RayParallelExecutor(lambda: lock)


def test_factories_need_no_module_and_inputs_can_be_written_to():
    value = torch.zeros(fakes.BIG)
    with RayParallelExecutor(lambda: lambda value: value.add_(1), **ONE) as executor:
        assert executor.submit(value).result().min() == 1
    assert not value.any()


def test_shutdown_leaves_no_worker():
    executor = RayParallelExecutor(fakes.fake, **ONE)
    worker = psutil.Process(executor.submit("pid").result())
    waiting = executor.submit(value=1, steps=1, seconds=0.3)
    executor.shutdown()
    assert waiting.result(0) == 1
    assert ray.is_initialized()
    assert not psutil.wait_procs([worker], timeout=5)[1]
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit()


def test_workers_end_when_nobody_has_the_executor_any_more():
    executor = RayParallelExecutor(fakes.fake, **ONE)
    worker = psutil.Process(executor.submit("pid").result())
    del executor
    gc.collect()
    assert not psutil.wait_procs([worker], timeout=20)[1]


def test_python_ends_after_what_was_submitted(tmp_path):
    done = _script(
        tmp_path,
        """
        from wan_patches.executor.ray import RayParallelExecutor

        def factory():  # of the script, and no guard
            import fakes
            return fakes.Fake()

        executor = RayParallelExecutor(factory, devices=1, address="local")
        executor.submit(value="done", steps=1, seconds=0.5).add_done_callback(lambda f: print(f.result()))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"


def test_a_missing_ray_is_explained():
    code = (
        "import sys; sys.modules['ray'] = None\nfrom wan_patches.executor.ray import RayParallelExecutor as E; E(int)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'ImportError: RayParallelExecutor needs Ray: pip install "wan-patches[ray]"' in done.stderr


def _script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """A program with a Ray of its own."""
    path = tmp_path / "script.py"
    head = f"import sys; sys.path.insert(0, {str(Path(fakes.__file__).parent)!r})\n"
    path.write_text(head + textwrap.dedent(text))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
