"""What stands still is noticed, named, ended and started again."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fakes
import pytest
from processes import wait_until, workers

from wan_patches import ParallelExecutor
from wan_patches.executor import Bounds, WorkerHung, bounds

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("nothing_left")]

WORKER = {"devices": ["cpu"], "layout": "replicas", "spares": 0}
FOLDER = str(Path(fakes.__file__).parent)


@pytest.mark.parametrize("do", ["stop", "hold_the_lock"])
def test_a_worker_that_gives_no_sign_of_life_is_started_again(do, caplog):
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(answer=3.0)) as executor:
        pid = executor.submit("pid").result()
        error = executor.submit(do, 60).exception(30)
        assert isinstance(error, WorkerHung)
        assert (error.bound, error.seconds, error.rank, error.request, error.pid) == ("answer", 3.0, 0, 2, pid)
        assert f"worker 0 (pid {pid}) gave no sign of life for 3 s during request 2, and was ended" in caplog.text
        assert executor.submit("pid").result(60) != pid


def test_a_worker_that_is_stopped_while_idle_is_started_again(caplog):
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(answer=2.0)) as executor:
        os.kill(pid := executor.submit("pid").result(), signal.SIGSTOP)
        wait_until(lambda: executor.health().workers[0].restarts == 1, 30)
        assert f"worker 0 (pid {pid}) gave no sign of life for 2 s while it was idle" in caplog.text
        assert executor.submit("pid").result(60) != pid


def test_a_stopped_worker_is_left_alone_where_that_is_wanted():
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(answer=None)) as executor:
        pid, stopped = executor.submit("pid").result(), executor.submit("stop")
        time.sleep(4)
        assert stopped.running()
        os.kill(pid, signal.SIGCONT)
        assert stopped.result(30) == "went on"


def test_a_worker_that_works_longer_than_the_bound_is_left_alone():
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(answer=1.0)) as executor:
        assert executor.submit("hang", 4.0).result(30) == "woke up"


def test_too_long_between_two_steps_is_too_long():
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(first_step=30.0, step=2.0)) as executor:
        assert executor.submit(value=1, steps=6, seconds=6.0).result(60) == 1
        error = executor.submit("hang", 60, steps=2, seconds=0.1).exception(30)
        assert isinstance(error, WorkerHung)
        assert error.bound == "step"
        assert "made no step for 2 s during request 2" in str(error)
        assert executor.submit(value=1).result(60) == 1


def test_the_first_step_has_a_bound_of_its_own():
    with ParallelExecutor(fakes.fake, **WORKER, bounds=Bounds(first_step=2.0)) as executor:
        error = executor.submit(steps=1, seconds=60).exception(30)
        assert isinstance(error, WorkerHung)
        assert "did not reach the first step for 2 s" in str(error)


def test_a_request_that_met_a_hung_worker_is_tried_again():
    with ParallelExecutor(fakes.fake, **WORKER, retries=1, bounds=Bounds(answer=2.0)) as executor:
        path = f"{FOLDER}/{os.getpid()}-stopped"
        try:
            assert executor.submit("stop_once", path).result(60) == "second time"
        finally:
            os.unlink(path)


def test_a_load_that_hangs_fails_the_constructor():
    with pytest.raises(WorkerHung, match=r"worker 0 \(pid \d+\) was not ready for 2 s while it loaded the pipeline"):
        ParallelExecutor(functools.partial(fakes.slow_to_load, 60), **WORKER, bounds=Bounds(load=2.0))


def test_a_load_that_hangs_later_is_tried_again(tmp_path):
    build = functools.partial(fakes.stops_later, str(tmp_path / "a"), str(tmp_path / "b"))
    with ParallelExecutor(build, **WORKER, bounds=Bounds(answer=2.0)) as executor:
        executor.submit("kill", signal.SIGKILL).exception(60)
        assert executor.submit(value=1).result(60) == 1
        assert executor.health().workers[0].restarts == 2


def test_shutdown_does_not_wait_for_a_load_that_nobody_needs(tmp_path):
    slow = functools.partial(fakes.slow_to_load_again, str(tmp_path / "there"), 100)
    with ParallelExecutor(slow, **WORKER) as executor:
        executor.submit("kill", signal.SIGKILL).exception(60)
        wait_until(lambda: executor.health().workers[0].state == "loading")
        start = time.monotonic()
    assert time.monotonic() - start < 20


def test_shutdown_ends_within_its_bound_whatever_runs():
    executor = ParallelExecutor(fakes.fake, **WORKER)
    running, waiting = executor.submit("stop"), executor.submit()
    wait_until(running.running)
    start = time.monotonic()
    executor.shutdown(timeout=1.0)
    assert time.monotonic() - start < 20
    assert running.cancelled()
    assert waiting.cancelled()
    assert not workers()


def test_python_ends_though_a_worker_stands_still(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {FOLDER!r})\n"
        + textwrap.dedent("""
            import fakes
            from wan_patches import ParallelExecutor
            from wan_patches.executor import Bounds

            executor = ParallelExecutor(
                fakes.fake, devices=["cpu"], layout="replicas", bounds=Bounds(answer=2.0), log=lambda *_: None
            )
            executor.submit("stop")
            """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "gave no sign of life for 2 s during request 1" in done.stderr


def test_the_cancel_grace_is_told_in_the_log(caplog):
    with ParallelExecutor(fakes.fake, **WORKER, cancel_grace=0.5) as executor:
        with pytest.raises(TimeoutError):
            executor.submit("hang", 60, timeout=0.3).result(30)
        wait_until(lambda: "timed out, but worker 0 did not stop it within 0.5 s" in caplog.text)
        assert executor.submit(value=1).result(60) == 1


# Requests that wait


def test_waiting_has_a_bound_of_its_own():
    with ParallelExecutor(fakes.fake, **WORKER, queue_timeout=1.0) as executor:
        running = executor.submit(value="done", steps=30, seconds=3.0)
        waiting, patient = executor.submit(), executor.submit(value=1, queue_timeout=None)
        with pytest.raises(TimeoutError, match=r"request 2 waited longer for a worker than its queue_timeout of 1.0 s"):
            waiting.result(30)
        assert executor.health().waiting == 1
        assert running.result(30) == "done"
        assert patient.result(30) == 1


def test_a_request_can_switch_off_the_executors_timeout():
    with ParallelExecutor(fakes.fake, devices="cpu", timeout=0.3) as executor:
        assert executor.submit(value=1, steps=10, seconds=1.0, timeout=None).result(30) == 1
        with pytest.raises(TimeoutError):
            executor.submit(steps=100, seconds=10.0).result(30)


# Time that this process did not have


def test_the_time_in_which_this_process_was_stopped_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bounds.time, "monotonic", lambda: now[0])
    still = bounds.Stillness()
    now[0] = 1.0
    assert still.seconds() == 1.0
    now[0] = 3600.0
    assert still.seconds() == 3.0
    still.sign()
    assert still.seconds() == 0.0
    now[0] = 3600.5
    assert still.seconds() == 0.5


# What may be given


@pytest.mark.parametrize("value", ["5", float("inf"), float("nan"), -1, 0, True])
@pytest.mark.parametrize("name", ["timeout", "queue_timeout", "cancel_grace"])
def test_a_bound_is_a_number_of_seconds(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}: give a number of seconds above 0"):
        ParallelExecutor(fakes.fake, **WORKER, **{name: value})


def test_patience_is_the_old_name_of_the_cancel_grace():
    with pytest.warns(DeprecationWarning, match="`patience` is now called `cancel_grace`") as caught:
        executor = ParallelExecutor(fakes.fake, devices="cpu", patience=0.5)
    with executor:
        assert executor._scheduler._cancel_grace == 0.5
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="cancel_grace"), pytest.raises(ValueError, match="patience=0: give"):
        ParallelExecutor(fakes.fake, devices="cpu", patience=0)


@pytest.mark.parametrize("options", [{"retries": -1}, {"retries": 1.5}, {"threads": 0}, {"spares": -1}, {"devices": 0}])
def test_a_count_is_a_whole_number(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}=.* give a whole number"):
        ParallelExecutor(fakes.fake, **WORKER | options)


def test_bounds_are_checked_too():
    with pytest.raises(ValueError, match="step=-1: give a number of seconds above 0, or None"):
        Bounds(step=-1)


def test_a_request_has_bounds_that_are_checked_at_once():
    with ParallelExecutor(fakes.fake, devices="cpu") as executor:
        for name in ("timeout", "queue_timeout"):
            with pytest.raises(ValueError, match=f"{name}='5'"):
                executor.submit(**{name: "5"})
