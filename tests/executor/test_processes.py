"""What workers take over from the process that starts them, and what requests leave behind in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fakes
import psutil
import pytest
import torch
from processes import wait_until, workers

from wan_patches import ParallelExecutor
from wan_patches.executor import RemoteError, processes

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("nothing_left")]

WORKER = {"devices": ["cpu"], "layout": "replicas", "spares": 0}
FOLDER = str(Path(fakes.__file__).parent)


def _script(tmp_path: Path, text: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {FOLDER!r})\n" + textwrap.dedent(text))
    command = [sys.executable, *flags, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def test_nothing_is_imported_from_the_current_directory(tmp_path):
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("typing_extensions", "wan_patches", "torch", "json"):
        (trap / f"{name}.py").write_text("import os; os._exit(77)")
    done = _script(
        tmp_path,
        """
        import fakes
        from wan_patches import ParallelExecutor

        with ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas") as executor:
            print(executor.submit(value="fine").result())
        """,
        cwd=trap,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_the_interpreters_flags_and_paths_are_passed_on(tmp_path):
    done = _script(
        tmp_path,
        """
        import multiprocessing, os, sys
        import fakes
        from wan_patches import ParallelExecutor

        other = os.path.join(os.path.dirname(__file__), "python-of-workers")
        os.symlink(sys.executable, other)
        multiprocessing.set_executable(other)
        with ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas", spares=0) as executor:
            path, optimize, warnings, _ = executor.submit("flags").result()
            command = executor.submit("command").result()
        print(path == sys.path, optimize, "ignore::UserWarning" in warnings, command[0] == other)
        """,
        "-OO",
        "-W",
        "ignore::UserWarning",
    )
    assert (done.returncode, done.stdout) == (0, "True 2 True True\n"), done.stderr


def test_workers_end_with_their_parent_though_its_child_holds_the_socket(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {FOLDER!r})\n"
        + textwrap.dedent("""
            import ctypes, os, time
            import fakes
            from wan_patches import ParallelExecutor

            executor = ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas", spares=0)
            pid = executor.submit("pid").result()
            if (child := ctypes.CDLL(None).fork()) == 0:  # Python's hooks do not see it, so it keeps the socket
                time.sleep(60)
                os._exit(0)
            print(pid, child, flush=True)
            time.sleep(60)
            """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker, child = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    try:
        parent.kill()
        assert not psutil.wait_procs([worker], timeout=10)[1]
        assert child.is_running()
    finally:
        child.kill()
        parent.communicate()


def test_workers_live_on_when_the_thread_that_started_the_executor_ends():
    made = []
    thread = threading.Thread(target=lambda: made.append(ParallelExecutor(fakes.fake, **WORKER)))
    thread.start()
    thread.join()
    with made.pop() as executor:
        pid = executor.submit("pid").result()
        time.sleep(1.5)
        assert executor.submit("pid").result() == pid


def test_a_request_leaves_the_process_as_it_was(tmp_path):
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        before = executor.submit("process").result()
        executor.submit("change_the_process", str(tmp_path)).result()
        assert executor.submit("process").result() == before


def test_what_an_exception_cannot_say_is_said_for_it():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        pid = executor.submit("pid").result()
        error = executor.submit("fail_unspeakably").exception()
        assert isinstance(error, RemoteError)
        assert str(error) == "fakes.Unspeakable: (its message cannot be printed: RuntimeError)"
        assert "in fail_unspeakably" in str(error.__cause__)
        assert executor.submit("pid").result() == pid


def test_output_without_an_end_of_line_is_read_in_pieces():
    lengths = []
    with ParallelExecutor(fakes.fake, **WORKER, log=lambda _, line: lengths.append(len(line))) as executor:
        assert executor.submit("chatter", 64 << 20).result(60) == 64 << 20
        wait_until(lambda: sum(lengths) == 64 << 20)
    assert max(lengths) <= 8 << 10


def test_an_argument_that_cannot_be_sent_is_named():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        error = executor.submit(value=1, callback_on_step_end=lambda *_: {}).exception()
        assert str(error).startswith("argument 'callback_on_step_end' of the request cannot be sent to a worker: ")
        assert "lambda" in str(error)
        error = executor.submit("echo", open(os.devnull)).exception()  # noqa: SIM115
        assert str(error).startswith("argument 2 of the request cannot be sent to a worker: ")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_travel():
    parts = [torch.ones(2, 3), torch.zeros(4, 3)]
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        found = executor.submit(value=torch.nested.nested_tensor(parts)).result()
        assert all(torch.equal(part, there) for part, there in zip(parts, found.unbind(), strict=True))


def test_devices_that_are_not_there_are_refused_at_once():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ValueError, match=r"devices names 'cuda:0'; torch .* finds 0 such devices here"):
        ParallelExecutor(fakes.fake, devices=["cuda:0", "cpu"])
    assert not workers()


# Spares


def test_a_spare_takes_the_place_of_a_worker_that_ends():
    with ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas") as executor:
        pid = executor.submit("pid").result()
        wait_until(lambda: len(workers()) == 2)
        (spare,) = (worker.pid for worker in workers() if worker.pid != pid)
        launcher = executor._scheduler.groups[0]._launcher
        wait_until(lambda: launcher._spares[0].wait_for_message(0))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: executor.health().workers[0].restarts == 1)
        assert executor.submit("pid").result(60) == spare
        wait_until(lambda: len(workers()) == 2)  # and there is another one


def test_a_spare_that_has_ended_or_is_not_ready_is_not_waited_for():
    launcher = processes.Launcher(sys.path, {}, spares=1, send_timeout=None)
    launcher.prepare([])
    (spare,) = launcher._spares
    os.kill(spare.pid, signal.SIGSTOP)
    new = launcher.take()
    assert new.pid != spare.pid
    os.kill(spare.pid, signal.SIGKILL)
    spare.popen.wait()
    another = launcher.take()
    assert another.pid != spare.pid
    launcher.prepare([])  # in place of the one that has ended
    assert launcher._spares[0].popen.poll() is None
    launcher.close()
    for process in (new, another):
        processes._discard(process)


def test_a_spare_that_cannot_be_started_costs_nothing_else(monkeypatch, caplog):
    start, started = subprocess.Popen, []

    def only_one(command, *arguments, **keywords):
        if started:
            raise BlockingIOError("no more processes")
        started.append(start(command, *arguments, **keywords))
        return started[0]

    monkeypatch.setattr(processes.subprocess, "Popen", only_one)
    with ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas", spares=1) as executor:
        assert executor.submit(value=1).result(60) == 1
    assert "no spare process could be started: no more processes" in caplog.text


# Health


def test_health_tells_what_each_worker_does():
    with ParallelExecutor(fakes.fake, devices=["cpu", "cpu"], spares=0) as executor:
        running = executor.submit("hang", 3)
        more = [executor.submit("hang", 1), executor.submit(), executor.submit()]
        wait_until(lambda: executor.health().running == 2)
        health = executor.health()
        assert [(worker.rank, worker.device, worker.state) for worker in health.workers] == [
            (0, "cpu", "running"),
            (1, "cpu", "running"),
        ]
        assert {worker.request for worker in health.workers} == {1, 2}
        assert {worker.pid for worker in health.workers} == {worker.pid for worker in workers()}
        assert (health.serving, health.waiting) == (2, 2)
        assert all(0 <= worker.since < 60 for worker in health.workers)
        [future.result(60) for future in [running, *more]]
        health = executor.health()
        assert (health.running, health.waiting) == (0, 0)
        assert {worker.state for worker in health.workers} == {"idle"}


def test_the_health_of_a_pipeline_in_this_process():
    with ParallelExecutor(fakes.fake, devices="cpu") as executor:
        (worker,) = executor.health().workers
        assert (worker.rank, worker.device, worker.state, worker.pid) == (0, "cpu", "idle", os.getpid())
