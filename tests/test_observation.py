from __future__ import annotations

import sys

import pytest

from wan_patches.observation import observing


def double(x):
    return 2 * x


def quadruple(x):
    return double(double(x))


def fail():
    raise KeyError("no")


def test_calls_and_returns_are_told_in_order():
    told = []
    with observing(
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


def test_what_is_not_asked_for_is_not_told():
    told = []
    with observing([double.__code__], on_call=lambda frame: told.append(frame.f_code.co_name)):
        quadruple(1)
    double(1)
    assert told == ["double", "double"]


def test_a_function_is_asked_once_about_each_code():
    asked, told = [], []

    def wants(frame):
        asked.append(frame.f_code.co_name)
        return frame.f_code is double.__code__

    with observing(wants, on_call=lambda frame: told.append(frame.f_locals["x"])):
        quadruple(1)
        quadruple(3)
    assert told == [1, 2, 3, 6]
    assert asked.count("double") == asked.count("quadruple") == 1


def test_an_exception_is_told_and_goes_on():
    told = []
    with (
        pytest.raises(KeyError),
        observing([fail.__code__], on_return=lambda frame, value: told.append(value)),
    ):
        fail()
    assert told == [None]


def test_callbacks_do_not_watch_themselves():
    told = []
    with observing([double.__code__], on_return=lambda frame, value: told.append(double(value))):
        double(1)
    assert told == [4]


def test_another_profiler_comes_back():
    def other(frame, event, value):
        pass

    before = sys.getprofile()
    sys.setprofile(other)
    try:
        with observing([double.__code__]):
            assert sys.getprofile() is not other
        assert sys.getprofile() is other
    finally:
        sys.setprofile(before)
