"""Everything at once: killed, stopped, hanging and full, and still every future ends and every result is right."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import fakes
import psutil
import pytest
from processes import wait_until, workers

from wan_patches import ParallelExecutor
from wan_patches.executor import Bounds, WorkerDied, scheduler

BOUNDS = Bounds(answer=3.0, load=12.0, first_step=20.0, step=20.0, outage=300.0)


class Saboteur(threading.Thread):
    """Kills and stops what it finds, and makes loads hang or fail."""

    def __init__(self, executor: ParallelExecutor, folder: Path, rng: random.Random, pause: float) -> None:
        super().__init__(daemon=True)
        self._executor, self._folder, self._random, self._pause = executor, folder, rng, pause
        self._end = threading.Event()
        self.done: list[str] = []

    def run(self) -> None:
        while not self._end.wait(self._random.random() * self._pause):
            if not self._executor.health().serving and self._random.random() < 0.9:
                continue  # or nothing would ever run
            first = ["kill", "stop"][len(self.done) :]  # in the shortest run too
            action = first[0] if first else self._random.choice(["kill", "kill", "stop", "hang", "fail"])
            self.done.append(action)
            if action in ("kill", "stop") and (found := workers()):
                with contextlib.suppress(psutil.Error):
                    self._random.choice(found).send_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            else:
                (self._folder / action).touch()
                self._end.wait(1.0)
                (self._folder / action).unlink()

    def stop(self) -> None:
        self._end.set()
        self.join()


def _check_in_a_fork(held: list[tuple[int, object]]) -> int:
    """A child that looks at all results a moment later."""
    if (child := os.fork()) == 0:
        time.sleep(0.3)
        # not by torch, whose threads are the parent's
        os._exit(0 if all((frames.numpy() == n).all() for n, frames in held) else 1)
    return child


def _chaos(folder: Path, count: int, seed: int, pause: float) -> dict[str, int]:
    """`count` requests under sabotage; how many ended in which way."""
    rng, ends = random.Random(seed), dict.fromkeys(("result", "error", "died", "cancelled", "timeout"), 0)
    before = {*os.listdir("/dev/shm"), *os.listdir("/tmp")}
    held, children = [], []
    build = functools.partial(fakes.unreliable, str(folder))
    with ParallelExecutor(
        build, devices=["cpu"] * 2, threads=1, retries=2, bounds=BOUNDS, cancel_grace=2.0, log=lambda *_: None
    ) as executor:
        saboteur = Saboteur(executor, folder, rng, pause)
        saboteur.start()
        running = []
        for n in range(count):
            do = rng.choices(["big", "no_memory", "no_space", "hang"], [12, 1, 1, 1])[0]
            value = 0.5 if do == "hang" else n
            timeout = rng.choice([None, None, None, 0.2])
            running.append((n, do, executor.submit(do, value, steps=2, seconds=0.1, timeout=timeout)))
            if rng.random() < 0.1:
                rng.choice(running)[2].cancel()
            if len(running) < 6:
                continue
            n, do, future = running.pop(0)
            ends[_end(n, do, future, held)] += 1
            held = held[-10:]
            if rng.random() < 0.05:
                children.append(_check_in_a_fork(held))
        saboteur.stop()
        for n, do, future in running:
            ends[_end(n, do, future, held)] += 1
        wait_until(lambda: executor.health().serving == 2, 90)
        assert executor.submit("big", 7).result(60).frames[0] == 7
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
    assert all(bool((frames == n).all()) for n, frames in held)
    assert not workers()
    left = {*os.listdir("/dev/shm"), *os.listdir("/tmp")} - before
    assert not [name for name in left if "wan" in name.lower()], left
    assert {"kill", "stop"} <= set(saboteur.done)
    return ends


def _end(n: int, do: str, future, held: list[tuple[int, object]]) -> str:
    try:
        found = future.result(400)
    except CancelledError:
        return "cancelled"
    except TimeoutError:
        assert future.done()
        return "timeout"
    except WorkerDied:
        return "died"
    except (MemoryError, OSError):
        assert do in ("no_memory", "no_space")
        return "error"
    if do == "big":
        assert bool((found.frames == n).all())
        held.append((n, found.frames))
    return "result"


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("count", "seed", "pause", "results"),
    [(50, 1, 1.5, 15), pytest.param(1000, 2, 2.0, 500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["a little", "a thousand requests"],
)
def test_chaos(tmp_path, monkeypatch, count, seed, pause, results):
    monkeypatch.setattr(scheduler, "_LONGEST_PAUSE", 2.0)
    ends = _chaos(tmp_path, count, seed, pause)
    assert sum(ends.values()) == count
    assert ends["result"] >= results, ends
