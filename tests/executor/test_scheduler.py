"""Who works on what, with groups that are threads of this process and do as they are told."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fakes
import pytest
from processes import HEEDS_CONTROL_C

from wan_patches.executor.bounds import Bounds
from wan_patches.executor.errors import WorkerDied
from wan_patches.executor.groups import WorkerGroup
from wan_patches.executor.requests import Request
from wan_patches.executor.scheduler import Scheduler
from wan_patches.executor.transport import Message, pack

pytestmark = pytest.mark.timeout(60)


class Told:
    """A group whose requests end when `go` is set."""

    remote = False
    name = "the group"

    def __init__(self) -> None:
        self.on_death = lambda: None
        self.go = threading.Event()
        self.starts = self.kills = self.stops = 0
        self.is_alive = False
        self.interrupted = []

    def start(self, wanted) -> None:
        self.starts += 1
        self.is_alive = True

    def run(self, request):
        assert self.go.wait(30)
        return request.id, {}

    def interrupt(self, request: int) -> None:
        self.interrupted.append(request)

    def kill(self) -> None:
        self.kills += 1

    def check(self) -> None:
        if not self.is_alive:
            raise WorkerDied(-9, 0, None)

    def members(self):
        return [(0, "cpu", None)]

    def stop(self) -> None:
        self.stops += 1


def request(number: int = 1, **options) -> Request:
    return Request(number, (), {}, **options)


def test_an_interrupt_that_comes_late_harms_nobody():
    group = Told()
    scheduler = Scheduler([group], Bounds(), cancel_grace=0.1)
    scheduler.start()
    first = request()
    scheduler.add(first)
    while first._interrupt is None:
        time.sleep(0.001)
    late = first._interrupt
    group.go.set()
    assert first.result(10) == 1
    late()
    time.sleep(0.4)
    assert group.kills == 0
    assert group.interrupted == []
    scheduler.close()
    scheduler.join()


def test_a_group_that_does_not_heed_is_ended_after_the_cancel_grace():
    group = Told()
    scheduler = Scheduler([group], Bounds(), cancel_grace=0.1)
    scheduler.start()
    first = request()
    scheduler.add(first)
    while not first.running():
        time.sleep(0.001)
    assert first.cancel()
    assert group.interrupted == [1]
    while not group.kills:
        time.sleep(0.01)
    group.go.set()
    scheduler.close()
    scheduler.join()
    assert group.stops == 1


def test_a_dead_group_is_not_started_again_when_nothing_is_to_come():
    group = Told()
    scheduler = Scheduler([group], Bounds(), cancel_grace=1)
    scheduler.start()
    scheduler.close()
    group.is_alive = False
    group.on_death()
    scheduler.join()
    assert group.starts == 1


def test_a_request_that_was_cancelled_between_two_tries_is_not_tried_again():
    class Dies(Told):
        def run(self, request):
            self.is_alive = False
            request.cancel()
            raise WorkerDied(-9, 0, request.id)

    group = Dies()
    scheduler = Scheduler([group], Bounds(), cancel_grace=1)
    scheduler.start()
    first = request()
    first._retries = 5
    scheduler.add(first)
    while not first.cancelled():
        time.sleep(0.001)
    scheduler.close()
    scheduler.join()
    assert group.starts <= 2


def test_a_request_that_was_cancelled_before_another_try_does_not_run(caplog):
    class DiesOnce(Told):
        def run(self, request):
            if not self.go.is_set():
                self.go.set()
                self.is_alive = False
                raise WorkerDied(-9, 0, request.id)
            assert request.id != 1, "it was cancelled"
            return request.id, {}

        def start(self, wanted):
            if self.starts:
                first.cancel()
            super().start(wanted)

    group, first, second = DiesOnce(), request(1), request(2)
    first._retries = 1
    scheduler = Scheduler([group], Bounds(), cancel_grace=1)
    scheduler.start()
    scheduler.add(first)
    scheduler.add(second)
    assert second.result(10) == 2
    assert first.cancelled()
    assert "unexpected state" not in caplog.text
    scheduler.close()
    scheduler.join()


def test_all_groups_end_when_one_cannot_start():
    class Fails(Told):
        def start(self, wanted):
            raise KeyError("no weights")

    groups = [Told(), Fails(), Told()]
    with pytest.raises(KeyError, match="no weights"):
        Scheduler(groups, Bounds(), cancel_grace=1).start()
    assert [group.stops for group in groups] == [1, 1, 1]


def test_nothing_is_told_of_an_outage_after_the_end(caplog):
    class Lost(Told):
        def start(self, wanted):
            if self.starts:
                raise KeyError("no weights")
            super().start(wanted)

    group = Lost()
    scheduler = Scheduler([group], Bounds(outage=1.0), cancel_grace=1)
    scheduler.start()
    assert scheduler.health().serving == 1
    group.is_alive = False
    group.on_death()
    while not scheduler.health().workers[0].restarts:
        time.sleep(0.01)
    scheduler.close()
    scheduler.join()
    assert scheduler.health().workers[0].state == "down"
    time.sleep(1.2)
    assert "no worker has served" not in caplog.text


def test_workers_of_an_executor_that_was_shut_down_do_not_serve():
    group = Told()
    scheduler = Scheduler([group], Bounds(), cancel_grace=1)
    scheduler.start()
    scheduler.close()
    scheduler.join()
    assert scheduler.health().serving == 0


def test_a_request_that_a_worker_takes_does_not_expire_in_the_queue():
    class Slow(Request):
        """Between the look and what follows there is time."""

        @property
        def _begun(self):
            found = self.__dict__.get("begun", False)
            time.sleep(0.1)
            return found

        @_begun.setter
        def _begun(self, value):
            self.__dict__["begun"] = value

    first = Slow(1, (), {}, queue_timeout=1.0)
    expires = threading.Thread(target=first._expire_waiting)
    expires.start()
    time.sleep(0.05)
    begun = first._begin(lambda: None)
    expires.join()
    assert begun != first.done()


def test_a_death_is_the_cause_of_what_another_rank_raised_because_of_it():
    class Dead:
        def __init__(self, rank):
            self.rank = rank

        def died(self, request):
            return WorkerDied(-9, self.rank, request)

        def kill(self):
            pass

        def join(self):
            pass

    group = WorkerGroup(None, [None] * 2, first_rank=0, setup={}, launcher=None, bounds=Bounds(), log=print)
    group._workers = first, second = Dead(0), Dead(1)
    lost = pack(RuntimeError("connection closed by peer")).parts()
    group._events.put((first, Message("failed", 1, "traceback", [lost])))
    group._events.put((second, None))
    with pytest.raises(WorkerDied) as caught:
        group._gather(request())
    assert caught.value.rank == 1


def test_control_c_while_it_loads_ends_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"{HEEDS_CONTROL_C}import sys\nsys.path.insert(0, {str(Path(fakes.__file__).parent)!r})\n"
        + textwrap.dedent("""
            import functools, fakes
            from wan_patches import ParallelExecutor

            print("loading", flush=True)
            ParallelExecutor(functools.partial(fakes.slow_to_load, 100), devices=["cpu", "cpu"])
            """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "loading\n"
    time.sleep(3)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors


def test_a_death_is_told_as_far_as_it_is_known():
    assert str(WorkerDied(None, 3, 5)) == "worker 3 ended during request 5"
    assert str(WorkerDied(1, 0, None, ())) == (
        "worker 0 ended with exit code 1 while it loaded the pipeline; it had written nothing"
    )
    assert str(WorkerDied(-11, 0, 1, ("a", "b"))) == (
        "worker 0 was ended by SIGSEGV during request 1; its last output:\n    a\n    b"
    )
