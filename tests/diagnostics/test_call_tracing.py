from __future__ import annotations

import cProfile
import pstats
import sys

import pytest

from wan_patches.diagnostics.call_tracing import tracing_calls


def double(x):
    return 2 * x


def quadruple(x):
    return double(double(x))


def fail():
    raise KeyError("no")


def test_calls_and_returns_are_reported_in_order():
    told = []
    with tracing_calls(
        [double.__code__, quadruple.__code__],
        on_call=lambda frame: told.append((frame.f_code.co_name, dict(frame.f_locals))),
        on_return=lambda frame, value: told.append((frame.f_code.co_name, value)),
    ):
        assert quadruple(3) == 12
    assert told == [
        ("quadruple", {"x": 3}),
        ("double", {"x": 3}),
        ("double", 6),
        ("double", {"x": 6}),
        ("double", 12),
        ("quadruple", 12),
    ]


def test_other_calls_are_not_reported():
    told = []
    with tracing_calls([double.__code__], on_call=lambda frame: told.append(frame.f_code.co_name)):
        quadruple(1)
    double(1)
    assert told == ["double", "double"]


def test_the_predicate_is_called_once_for_each_code():
    asked, told = [], []

    def wants(frame):
        asked.append(frame.f_code.co_name)
        return frame.f_code is double.__code__

    with tracing_calls(wants, on_call=lambda frame: told.append(frame.f_locals["x"])):
        quadruple(1)
        quadruple(3)
    assert told == [1, 2, 3, 6]
    assert asked.count("double") == asked.count("quadruple") == 1


def test_an_exception_is_reported_and_propagates():
    told = []
    with (
        pytest.raises(KeyError),
        tracing_calls([fail.__code__], on_return=lambda frame, value: told.append(value)),
    ):
        fail()
    assert told == [None]


def test_calls_made_by_callbacks_are_not_reported():
    told = []
    with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(double(value))):
        double(1)
    assert told == [4]


def test_a_previous_profiler_is_restored():
    def other(frame, event, value):
        pass

    before = sys.getprofile()
    sys.setprofile(other)
    try:
        with tracing_calls([double.__code__]):
            assert sys.getprofile() is not other
        assert sys.getprofile() is other
    finally:
        sys.setprofile(before)


def test_cprofile_is_paused_and_resumed():
    told, cprofile, before = [], cProfile.Profile(), sys.getprofile()
    cprofile.enable()
    try:
        on = sys.getprofile()
        with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(value)) as trace:
            double(1)
        assert sys.getprofile() is on
        fail_quietly()
    finally:
        cprofile.disable()
        sys.setprofile(before)
    assert told == [2]
    assert not trace.displaced
    seen = {name for _, _, name in pstats.Stats(cprofile).stats}
    assert "fail_quietly" in seen
    assert "double" not in seen or sys.version_info >= (3, 12)  # where cProfile needs no rest


def fail_quietly():
    with pytest.raises(KeyError):
        fail()


def test_a_profiler_set_in_the_block_stays_and_is_reported_as_displacing():
    def other(frame, event, value):
        pass

    before, told = sys.getprofile(), []
    try:
        with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(value)) as trace:
            double(1)
            sys.setprofile(other)
            double(2)
        assert sys.getprofile() is other
    finally:
        sys.setprofile(before)
    assert told == [2]
    assert trace.displaced


def test_cprofile_in_the_block_is_seen_or_reported():
    told, cprofile = [], cProfile.Profile()
    with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(value)) as trace:
        cprofile.enable()
        cprofile.disable()
        double(1)
    assert bool(told) is not trace.displaced
    assert sys.getprofile() is None


def test_nested_traces_report_displacement():
    told = []
    with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(value)) as outer:
        with tracing_calls([double.__code__]) as inner:
            double(1)
        double(2)
    assert told == [4]
    assert (outer.displaced, inner.displaced) == (True, False)


def test_consecutive_traces_are_not_displaced():
    for _ in range(2):
        with tracing_calls([double.__code__]) as trace:
            double(1)
        assert not trace.displaced


def test_a_profiler_that_cannot_be_restored_is_left_alone():
    torch = pytest.importorskip("torch")
    told = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True):
        on = sys.getprofile()
        with tracing_calls([double.__code__], on_return=lambda frame, value: told.append(value)) as trace:
            double(1)
        assert sys.getprofile() is on
    assert trace.displaced is (on is not None)
    assert bool(told) is not trace.displaced
    assert sys.getprofile() is None
