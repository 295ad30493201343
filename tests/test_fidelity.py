"""The first-sight gate by itself; the emulated accelerator runs it inside pipelines."""

from __future__ import annotations

import logging
import weakref
from typing import NamedTuple

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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("planted"), RuntimeError("NPU out of memory. Tried to allocate 2 GiB")]
)
def test_after_out_of_memory_an_implementation_is_not_tried_again(error):
    ours = Counted(lambda x: (_ for _ in ()).throw(error))
    gate, x = Gate(), torch.randn(3)
    for _ in range(3):
        assert torch.equal(run(gate, ours, x), x + 1)
    assert ours.calls == 1
    (verdict,) = gate.verdicts()
    assert not verdict.exact
    assert "no memory" in verdict.reason


@pytest.mark.parametrize("fails", ["implementation", "reference", "comparison"])
def test_out_of_memory_holds_on_to_nothing(fails):
    """Stock runs when what had been made until then is gone: it may need that memory."""
    made, alive = [], []

    def keep(x):
        made.append(weakref.ref(x))
        return x

    def give_up():
        raise torch.OutOfMemoryError("planted")

    def ours(x):
        result = keep(x + 1)
        return give_up() if fails == "implementation" else result

    def stock(x):
        alive.append(sum(tensor() is not None for tensor in made))
        if fails == "reference" and len(alive) == 1:
            give_up()
        return x + 1

    gate, x = Gate(), torch.randn(3)
    result = gate("op", signature(x), ours, stock, x, agree=lambda ours, stock: give_up())
    assert torch.equal(result, x + 1)
    assert len(alive) == (2 if fails == "reference" else 1)
    assert alive[-1] == (fails == "comparison")
    assert [tensor() for tensor in made] == [None]


def test_the_users_own_shortage_of_memory_reaches_the_user():
    def stock(x):
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        run(Gate(), plus_one, torch.randn(3), stock)


class Rows(NamedTuple):
    rows: torch.Tensor
    border: int


NAN = float("nan")


@pytest.mark.parametrize(
    "gate_rows",
    [
        torch.zeros(40),
        torch.ones(40),
        torch.full((40,), NAN),
        torch.eye(7)[0].repeat(6)[:40] * 0,
        torch.zeros(1).expand(40),
    ],
    ids=["zeros", "ones", "nan", "-0", "expanded"],
)
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Rows(rows, 3)], ids=["tensor", "tuple"])
def test_values_that_would_let_anything_pass_prove_nothing(gate_rows, wrap):
    """Zeros are what a model has before it is trained, and what servers warm up with."""

    def scaled(x, by):
        return x * (by.rows if isinstance(by, Rows) else by)

    def wrong(x, by):
        rows = by.rows if isinstance(by, Rows) else by
        return torch.where(rows == 0, rows, torch.where(rows == 1, x, x * rows + 1))

    x = torch.randn(3, 40)
    for ours, exact in ((wrong, False), (scaled, True)):
        gate = Gate()
        result = gate("op", (), ours, scaled, x, wrap(gate_rows))
        assert torch.equal(result.nan_to_num(), scaled(x, gate_rows).nan_to_num())
        assert [verdict.exact for verdict in gate.verdicts()] == [exact]


def test_what_is_tried_instead_has_the_layout_of_the_arguments():
    x = torch.zeros(4, 6, dtype=torch.bfloat16)[:, ::2].t()
    seen = []

    def ours(x):
        seen.append((x.shape, x.stride(), x.dtype, x.device))
        return x + 1

    state = torch.get_rng_state()
    assert torch.equal(run(Gate(), ours, x), x + 1)
    assert seen == [(x.shape, x.stride(), x.dtype, x.device)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.any()


def test_a_close_implementation_waits_for_values_that_tell():
    gate = Gate()
    ours = Counted(plus_one)
    for x in (torch.zeros(30), torch.zeros(30), torch.randn(30)):
        gate("op", (), ours, plus_one, x, agree=torch.equal, fidelity=Fidelity.CLOSE)
    assert ours.calls == 1
    assert len(gate.verdicts()) == 1


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
