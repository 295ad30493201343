"""What users of the executor rely on: that it is an executor, and that it is not one pipeline less than theirs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
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

import wan_patches
from wan_patches import ParallelExecutor
from wan_patches.executor import RemoteError, WorkerDied
from wan_patches.executor.progress import Bars

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("nothing_left")]

INLINE = {"devices": "cpu"}
WORKER = {"devices": ["cpu"], "layout": "replicas", "spares": 0}
WORKERS = {"devices": ["cpu", "cpu"], "spares": 0}


@pytest.fixture(scope="module", params=[INLINE, WORKER], ids=["inline", "worker"])
def shared_executor(request, nothing_left_by_shared):
    """One for all tests that leave it as it was: a worker takes seconds to start."""
    with ParallelExecutor(fakes.fake, **request.param) as executor:
        yield executor


@pytest.fixture
def executor(shared_executor):
    return shared_executor


@pytest.fixture(params=[INLINE, WORKER], ids=["inline", "worker"])
def new_executor(request):
    with ParallelExecutor(fakes.fake, **request.param) as executor:
        yield executor


# An executor


def test_is_an_executor(executor):
    assert isinstance(executor, concurrent.futures.Executor)
    future = executor.submit(value=3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 3
    assert future.done()
    assert not future.cancelled()
    assert future.exception() is None


def test_positional_arguments_are_the_pipelines(executor):
    assert executor.submit("echo", 5).result() == 5


def test_map_gives_results_in_order(executor):
    assert list(executor.map([{"value": n, "steps": 1, "seconds": 0.05 * (n == 0)} for n in range(5)])) == [*range(5)]


def test_map_takes_mappings_only(executor):
    with pytest.raises(TypeError, match="mappings of the pipeline's keyword arguments"):
        executor.map([1])


def test_map_times_out(executor):
    results = executor.map([{"steps": 20, "seconds": 10}], timeout=0.2)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)


def test_map_with_a_buffer_submits_only_so_many_ahead(executor):
    taken = []

    def requests():
        for n in range(6):
            taken.append(n)
            yield {"value": n}

    results = executor.map(requests(), buffersize=2)
    assert taken == [0, 1]
    assert next(results) == 0
    assert len(taken) <= 3
    assert list(results) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="buffersize is 0"):
        executor.map([], buffersize=0)


def test_as_completed_and_wait_work():
    with ParallelExecutor(fakes.fake, **WORKERS) as executor:
        slow = executor.submit(value="slow", steps=1, seconds=1.0)
        fast = executor.submit(value="fast")
        assert [f.result() for f in concurrent.futures.as_completed([slow, fast])] == ["fast", "slow"]
        assert concurrent.futures.wait([slow, fast]).not_done == set()


@pytest.mark.parametrize("options", [INLINE, WORKER], ids=["inline", "worker"])
def test_an_event_loop_goes_on(options):
    async def main():
        with ParallelExecutor(fakes.fake, **options) as executor:
            start = time.monotonic()
            future = asyncio.wrap_future(executor.submit(value=1, steps=2, seconds=0.6))
            assert time.monotonic() - start < 0.3
            ticks = 0
            while not future.done():
                await asyncio.sleep(0.02)
                ticks += 1
            assert ticks > 10
            cancelled = asyncio.wrap_future(running := executor.submit(steps=200, seconds=20))
            while running.progress is None:
                await asyncio.sleep(0.02)
            cancelled.cancel()
            await asyncio.sleep(0.05)
            assert running.cancelled()
            return await future

    assert asyncio.run(main()) == 1


def test_shutdown_waits_for_what_was_submitted(new_executor):
    executor = new_executor
    futures = [executor.submit(value=n, steps=1, seconds=0.05) for n in range(4)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit()
    executor.shutdown()


def test_shutdown_cancels_what_has_not_started(new_executor):
    executor = new_executor
    first = executor.submit(value=1, steps=1, seconds=0.5)
    while not first.running():
        time.sleep(0.01)
    others = [executor.submit(value=n) for n in range(3)]
    executor.shutdown(cancel_futures=True)
    assert first.result(0) == 1
    assert all(future.cancelled() for future in others)


def test_an_exception_in_the_block_cancels_all():
    def fail_with(executor):
        futures.extend([executor.submit(steps=1000, seconds=100), executor.submit()])
        while not futures[0].running():
            time.sleep(0.01)
        raise KeyError

    futures = []
    with pytest.raises(KeyError), ParallelExecutor(fakes.fake, **WORKER) as executor:
        fail_with(executor)
    running, waiting = futures
    assert running.cancelled()
    assert waiting.cancelled()


def test_workers_end_when_nobody_has_the_executor_any_more():
    executor = ParallelExecutor(fakes.fake, **WORKER)
    worker = psutil.Process(executor.submit("pid").result())
    del executor
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()


# Layouts and options


def test_one_device_is_inline_and_several_are_replicas():
    with ParallelExecutor(fakes.fake, devices="cpu") as executor:
        assert executor.submit("pid").result() == os.getpid()
    with ParallelExecutor(fakes.fake, **WORKERS) as executor:
        slow = [{"do": "pid", "steps": 1, "seconds": 0.3}] * 4
        pids = set(executor.map(slow))
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.mark.quick
def test_inline_copies_nothing():
    value = torch.arange(5)
    with ParallelExecutor(fakes.fake, **INLINE) as executor:
        assert executor.submit(value=value).result() is value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "rows"}, "unknown layout 'rows'; known: auto, inline"),
        ({"layout": "inline", "devices": ["cpu", "cpu"]}, "uses one device, and there are 2"),
        ({"layout": "context", "devices": ["cpu"]}, "needs groups of 2 devices, and there are 1"),
        ({"layout": "cfg", "devices": ["cpu"] * 3}, "needs groups of 2 devices, and there are 3"),
        ({"layout": "cfg", "devices": ["cpu"] * 3, "group_size": 3}, "guidance has two branches"),
        ({"layout": "replicas", "devices": ["cpu"] * 2, "group_size": 2}, "one device works on a request"),
        ({"devices": []}, "name at least one"),
        ({"devices": 99}, "99 devices requested, but found"),
        ({"devices": ["cpu", "cpu"], "parallel": "ring"}, 'is for layout="context"'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelExecutor(fakes.fake, **options)


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    with ParallelExecutor(fakes.fake, **WORKERS) as executor:
        assert executor.submit("environment", "HOME").result()[1] == max(1, cores // 2)
    with ParallelExecutor(fakes.fake, **WORKER, threads=1) as executor:
        assert executor.submit("environment", "HOME").result() == (os.environ.get("HOME"), 1)


# Values


def test_values_arrive_as_they_were(executor):
    value = {"a": torch.randn(3, 300, 300).to(torch.bfloat16), "b": [np.arange(99999), "text", None, {1, 2}]}
    got = executor.submit(value=value).result()
    assert torch.equal(got["a"], value["a"])
    assert np.array_equal(got["b"][0], value["b"][0])
    assert got["b"][1:] == value["b"][1:]


@pytest.mark.quick
def test_a_result_outlives_its_executor():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        output = executor.submit("big", 7).result()
    assert torch.equal(output.frames, torch.full((fakes.BIG,), 7, dtype=torch.int32))
    output.frames += 1
    assert output.frames[0] == 8


def test_generators_are_arguments_like_others(executor):
    expected = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(executor.submit("noise", torch.Generator().manual_seed(5)).result(), expected)


def test_without_a_generator_the_seed_comes_from_the_parents_default_one():
    def draw():
        with ParallelExecutor(fakes.fake, **WORKERS) as executor:
            torch.manual_seed(3)
            return torch.stack(list(executor.map([{"do": "noise"}] * 4)))

    first, second = draw(), draw()
    assert torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 4


def test_generators_and_lists_are_taken_as_they_are_at_submit():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        value, generator = [1], torch.Generator().manual_seed(5)
        executor.submit(steps=1, seconds=0.3)
        future, noise = executor.submit(value=value), executor.submit("noise", generator)
        value[0] = 2
        generator.manual_seed(6)
        assert future.result() == [1]
        assert torch.equal(noise.result(), torch.randn(4, generator=generator.manual_seed(5)))


# Progress, timings, logs


def test_progress_of_every_step(executor):
    seen = []
    future = executor.submit(
        value=1, steps=4, on_progress=lambda request, at: seen.append((request, at.step, at.total))
    )
    future.result()
    assert seen == [(future, n, 4) for n in (1, 2, 3, 4)]
    assert (future.progress.step, future.progress.total, future.progress.bar) == (4, 4, 1)


def test_a_progress_callback_that_raises_hurts_nobody(executor, caplog):
    def callback(request, progress):
        raise ZeroDivisionError

    assert executor.submit(value=1, steps=2, on_progress=callback).result() == 1
    assert "progress callback" in caplog.text


def test_bars_show_what_runs(capsys):
    bars = Bars()
    with ParallelExecutor(fakes.fake, **WORKERS, progress=bars) as executor:
        list(executor.map([{"steps": 3, "seconds": 0.2}] * 4))
    assert bars._display is None
    assert not bars._tasks


def test_timings_come_with_the_result(executor):
    future = executor.submit(steps=2, seconds=0.2)
    future.result()
    assert set(future.timings) == {"call"}
    assert 0.2 <= future.timings["call"] < 5


def test_logs_are_prefixed_with_the_rank(capfd):
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        executor.submit("say", "hello\nagain").result()
    assert "[0] hello\n[0] again\n" in capfd.readouterr().err


def test_logs_can_go_elsewhere():
    lines = []
    with ParallelExecutor(fakes.fake, **WORKER, log=lambda rank, line: lines.append((rank, line))) as executor:
        executor.submit("say", "10%\r20%\rdone").result()
    assert (0, "done") in lines


# Cancel and time out


def test_what_waits_can_be_cancelled(executor):
    executor.submit(steps=1, seconds=0.3)
    waiting = executor.submit(value=1)
    assert waiting.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result()


def test_what_runs_can_be_cancelled_and_the_worker_lives_on(executor):
    pid = executor.submit("pid").result()
    called = threading.Event()
    running = executor.submit(steps=1000, seconds=100)
    running.add_done_callback(lambda _: called.set())
    while running.progress is None:
        time.sleep(0.01)
    start = time.monotonic()
    assert running.cancel()
    assert running.cancelled()
    assert running.done()
    assert called.is_set()
    assert running.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        running.result()
    assert concurrent.futures.wait([running], timeout=1).not_done == set()
    assert executor.submit("pid").result() == pid
    assert time.monotonic() - start < 10
    done = executor.submit()
    done.result()
    assert not done.cancel()


def test_a_request_times_out_and_the_worker_lives_on(new_executor):
    executor = new_executor
    pid = executor.submit("pid").result()
    with pytest.raises(TimeoutError, match=r"request 2 took longer than its timeout of 0.3 s"):
        executor.submit(steps=1000, seconds=100, timeout=0.3).result(30)
    assert executor.submit("pid").result() == pid
    assert executor.submit(value=1, timeout=30).result() == 1


def test_the_executor_can_set_a_timeout_for_all():
    with ParallelExecutor(fakes.fake, **WORKER, timeout=0.3) as executor:
        with pytest.raises(TimeoutError):
            executor.submit(steps=1000, seconds=100).result(30)
        assert executor.submit(value=1).result() == 1


def test_a_worker_that_does_not_reach_its_next_step_is_replaced():
    with ParallelExecutor(fakes.fake, **WORKER, cancel_grace=0.5) as executor:
        pid = executor.submit("pid").result()
        with pytest.raises(TimeoutError):
            executor.submit("hang", 100, timeout=0.3).result(30)
        assert executor.submit("pid").result(60) != pid


# Errors


def test_an_exception_arrives_with_type_message_and_traceback(executor):
    error = executor.submit("fail", "bad prompt").exception()
    assert type(error) is fakes.CustomError
    assert str(error) == "bad prompt (7)"
    assert error.code == 7
    if executor._remote:
        assert "in fail\n    raise CustomError(7, value)" in str(error.__cause__)
    assert executor.submit(value=1).result() == 1


def test_an_exception_that_does_not_pickle_is_named():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        error = executor.submit("fail_oddly").exception()
        assert isinstance(error, RemoteError)
        assert str(error) == "fakes.Unportable: 1 and 2"
        assert "raise Unportable(1, 2)" in str(error.__cause__)


@pytest.mark.parametrize("do", ["unpicklable", "unloadable"])
def test_a_result_that_cannot_travel_is_an_error_of_that_future_only(do):
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        pid = executor.submit("pid").result()
        with pytest.raises((TypeError, ImportError), match=r"pickle|load in another"):
            executor.submit(do).result()
        assert executor.submit("pid").result() == pid


def test_a_request_that_cannot_travel_is_an_error_of_that_future_only():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        pid = executor.submit("pid").result()
        with pytest.raises(TypeError, match="pickle"):
            executor.submit(value=threading.Lock()).result()
        with pytest.raises(ImportError, match="another process"):
            executor.submit(value=fakes.Unloadable()).result()
        assert executor.submit("pid").result() == pid


def test_a_request_with_something_of_the_script_is_explained(monkeypatch):
    kind = type("Kind", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Kind", kind, raising=False)
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        with pytest.raises(ValueError, match=r"defined in the script .* move it to a module"):
            executor.submit(value=kind()).result()
        assert executor.submit(value="__main__ is but a word").result() == "__main__ is but a word"


@pytest.mark.parametrize(
    "options", [INLINE, WORKER, pytest.param(WORKERS, marks=pytest.mark.slow)], ids=["inline", "worker", "workers"]
)
def test_a_pipeline_that_cannot_be_loaded_fails_the_constructor(options):
    with pytest.raises(fakes.CustomError, match="no such weights"):
        ParallelExecutor(fakes.broken, **options)
    with pytest.raises(TypeError, match="returned 'int', which is not callable"):
        ParallelExecutor(fakes.not_a_pipeline, **options)


def test_a_worker_that_dies_while_it_loads_fails_the_constructor():
    with pytest.raises(WorkerDied, match=r"ended by SIGKILL .* while it loaded the pipeline") as caught:
        ParallelExecutor(fakes.kills_itself, **WORKERS)
    assert caught.value.exit_code == -9
    assert "loading" in caught.value.log


# Patches


def test_workers_have_the_patches_that_are_enabled_here():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        assert executor.submit("patches").result() == []
        wan_patches.enable(patches=["frames", "rope"])
        assert executor.submit("patches").result() == ["frames", "rope"]
        with wan_patches.enabled():
            everything = executor.submit("patches").result()
        assert {"conditioning", "preprocess"} < set(everything)
        wan_patches.disable()
        assert executor.submit("patches").result() == []


# Where the factory may be


def _script(tmp_path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def test_a_factory_in_the_script_is_found(tmp_path):
    done = _script(
        tmp_path,
        """
        from wan_patches import ParallelExecutor

        def factory():
            return lambda prompt: prompt.upper()

        if __name__ == "__main__":
            with ParallelExecutor(factory, devices=["cpu", "cpu"]) as executor:
                print(executor.submit(prompt="a cat").result())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "A CAT\n"


def test_a_factory_in_a_script_without_guard_is_explained(tmp_path):
    done = _script(
        tmp_path,
        """
        from wan_patches import ParallelExecutor

        def factory():
            return lambda prompt: prompt.upper()

        ParallelExecutor(factory, devices=["cpu", "cpu"])
        """,
    )
    assert done.returncode == 1
    assert 'Put what starts the executor under `if __name__ == "__main__":`' in done.stderr


def test_a_factory_in_an_interactive_session_is_explained():
    code = (
        "def factory(): pass\nfrom wan_patches import ParallelExecutor\nParallelExecutor(factory, devices=['cpu'] * 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "defined in an interactive session" in done.stderr
    assert "from_pretrained" in done.stderr


def test_a_factory_that_does_not_pickle_is_explained():
    with pytest.raises(ValueError, match="must be a function at the top of a module"):
        ParallelExecutor(lambda: None, **WORKER)


def test_from_pretrained_needs_no_guard(tmp_path, one_thread):
    fakes.family("wan_t2v").save_pretrained(tmp_path / "model")
    done = _script(
        tmp_path,
        f"""
        import torch
        from wan_patches import ParallelExecutor
        from wan_patches.testing.families import FAMILIES

        model = {str(tmp_path / "model")!r}
        executor = ParallelExecutor.from_pretrained(model, devices=["cpu", "cpu"], torch_dtype=torch.float32, threads=1)
        inputs = FAMILIES["wan_t2v"].inputs()
        future = executor.submit(**inputs)
        print(type(future.result()).__name__, sorted(future.result().timings) == sorted(future.timings))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "WanPipelineOutput True\n"


def test_a_pipeline_that_is_not_there_fails_from_pretrained(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        ParallelExecutor.from_pretrained(str(tmp_path / "nowhere"), **WORKER)


def test_python_ends_after_what_was_submitted(tmp_path):
    done = _script(
        tmp_path,
        """
        import sys
        sys.path.insert(0, FOLDER)
        import fakes
        from wan_patches import ParallelExecutor

        executor = ParallelExecutor(fakes.fake, devices=["cpu", "cpu"])
        executor.submit(value="done", steps=1, seconds=0.5).add_done_callback(lambda f: print(f.result()))
        """.replace("FOLDER", repr(str(Path(fakes.__file__).parent))),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_importing_the_package_does_not_import_torch():
    code = "import wan_patches, sys; assert 'torch' not in sys.modules; wan_patches.ParallelExecutor; import torch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
