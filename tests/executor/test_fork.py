"""A forked child has what its parent had at the fork, for as long as it likes, and nothing of the parent's alone."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import zlib
from pathlib import Path

import fakes
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from processes import wait_until, workers

from wan_patches import ParallelExecutor
from wan_patches.executor import forks
from wan_patches.executor.images import Frame
from wan_patches.executor.memory import RETIRED, Map
from wan_patches.executor.transport import Channel, pack

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="what is tested needs files in memory"),
]

BIG = 1 << 20  # bytes, more than goes through the socket
CARRIERS = {"slots": {}, "files": {"slots": 0}, "wire": {"memfd": False}}
WORKER = {"devices": ["cpu"], "layout": "replicas", "spares": 0, "threads": 1}
FOLDER = str(Path(fakes.__file__).parent)


class Child:
    """A forked process in which `answer` is called with what `ask` is given here. Ends when it is left."""

    def __init__(self, answer) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        status = 1
        try:
            while (question := theirs.recv()) is not Child:
                theirs.send(answer(question))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def ask(self, question=None):
        self._ours.send(question)
        assert self._ours.poll(30), "the child hangs"
        return self._ours.recv()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with self._ours, contextlib.suppress(OSError):
            self._ours.send(Child)
        end = time.monotonic() + 30
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError("the child did not end")
            time.sleep(0.002)


def _sum(value) -> int:
    """Of all bytes. Not by torch, whose threads a forked child has not."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(map(_sum, value))
    array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return zlib.crc32(np.ascontiguousarray(array))


def _array(seed: int, size: int = BIG) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _frames(seed: int) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in _array(seed, 4 * 300 * 400 * 3).reshape(4, 300, 400, 3)]


KINDS = {
    "tensor": lambda seed: torch.from_numpy(_array(seed)),
    "array": _array,
    "frames": _frames,
    "nested": lambda seed: {"a": [torch.from_numpy(_array(seed)).view(2, -1)], "b": (_array(seed + 50), _frames(seed))},
}


@contextlib.contextmanager
def _ends(**options):
    """Both ends in this process: a channel that sends and one that receives."""
    ours, sock = Channel.pair(**options)
    theirs = Channel(sock)
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def _through(ends, value):
    """What comes out of the one end when `value` goes into the other."""
    thread = threading.Thread(target=ends[0].send, args=("value", 0, None, pack(value)))
    thread.start()
    try:
        return ends[1].recv().load()
    finally:
        thread.join(30)


def _slots(channel):
    return [slot for slot in channel._slots if slot]


def _open(pid: int | None = None):
    """Descriptors, and maps of shared files."""
    process = psutil.Process(pid)
    return process.num_fds(), sum("memfd:wan-patches" in part.path for part in process.memory_maps(grouped=False))


@pytest.fixture(scope="module")
def executor():
    with ParallelExecutor(fakes.fake, **WORKER) as executor:
        yield executor


# Results of an executor


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_keeps_a_result_while_the_parent_goes_on(executor, kind):
    held = [executor.submit(value=KINDS[kind](1)).result(60)]
    with Child(lambda _: _sum(held)) as child:
        held.clear()
        for seed in range(2, 8):
            assert _sum(executor.submit(value=KINDS[kind](seed)).result(60)) == _sum(KINDS[kind](seed))
        assert child.ask() == _sum(KINDS[kind](1))


def _look_later(value, pipe) -> None:
    pipe.recv()
    pipe.send(_sum(value))


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_of_multiprocessing_keeps_a_result(executor, kind):
    result = executor.submit(value=KINDS[kind](1)).result(60)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_look_later, args=(result, theirs))
    process.start()
    del result
    for seed in range(2, 8):
        executor.submit(value=KINDS[kind](seed)).result(60)
    ours.send(None)
    assert ours.poll(30)
    assert ours.recv() == _sum(KINDS[kind](1))
    process.join(30)
    assert process.exitcode == 0


def test_a_view_of_a_view_is_a_result_too(executor):
    def view():
        frame = executor.submit(value=_frames(1)).result(60)[2]
        return np.asarray(frame)[10:200:2, ::-1][5:, :, 1]

    held, expected = [view()], np.asarray(_frames(1)[2])[10:200:2, ::-1][5:, :, 1]
    with Child(lambda _: _sum(held)) as child:
        held.clear()
        for seed in range(2, 6):
            executor.submit(value=_frames(seed)).result(60)
        assert child.ask() == _sum(expected)


def test_results_of_this_process_are_kept_as_well():
    with ParallelExecutor(fakes.fake, devices=["cpu"], layout="inline") as executor:
        result = executor.submit("echo", _array(1)).result(60)
        with Child(lambda _: _sum(result)) as child:
            executor.submit("echo", _array(2)).result(60)
            assert child.ask() == _sum(_array(1))


def test_forks_leave_nothing_open_or_mapped_in_parent_child_and_worker(executor):
    (worker,) = workers()

    def state():
        gc.collect()
        return np.array([_open(), _open(worker.pid)])

    for seed in range(4):
        executor.submit(value=_array(seed)).result(60)
    before = state()
    with contextlib.ExitStack() as stack:
        children = []
        for seed in range(20):
            result = executor.submit(value=_array(seed)).result(60)
            children.append(stack.enter_context(Child(lambda _, result=result: (_sum(result), _open()[1]))))
        del result
        for seed in range(3):
            executor.submit(value=_array(seed)).result(60)
        during = state()
        for seed, child in enumerate(children):
            # one part that is private, and the page with the word; not those of earlier results
            assert child.ask() == (_sum(_array(seed)), 2)
    assert (during[0] <= before[0] + [20, 2]).all(), (before, during)  # the pipes to the children
    assert (during[1] <= before[1] + [2, 2]).all(), (before, during)
    assert (state() <= before + 2).all()


# An executor in a child


def test_an_executor_refuses_in_a_child_and_harms_nothing(executor):
    running = executor.submit(value="done", steps=10, seconds=2.0)
    waiting = [executor.submit(value=n) for n in range(3)]
    wait_until(running.running)

    def answer(_):
        told = []
        for attempt in (
            lambda: executor.submit(value=1),
            lambda: executor.map([{"value": 1}]),
            lambda: running.result(10),
            lambda: waiting[2].result(10),
        ):
            try:
                attempt()
            except RuntimeError as error:
                told.append(str(error))
        assert not running.cancel()
        with executor:
            pass
        with contextlib.suppress(KeyError), executor:
            raise KeyError
        executor.shutdown(cancel_futures=True)
        return told

    with Child(answer) as child:
        told = child.ask()
    assert len(told) == 4
    assert told[:2] == ["this executor belongs to the parent process; create another one here"] * 2
    assert "runs in the parent process" in told[2]
    assert running.result(60) == "done"
    assert [future.result(60) for future in waiting] == [0, 1, 2]


def test_a_child_makes_an_executor_of_its_own(executor):
    def answer(_):
        with ParallelExecutor(fakes.fake, devices=["cpu"], layout="inline") as own:
            return own.submit(value=3).result(30)

    with Child(answer) as child:
        assert child.ask() == 3
    assert executor.submit(value=4).result(60) == 4


SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {FOLDER!r})
import fakes
from wan_patches import ParallelExecutor

executor = ParallelExecutor(fakes.fake, devices=["cpu"], layout="replicas", spares=0)
"""


def _script(code: str) -> subprocess.Popen[str]:
    code = SCRIPT + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_however_a_child_ends_the_parent_goes_on():
    code = """
    for end in ("sys.exit()", "del executor, future", "raise KeyError", "executor.shutdown()"):
        future = executor.submit(steps=100, seconds=0.5, value="done")
        child = os.fork()
        if not child:
            exec(end)
            break
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), future.result(), executor.submit(value=2).result())
    """
    out, errors = _script(code).communicate(timeout=100)
    assert out.splitlines() == ["0 done 2", "0 done 2", "1 done 2", "0 done 2"], errors


def test_workers_end_with_the_parent_though_a_forked_child_lives():
    code = """
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, executor.submit("pid").result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = _script(code)
    child, worker = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    try:
        worker.wait(20)
        assert child.is_running()
    finally:
        child.kill()
        parent.communicate(timeout=30)


# The channel


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_one_process_writes_the_other_does_not_see(carrier):
    with _ends(**CARRIERS[carrier]) as ends:
        held = [_through(ends, _array(1)), _through(ends, torch.from_numpy(_array(2)))]
        held[0][5] = 200  # before the fork: both have it

        def answer(value):
            held[1].numpy()[:] = value
            return _sum(held), held[0][5]

        def expected(first, second):
            arrays = [_array(1), _array(2)]
            arrays[0][:], arrays[1][:] = first, second
            return _sum(arrays)

        with Child(answer) as one, Child(answer) as two:
            held[0][:] = 7
            before = _array(1)
            before[5] = 200
            assert one.ask(3) == (expected(before, 3), 200)
            assert two.ask(4) == (expected(before, 4), 200)
            assert one.ask(5) == (expected(before, 5), 200)
            assert _sum(held) == expected(7, _array(2))


def test_what_came_before_channels_were_closed_is_kept_apart_as_well():
    with _ends() as ends:
        held = _through(ends, _array(1))
    with Child(lambda _: held.fill(1)) as child:
        child.ask()
        assert _sum(held) == _sum(_array(1))


def test_only_slots_that_somebody_holds_are_retired():
    with _ends() as ends:
        held = _through(ends, _array(1))
        before = _slots(ends[0])
        _through(ends, _array(2))
        (kept,) = set(_slots(ends[0])) - set(before)
        with Child(lambda _: _sum(held)) as child:
            assert before[0].retired
            assert kept.free
            for seed in range(3):
                others = [_through(ends, _array(seed)) for _ in range(2)]
                del others
            assert len(_slots(ends[0])) == 2  # as many as without a fork, and used
            assert before[0] not in _slots(ends[0])
            assert kept in _slots(ends[0])
            assert all(slot.generation >= 3 for slot in _slots(ends[0]))
            assert child.ask() == _sum(_array(1))
        assert _sum(held) == _sum(_array(1))


def test_a_retired_slot_is_let_go_by_a_sender_that_has_nothing_to_send():
    before = _open()[1]
    with _ends() as ends:
        held = [_through(ends, _array(1))]
        with Child(lambda _: _sum(held)) as child:
            ends[0].trim()
            assert not _slots(ends[0])
            held.clear()
            assert _open()[1] == before
            assert child.ask() == _sum(_array(1))


def test_a_sender_that_forks_does_not_use_what_its_child_may_have():
    with _ends() as ends:
        tensor = ends[0].empty_strided((BIG,), (1,), torch.uint8)
        tensor.numpy()[:] = 1
        held = [tensor]
        with Child(lambda _: _sum(held)) as child:
            sent = _through(ends, tensor)  # a copy, to which the receiver may write
            sent.fill_(2)
            held.clear()
            del tensor, sent
            for seed in range(3):
                others = [_through(ends, _array(seed)) for _ in range(2)]
                del others
            ends[0].trim()
            assert child.ask() == _sum(np.ones(BIG, np.uint8))
        assert len(_slots(ends[0])) <= 2


def test_a_message_on_its_way_belongs_to_the_parent():
    with _ends() as ends:
        ends[0].send("x", value=pack(_array(1)))

        def answer(_):
            with pytest.raises(EOFError):
                ends[1].recv()
            with pytest.raises(ConnectionError):
                ends[0].send("y")
            for end in ends:
                end.trim()
                end.close()
            assert ends[0].empty_strided((BIG,), (1,), torch.uint8).shape == (BIG,)
            return _open()[1]

        with Child(answer) as child:
            assert child.ask() == 0
        assert _sum(ends[1].recv().load()) == _sum(_array(1))
        assert _sum(_through(ends, _array(2))) == _sum(_array(2))


def test_a_slot_that_comes_while_another_is_retired_stays(monkeypatch):
    original = Map.make_private

    def meanwhile(*arguments):  # a child of another thread's fork has told the sender already
        monkeypatch.undo()
        _slots(ends[0])[0]._released[0] = RETIRED
        _through(ends, _array(2))
        original(*arguments)

    with _ends(slots=1) as ends:
        held = _through(ends, _array(1))
        monkeypatch.setattr(Map, "make_private", meanwhile)
        ends[1].before_fork()
        assert _sum(_through(ends, _array(3))) == _sum(_array(3))
        assert _sum(held) == _sum(_array(1))


def test_a_child_does_not_close_what_another_thread_was_closing():
    with _ends() as ends:
        _through(ends, _array(1))
        slot = _slots(ends[0])[0]
        slot.close()
        other = os.open(os.devnull, os.O_RDONLY)
        if other != slot.descriptor:  # the number is another file's by now
            os.dup2(other, slot.descriptor)
            os.close(other)
        try:
            with Child(lambda _: (os.fstat(slot.descriptor).st_rdev, len(_slots(ends[0])))) as child:
                assert child.ask() == (os.stat(os.devnull).st_rdev, 0)
        finally:
            os.close(slot.descriptor)


def test_a_fork_does_not_wait_for_a_send_that_blocks():
    with _ends(memfd=False) as ends:
        thread = threading.Thread(target=ends[0].send, args=("x", 0, None, pack(_array(1, 8 * BIG))))
        thread.start()
        wait_until(ends[0]._lock.locked)
        time.sleep(0.1)
        start = time.monotonic()
        with Child(lambda _: ends[0].close()) as child:
            assert time.monotonic() - start < 2
            child.ask()
        assert thread.is_alive()
        assert _sum(ends[1].recv().load()) == _sum(_array(1, 8 * BIG))
        thread.join(30)


def test_channels_and_executors_are_not_kept_for_forks():
    gc.collect()
    before = len(forks._watched)
    with _ends() as ends:
        assert len(forks._watched) == before + 2
    del ends
    gc.collect()
    assert len(forks._watched) == before


def test_subprocesses_and_forks_that_fail_disturb_nothing():
    with _ends() as ends:
        held = _through(ends, _array(1))
        subprocess.run(["true"], check=True)
        assert not _slots(ends[0])[0].retired
        subprocess.run(["true"], check=True, preexec_fn=lambda: None)  # forks by way of Python
        assert _slots(ends[0])[0].retired
        forks._before()
        forks._after_in_parent()  # what Python calls after a failed fork, too
        assert not forks.under_way()
        assert _sum(held) == _sum(_array(1))
        assert _sum(_through(ends, _array(2))) == _sum(_array(2))


def test_a_fork_in_a_signal_handler_or_a_garbage_collection_is_like_any_other():
    pids, held = [], []

    def fork():
        pids.append(os.fork())
        if not pids[-1]:
            os._exit(any(_sum(value) != _sum(_array(seed, 200_000)) for seed, value in held))

    def handler(*_):
        fork()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)

    class Forks:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            fork()

    old = signal.signal(signal.SIGVTALRM, handler)
    try:
        with _ends() as ends:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)
            for seed in range(80):
                held.append((seed, _through(ends, _array(seed, 200_000))))
                del held[:-3]
                if seed % 10 == 0:
                    Forks()
                    gc.collect()
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            assert len(_slots(ends[0])) == 2
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    assert len(pids) > 15
    assert {os.waitpid(pid, 0)[1] for pid in pids} == {0}


# At random


class _Holder:
    """What a process holds, and what it should be."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[object, int]] = {}

    def check(self, _=None) -> bool:
        return all(_sum(value) == expected for value, expected in self.held.values())

    def do(self, order) -> bool:
        what, nth = order
        if nth in self.held and what == "drop":
            del self.held[nth]
        elif nth in self.held and what == "write":
            value = self.held[nth][0]
            if not isinstance(value, list):
                np.asarray(value)[::1000] += 1
                self.held[nth] = value, _sum(value)
        return self.check()


def _at_random(seed: int, steps: int) -> None:
    """Requests, forks, drops and writes in parent and children, in any order; all bytes are looked at all the time."""
    choose = random.Random(seed)
    sizes = [120_000, 200_000, 400_000]
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(_ends(slots=choose.choice([0, 1, 2, 3])))
        holder, children, own, made = _Holder(), [], [], 0
        for nth in range(steps):
            match choose.choice(["send"] * 6 + ["drop"] * 4 + ["write", "fork", "compute", "trim"] + ["child"] * 4):
                case "send":
                    array = _array(nth, choose.choice(sizes))
                    kind = choose.choice(["tensor", "array", "frame"])
                    frame = Frame(array[:120_000].reshape(200, 200, 3))
                    value = {"tensor": torch.from_numpy(array), "array": array, "frame": [frame, frame]}[kind]
                    holder.held[nth] = _through(ends, value), _sum(value)
                    del value, frame
                case "compute":
                    tensor = ends[0].empty_strided((choose.choice(sizes),), (1,), torch.uint8)
                    tensor.numpy()[:] = nth % 256
                    own.append((tensor, _sum(tensor)))
                    del tensor
                    if choose.random() < 0.7:
                        holder.held[nth] = _through(ends, own[-1][0]), own[-1][1]
                        own.pop()
                    del own[:-2]
                case "drop" | "write" as what if holder.held:
                    holder.do((what, choose.choice(list(holder.held))))
                case "fork" if len(children) < 6:
                    children.append(stack.enter_context(Child(holder.do)))
                case "trim":
                    ends[0].trim()
                case "child" if children:
                    what = choose.choice(["drop", "write", "look"])
                    assert choose.choice(children).ask((what, choose.randrange(nth))), (seed, nth)
            made = max(made, len(_slots(ends[0])))
            assert holder.check(), (seed, nth)
            assert all(_sum(tensor) == expected for tensor, expected in own)
        assert all(child.ask(("look", 0)) for child in children), seed
        assert made <= 3
        limit = ends[0]._limit
        holder.held.clear()
        own.clear()
        for _ in range(2):
            kept = [_through(ends, _array(0)) for _ in range(limit)]
            assert len(_slots(ends[0])) == limit  # none was lost
            assert not any(slot.free for slot in _slots(ends[0]))
            del kept


@pytest.mark.parametrize("seed", range(15))
def test_at_random_nobody_sees_a_byte_change(seed):
    _at_random(seed, steps=80)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_random_nobody_sees_a_byte_change_for_long():
    for seed in range(100, 600):
        _at_random(seed, steps=200)


def _with_threads(seconds: float) -> None:
    """Threads that receive, hold and drop, and threads that fork at the same time."""
    end, errors, forked = time.monotonic() + seconds, [], []
    shared: dict[int, list[tuple[int, object]]] = {}

    def guarded(work):
        def run(*arguments):
            try:
                while time.monotonic() < end and not errors:
                    work(*arguments)
            except BaseException:
                errors.append(traceback.format_exc())

        return run

    def right(held):
        return all(_sum(value) == _sum(np.full(200_000, nth % 256, np.uint8)) for nth, value in held)

    @guarded
    def traffic(place, ends, choose):
        nth = choose.randrange(1000)
        held = shared[place]
        held.append((nth, _through(ends, np.full(200_000, nth % 256, np.uint8))))
        del held[choose.randrange(4) :]
        assert right(held)

    @guarded
    def fork(choose):
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                for _ in range(4):
                    time.sleep(0.01)
                    assert all(right(list(held)) for held in shared.values())
                status = 0
            os._exit(status)
        forked.append(pid)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        assert ended[1] == 0, "the child saw wrong bytes, or hung"

    with contextlib.ExitStack() as stack:
        every = []
        for place in range(3):
            every.append(stack.enter_context(_ends()))
            shared[place] = []
        threads = [
            threading.Thread(target=traffic, args=(place, ends, random.Random(place)))
            for place, ends in enumerate(every)
        ] + [threading.Thread(target=fork, args=(random.Random(nth),)) for nth in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 60)
            assert not thread.is_alive()
        assert not errors, errors[0]
        assert len(forked) > 5 * seconds
        shared.clear()
        for ends in every:
            kept = [_through(ends, _array(0)) for _ in range(2)]
            assert not any(slot.free for slot in _slots(ends[0]))
            assert len(_slots(ends[0])) == 2
            del kept


def test_threads_that_fork_and_threads_that_receive():
    _with_threads(4.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_threads_that_fork_and_threads_that_receive_for_long():
    _with_threads(600.0)
