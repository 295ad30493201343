"""The first-sight gate by itself; the emulated accelerator runs it inside pipelines."""

from __future__ import annotations

import logging

import pytest
import torch

from wan_patches.fidelity import Fidelity, Gate, signature


def plus_one(x):
    return x + 1


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def run(gate, implementation, x, reference=plus_one):
    return gate("op", signature(x), implementation, reference, x)


def test_an_exact_implementation_runs_alone_after_first_sight():
    gate, ours, stock = Gate(), Counted(lambda x: 1 + x), Counted(plus_one)
    x = torch.randn(3)
    for _ in range(3):
        assert torch.equal(gate("op", signature(x), ours, stock, x), x + 1)
    assert (ours.calls, stock.calls) == (3, 1)
    gate("op", signature(x.double()), ours, stock, x.double())  # another dtype is another key
    assert stock.calls == 2
    assert [v.exact for v in gate.verdicts()] == [True, True]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: x + 1 + 1e-6, "differs"),
        (lambda x: (x + 1).double(), "differs"),
        (lambda x: (x + 1)[:1], "differs"),
        (lambda x: x.no_such_method(), "raised AttributeError"),
    ],
)
def test_what_differs_is_warned_about_once_and_stays_stock(wrong, reason, caplog):
    gate = Gate()
    with caplog.at_level(logging.WARNING, "wan_patches"):
        for size in (3, 3, 4):
            x = torch.randn(size)
            assert torch.equal(run(gate, wrong, x), x + 1)
    assert len(caplog.records) == 1
    assert [v.exact for v in gate.verdicts()] == [False, False]
    assert reason in gate.verdicts()[0].reason


def test_nan_where_stock_has_nan_is_exact():
    gate = Gate()
    run(gate, plus_one, torch.tensor([float("nan"), 1.0]))
    assert gate.verdicts()[0].exact


def test_out_of_memory_means_stock_and_no_verdict():
    def hungry(x):
        raise torch.OutOfMemoryError("planted")

    gate, x = Gate(), torch.randn(3)
    assert torch.equal(run(gate, hungry, x), x + 1)
    assert gate.verdicts() == []


def test_the_table_is_bounded():
    gate = Gate()
    gate.CAPACITY = 5
    for size in range(1, 20):
        run(gate, plus_one, torch.randn(size))
    assert len(gate.verdicts()) == 5


def test_without_the_gate_the_implementation_runs_unchecked():
    gate = Gate()
    gate.enabled = False
    assert torch.equal(run(gate, lambda x: x + 2, torch.zeros(1)), torch.full((1,), 2.0))


def test_errors_of_stock_reach_the_user():
    def stock(x):
        raise ValueError("bad input")

    with pytest.raises(ValueError, match="bad input"):
        run(Gate(), plus_one, torch.zeros(1), stock)


def test_fidelity_allows():
    assert Fidelity.CLOSE.allows(Fidelity.EXACT)
    assert not Fidelity.EXACT.allows(Fidelity.CLOSE)
    assert Fidelity("close") is Fidelity.CLOSE
