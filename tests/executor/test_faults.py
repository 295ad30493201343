"""What is lost when something dies: the request that it worked on, and nothing else."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fakes
import psutil
import pytest
import torch
from processes import HEEDS_CONTROL_C, wait_until, workers

from wan_patches import ParallelExecutor
from wan_patches.executor import Bounds, ExecutorBroken, WorkerDied

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("nothing_left")]

WORKER = {"devices": ["cpu"], "layout": "replicas", "spares": 0}
WORKERS = {"devices": ["cpu", "cpu"], "spares": 0}
FOLDER = str(Path(fakes.__file__).parent)


# A worker dies


def test_a_death_is_told_with_all_that_is_known():
    with ParallelExecutor(fakes.fake, **WORKERS) as executor:
        error = executor.submit("kill", signal.SIGKILL).exception(60)
        assert isinstance(error, WorkerDied)
        assert (error.exit_code, error.request) == (-9, 1)
        assert error.rank in (0, 1)
        assert "about to go" in error.log
        assert str(error).startswith(f"{error.worker} was ended by SIGKILL (sent by the system when memory")
        assert str(error).endswith("\n    about to go")
        error = executor.submit("leave", 3).exception(60)
        assert error.exit_code == 3
        assert "ended with exit code 3 during request 2; it had written nothing" in str(error)
        error = executor.submit("kill", signal.SIGSEGV).exception(60)
        assert error.exit_code == -signal.SIGSEGV
        assert any("Segmentation fault" in line for line in error.log)
        assert executor.submit(value=1).result(60) == 1


def test_only_the_request_of_the_dead_worker_is_lost():
    with ParallelExecutor(fakes.fake, **WORKERS) as executor:
        kept, pids = executor.submit("big", 5).result(), {worker.pid for worker in workers()}
        safe = executor.submit(value="safe", steps=10, seconds=1.0)
        wait_until(safe.running)
        killed = executor.submit("kill", signal.SIGKILL)
        waiting = [executor.submit(value=n) for n in range(5)]
        assert isinstance(killed.exception(60), WorkerDied)
        assert safe.result(60) == "safe"
        assert [future.result(60) for future in waiting] == [0, 1, 2, 3, 4]
        wait_until(lambda: len(workers()) == 2)
        zombies = [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
        assert not {child.pid for child in zombies} & pids
    assert torch.equal(kept.frames, torch.full((fakes.BIG,), 5, dtype=torch.int32))


def test_a_worker_that_dies_idle_is_replaced_at_once():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        pid = executor.submit("pid").result()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: {worker.pid for worker in workers()} - {pid} != set())
        assert executor.submit("pid").result(60) != pid


def test_a_worker_that_dies_as_it_loads_again_is_started_again():
    with ParallelExecutor(functools.partial(fakes.slow_to_load, 0.5), **WORKER) as executor:
        first = executor.submit("pid").result()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: {worker.pid for worker in workers()} - {first} != set())
        (second,) = (worker for worker in workers() if worker.pid != first)
        waiting = executor.submit("pid")
        second.kill()
        assert waiting.result(60) not in (first, second.pid)


@pytest.mark.slow
def test_a_lost_request_is_tried_again_as_often_as_wanted(tmp_path):
    with ParallelExecutor(fakes.fake, **WORKER, retries=1) as executor:
        assert executor.submit("kill_once", str(tmp_path / "a")).result(60) == "second time"
        assert isinstance(executor.submit("kill", signal.SIGKILL).exception(60), WorkerDied)
        assert executor.submit(value=1).result(60) == 1
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        assert isinstance(executor.submit("kill_once", str(tmp_path / "b")).exception(60), WorkerDied)


def test_a_short_outage_costs_nothing_but_time(tmp_path):
    there = tmp_path / "there"
    there.touch()
    with ParallelExecutor(functools.partial(fakes.while_there, str(there)), **WORKER) as executor:
        there.unlink()
        killed, waiting = executor.submit("kill", signal.SIGKILL), executor.submit(value="late")
        assert isinstance(killed.exception(60), WorkerDied)
        wait_until(lambda: executor.health().workers[0].restarts >= 3)
        health = executor.health()
        assert (health.serving, health.waiting) == (0, 1)
        assert "the weights are gone" in health.workers[0].reason
        there.touch()
        assert waiting.result(60) == "late"
        assert executor.health().serving == 1


def test_in_a_long_outage_requests_are_told_and_afterwards_are_taken_again(tmp_path):
    there = tmp_path / "there"
    there.touch()
    build = functools.partial(fakes.while_there, str(there))
    with ParallelExecutor(build, **WORKER, bounds=Bounds(outage=1.5)) as executor:
        there.unlink()
        executor.submit("kill", signal.SIGKILL)
        error = executor.submit().exception(60)
        assert isinstance(error, ExecutorBroken)
        assert "no worker has served for 1.5 s" in str(error)
        wait_until(lambda: "the weights are gone" in executor.health().workers[0].reason)
        with pytest.raises(ExecutorBroken) as caught:
            executor.submit()
        assert "the weights are gone" in str(caught.value.__cause__)
        there.touch()
        wait_until(lambda: executor.health().serving == 1)
        assert executor.submit(value=1).result(60) == 1


def test_a_request_that_ends_all_its_workers_is_given_up_and_the_workers_are_not(caplog):
    with ParallelExecutor(fakes.fake, **WORKERS, retries=2) as executor:
        assert isinstance(executor.submit("kill", signal.SIGKILL).exception(60), WorkerDied)
        assert caplog.text.count("retrying request 1: worker") == 2
        assert "1 of 2 groups serving" in caplog.text
        wait_until(lambda: executor.health().serving == 2)
        assert executor.submit(value=1).result(60) == 1


def test_a_death_is_seen_though_a_child_of_the_dead_holds_the_socket(tmp_path):
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        start = time.monotonic()
        assert isinstance(executor.submit("fork_and_kill", str(tmp_path / "child")).exception(60), WorkerDied)
        assert time.monotonic() - start < 15
        assert executor.submit(value=1).result(60) == 1
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # nobody's by now


def _killed_at_random(rounds: int, retries: int, seed: int) -> dict[str, int]:
    """Kills a worker at any moment of its life, `rounds` times; what became of the requests."""
    random.seed(seed)
    ends = {"result": 0, "died": 0}
    with ParallelExecutor(fakes.fake, **WORKERS, retries=retries, log=lambda *_: None) as executor:
        held = []
        for nth in range(rounds):
            futures = [
                (n, executor.submit("big", n, steps=2, seconds=random.choice([0.0, 0.01, 0.05])))
                for n in range(nth, nth + 3)
            ]
            time.sleep(random.random() * random.choice([0.001, 0.02, 0.1, 2.0]))
            if alive := workers():
                random.choice(alive).kill()
            for n, future in futures:
                error = future.exception(120)
                if error is None:
                    held = [*held[-20:], (n, future.result().frames)]
                    ends["result"] += 1
                else:
                    assert isinstance(error, WorkerDied), repr(error)
                    ends["died"] += 1
            assert all(bool((frames == n).all()) for n, frames in held)
    return ends


def test_killed_at_random_every_future_ends_and_what_arrived_is_right():
    ends = _killed_at_random(rounds=5, retries=0, seed=1)
    assert ends["result"] >= 5
    assert sum(ends.values()) == 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("retries", [0, 1])
def test_killed_at_random_many_times(retries):
    ends = _killed_at_random(rounds=250, retries=retries, seed=2 + retries)
    assert sum(ends.values()) == 750
    assert ends["died"] < 400 / (1 + 10 * retries)


# Memory


def test_a_worker_out_of_memory_fails_its_request_and_lives_on():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        pid = executor.submit("pid").result()
        with pytest.raises(RuntimeError, match="memory"):
            executor.submit("take_memory").result(60)
        assert executor.submit("pid").result() == pid


def _in_small_shared_memory(fill: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount a small /dev/shm")
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"])
    if probe.returncode:
        pytest.skip("this system lets users mount nothing")
    code = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {FOLDER!r})
        import torch, fakes
        from wan_patches import ParallelExecutor

        with ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas", spares=0) as executor:
            for n in range(3):
                sent = torch.full((200 << 20,), n, dtype=torch.uint8)
                got = executor.submit(value=sent).result()
                assert torch.equal(sent, got)
        print(sorted(os.listdir("/dev/shm")))
    """)
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && {fill} exec "$0" -c "$1"', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_small_shared_memory_as_in_containers_is_enough():
    done = _in_small_shared_memory("")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_full_shared_memory_is_no_obstacle():
    done = _in_small_shared_memory("(dd if=/dev/zero of=/dev/shm/full bs=1M count=100 2>/dev/null || true) &&")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['full']\n"


def test_without_memfd_results_arrive_all_the_same(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with ParallelExecutor(fakes.without_memfd, **WORKER) as executor:
        for n in range(3):
            value = torch.full((fakes.BIG,), n)
            assert torch.equal(executor.submit(value=value).result(), value)
            assert "memfd" not in Path("/proc/self/maps").read_text()


def test_a_thousand_results_leave_nothing_behind():
    with ParallelExecutor(fakes.fake, **WORKER, log=lambda *_: None) as executor:

        def some(count):
            for n in range(count):
                assert executor.submit("big", n).result().frames[-1] == n

        def state():
            parent, worker = psutil.Process(), workers()[0]
            both = (parent, worker)
            # of files: what malloc maps comes and goes, and counts as memory
            maps = [sum(not map.path.startswith("[") for map in p.memory_maps(grouped=False)) for p in both]
            return [p.num_fds() for p in both] + maps, [p.memory_info().rss for p in both]

        some(20)
        counts, sizes = state()
        some(1000)
        counts_after, sizes_after = state()
    assert all(after <= before + 2 for before, after in zip(counts, counts_after)), (counts, counts_after)
    assert all(after < before + (24 << 20) for before, after in zip(sizes, sizes_after)), (sizes, sizes_after)


# The parent dies


def _parent(tmp_path: Path, text: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A script with an executor that runs a long request, and its workers."""
    script = tmp_path / "script.py"
    script.write_text(f"{HEEDS_CONTROL_C}import sys\nsys.path.insert(0, {FOLDER!r})\n" + textwrap.dedent(text))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout.readline() == "running\n", parent.stderr.read()
    return parent, psutil.Process(parent.pid).children()


_RUNS = """
    import fakes, time
    from wan_patches import ParallelExecutor

    with ParallelExecutor(fakes.fake, devices=["cpu", "cpu"], spares=0) as executor:
        future = executor.submit({request})
        executor.submit({request})
        while not future.running():
            time.sleep(0.01)
        print("running", flush=True)
        future.result()
"""


@pytest.mark.parametrize("request_", ["steps=1000, seconds=100", "'hang', 100"], ids=["stepping", "hanging"])
def test_workers_end_when_the_parent_is_killed(tmp_path, request_):
    parent, children = _parent(tmp_path, _RUNS.format(request=request_))
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_control_c_ends_all_soon(tmp_path):
    parent, children = _parent(tmp_path, _RUNS.format(request="steps=1000, seconds=100"))
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT or parent.returncode == 1
    assert "KeyboardInterrupt" in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_workers_leave_control_c_to_the_parent(tmp_path):
    heedless = _RUNS.format(request="value='done', steps=10, seconds=1.5").replace(
        "    import fakes", "    import signal\n    signal.signal(signal.SIGINT, lambda *_: None)\n    import fakes"
    )
    parent, _ = _parent(tmp_path, heedless.replace("future.result()", "print(future.result())"))
    os.killpg(parent.pid, signal.SIGINT)
    out, errors = parent.communicate(timeout=60)
    assert (parent.returncode, out) == (0, "done\n"), errors
