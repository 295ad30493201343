"""The dispatcher in isolation: decisions, their keys, and the verification of forms."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch.fx.experimental.proxy_tensor import make_fx

from wan_patches.ops import dispatch, proof
from wan_patches.ops.dispatch import ACCELERATOR, BLIND, OBSERVED, SMALL, at_any_size, key_of, op, rechecking
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity, gate

NAN = float("nan")


@pytest.fixture(autouse=True)
def _isolated_ops(monkeypatch):
    """Those that tests make are forgotten."""
    monkeypatch.setattr(dispatch, "_ops", list(dispatch._ops))
    monkeypatch.setattr(gate, "_deciders", list(gate._deciders))
    monkeypatch.setattr(tally, "paths", dict(tally.paths))
    monkeypatch.setattr(gate, "_enabled", True)


@pytest.fixture
def fake_accelerator(monkeypatch):
    """Tensors on the CPU pass for such on an accelerator."""
    monkeypatch.setattr(dispatch, "_device", lambda args: torch.device("cuda"))


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def plus_one(x):
    return x + 1


def made(form=None, reference=plus_one, device=ACCELERATOR, name="ours", **options):
    """An op of that reference, and of that form, with calls counted."""
    reference = Counted(reference)
    reference.__module__, reference.__qualname__ = __name__, "plus_one"
    made = op("plus one", **options)(reference)
    return made, (None if form is None else made.form(name, device)(Counted(form))), reference


def ways():
    return {(way.form, way.reason): calls for way, calls in tally.counted().items()}


# Decisions


def test_verified_form_runs_without_the_reference(fake_accelerator):
    add, form, reference = made(lambda x: 1 + x)
    x = torch.randn(3)
    for _ in range(3):
        assert torch.equal(add(x), x + 1)
    assert (form.function.calls, reference.calls) == (3, 1)
    add(x.double())  # another dtype is another key
    assert reference.calls == 2
    assert [(verdict.op, verdict.form, verdict.exact) for verdict in gate.verdicts()] == [
        ("plus one", "ours", True)
    ] * 2
    assert ways() == {("", tally.FIRST_SIGHT): 2, ("ours", ""): 2}


def test_cpu_forms_need_no_verification():
    add, form, reference = made(lambda x: 1 + x, device="cpu")
    for _ in range(3):
        add(torch.randn(3))
    assert (form.function.calls, reference.calls) == (3, 0)
    assert ways() == {("ours", ""): 3}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: x + 1 + 1e-6, "differs"),
        (lambda x: (x + 1).double(), "differs"),
        (lambda x: (x + 1)[:1], "differs"),
        (lambda x: (x + 1, x), "differs"),
        (lambda x: x.no_such_method(), "raised AttributeError"),
    ],
)
def test_differing_form_is_warned_about_once_and_not_used(wrong, reason, caplog, fake_accelerator):
    add, form, _ = made(wrong)
    with caplog.at_level(logging.WARNING, "wan_patches"):
        for size in (3, 3, 4):
            x = torch.randn(size)
            assert torch.equal(add(x), x + 1)
    assert len(caplog.records) == 1
    assert [verdict.exact for verdict in gate.verdicts()] == [False, False]
    assert reason in gate.verdicts()[0].reason
    assert form.function.calls == 2
    assert {why for _, why in ways()} == {f"ours {gate.verdicts()[0].reason}"}


def test_next_form_is_tried_if_one_fails(fake_accelerator):
    add, broken, reference = made(lambda x: x.no_such_method(), name="broken")
    wrong = add.form("wrong", ACCELERATOR)(Counted(lambda x: x + 2))
    right = add.form("right", ACCELERATOR)(Counted(lambda x: 1 + x))
    x = torch.randn(3)
    for _ in range(3):
        assert torch.equal(add(x), x + 1)
    assert [form.function.calls for form in (broken, wrong, right)] == [1, 1, 3]
    assert reference.calls == 1
    assert [verdict.exact for verdict in gate.verdicts()] == [False, False, True]


@pytest.mark.parametrize(
    ("confirmation", "reason"),
    [(lambda x: False, "differs"), (lambda x: x.no_such_method(), "raised AttributeError"), (lambda x: True, "")],
)
def test_form_is_used_only_if_it_is_confirmed(confirmation, reason, fake_accelerator):
    add, form, _ = made(lambda x: 1 + x)
    form.confirms(counted := Counted(confirmation))
    for _ in range(3):
        add(torch.randn(3))
    (verdict,) = gate.verdicts()
    assert verdict.exact == (not reason)
    assert reason in verdict.reason
    assert counted.calls == 1  # once per key
    assert form.function.calls == (1 if reason else 3)


def test_confirmation_is_asked_about_values_that_tell_something(fake_accelerator):
    """Of zeros, which any form could compute, the gate tries random ones."""
    add, form, _ = made(lambda x: 1 + x)
    form.confirms(lambda x: bool((x == 0).all()))
    add(torch.zeros(64))
    (verdict,) = gate.verdicts()
    assert not verdict.exact


def test_forms_are_for_devices(monkeypatch):
    add, _, _ = made(plus_one, device="cpu")
    others = {device: add.form(str(device), device)(Counted(plus_one)) for device in ("cuda", "npu", ACCELERATOR, None)}
    for device, expected in (("cpu", ["ours", None]), ("npu", ["npu", ACCELERATOR, None]), ("meta", [None])):
        assert [form.name for form in add._forms_on(device)] == [str(name) for name in expected]
    assert [form.name for form in add._forms_on("xpu")] == [ACCELERATOR, "None"]
    assert add._forms_on("cuda") == [others["cuda"], others[ACCELERATOR], others[None]]


def test_refusals_are_queried_once_per_key_and_reported(fake_accelerator):
    add, form, reference = made(lambda x: 1 + x)
    asked = []
    form.refuses(lambda x: asked.append(1) or ("too long" if x.shape[0] > 3 else None))
    for size in (3, 4, 3, 4, 4):
        add(torch.randn(size))
    assert len(asked) == 2
    assert ways() == {("", tally.FIRST_SIGHT): 1, ("ours", ""): 1, ("", "too long"): 3}
    assert reference.calls == 4


def test_refusal_that_raises_is_a_reason():
    add, form, _ = made(plus_one, device="cpu")
    form.refuses(lambda x: 1 / 0)
    assert torch.equal(add(torch.zeros(1)), torch.ones(1))
    ((_, reason),) = ways()
    assert "ZeroDivisionError" in reason


def test_small_inputs_use_the_reference_before_any_query():
    add, form, _ = made()
    form = add.form("ours", "cpu", smallest=10)(Counted(plus_one))
    form.refuses(lambda x: pytest.fail("asked"))
    add(torch.zeros(9))
    assert ways() == {("", SMALL): 1}
    assert not add.decisions()
    form.refuses(lambda x: None)
    add(torch.zeros(10))
    with at_any_size():
        add(torch.zeros(9))
    add(torch.zeros(9))
    assert ways() == {("", SMALL): 2, ("ours", ""): 2}


def test_fp32_has_its_own_limit():
    add, _, _ = made()
    add.form("ours", "cpu", smallest=10, smallest_in_fp32=20)(plus_one)
    for dtype, size in ((torch.bfloat16, 9), (torch.bfloat16, 10), (torch.float32, 19), (torch.float32, 20)):
        x = torch.zeros(size, dtype=dtype)
        assert add.why_small(x) == (SMALL if size in (9, 19) else None)
        assert add.least_for(x) == (20 if dtype == torch.float32 else 10)
        add(x)
    assert ways() == {("", SMALL): 2, ("ours", ""): 2}
    with at_any_size():
        assert add.least_for(torch.zeros(1)) == 0


def test_the_table_is_bounded(monkeypatch, fake_accelerator):
    monkeypatch.setattr(dispatch, "CAPACITY", 5)
    add, _, _ = made(plus_one)
    for size in range(1, 20):
        add(torch.randn(size))
    assert len(add.decisions()) == 5
    assert sum(ways().values()) == 19  # the totals are not


def test_threads_count_every_call(monkeypatch):
    class Slow(dict):  # another thread comes in between
        def get(self, *args):
            value = super().get(*args)
            time.sleep(0)
            return value

    monkeypatch.setattr(tally, "_counts", Slow())
    add, _, _ = made(plus_one, device="cpu")
    xs = [torch.zeros(size) for size in range(1, 9)]

    def work():
        for _ in range(50):
            for x in xs:
                add(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ways() == {("ours", ""): 4 * 50 * 8}


# Keys


class Rows(NamedTuple):
    rows: torch.Tensor
    split_index: int


def _tensors():
    x = torch.zeros(4, 6)
    return {
        "shape": x[:2],
        "strides": torch.zeros(6, 4).t(),
        "dtype": x.half(),
        "alignment": torch.zeros(25)[1:].view(4, 6),
        "negated": torch.zeros(4, 6)._neg_view(),
    }


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("what", _tensors())
def test_keys_distinguish_tensors(what, on_cpu, monkeypatch):
    """Kernels of accelerators read memory as it is, torch's operations on CPUs do not."""
    describe = dispatch._describe
    monkeypatch.setattr(
        dispatch, "_describe", lambda values, found, gradients: describe(values, found, gradients, on_cpu)
    )
    x = torch.zeros(4, 6)
    assert (key_of(x, 1) == key_of(_tensors()[what], 1)) == (on_cpu and what in ("alignment", "negated"))
    assert key_of(x, 1) == key_of(torch.ones(4, 6), 1)


def test_keys_distinguish_values():
    x = torch.zeros(2)
    norm = torch.nn.LayerNorm(2)
    values = (
        None, 0, False, 0.0, 1, True, "a", torch.float32, torch.device("cpu"), Rows(x, 1), Rows(x, 2), (x, 1), norm,
        torch.nn.LayerNorm(2, eps=1e-3), torch.nn.LayerNorm(2, elementwise_affine=False), torch.nn.LayerNorm(2).half(),
    )  # fmt: skip
    with torch.no_grad():
        keys = [key_of(x, value) for value in values]
        assert len(set(keys)) == len(values)
        assert key_of(x, torch.nn.LayerNorm(2)) == key_of(x, norm)


@pytest.mark.parametrize("change", ["threads", "deterministic", "cudnn"])
def test_keys_contain_torch_settings(change):
    x, threads = torch.zeros(2, device="cpu" if change == "threads" else "meta"), torch.get_num_threads()
    before = key_of(x)
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        elif change == "deterministic":
            torch.use_deterministic_algorithms(True)
        else:
            torch.backends.cudnn.deterministic = True
        assert key_of(x) != before
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("key", [lambda x: (x.shape, x.dtype), lambda x: (x.stride(), x.dtype)])
def test_incomplete_key_is_detected(key):
    """Of strides, or of shapes."""
    add, form, _ = made(plus_one, device="cpu", key=key)
    form.refuses(lambda x: None if x.is_contiguous() and x.shape[0] < 5 else "not for this form")
    with rechecking():
        add(torch.zeros(4, 4))
        for x in (torch.zeros(4, 4).t(), torch.zeros(5, 4)):
            if key(x) == key(torch.zeros(4, 4)):
                with pytest.raises(AssertionError, match="refuses what its key allows"):
                    add(x)


def test_form_refused_by_its_key_is_detected():
    add, form, _ = made(plus_one, device="cpu", key=lambda x: (x.dtype,))
    form.refuses(lambda x: "too long" if x.shape[0] > 3 else None)
    with rechecking():
        add(torch.zeros(4))
        with pytest.raises(AssertionError, match="takes what its key refuses"):
            add(torch.zeros(3))


def test_form_that_is_wrong_for_some_values_is_detected():
    add, _, _ = made(lambda x: x + 1 + (x > 3), device="cpu")
    with rechecking():
        add(torch.tensor([1.0, 2.0]))
        add(torch.tensor([1.0, 2.0]))
        with pytest.raises(AssertionError, match="differs"):
            add(torch.tensor([1.0, 4.0]))


def test_arguments_without_a_key_use_the_reference():
    add, _, _ = made(lambda x, norm: pytest.fail("a form ran"), lambda x, norm: norm(x), device="cpu")
    assert torch.equal(add(torch.zeros(2), lambda x: x + 1), torch.ones(2))
    assert ways() == {("", OBSERVED): 1}
    assert key_of(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])) is None


# Whoever looks into the operations


def _sees_traced(call):
    add, _, _ = made(lambda x: pytest.fail("a form ran"), device="cpu")
    add.trace(lambda x: x + 1.0)
    call(add)
    assert not add.decisions()
    return ways()


def test_autograd_sees_the_traced_form():
    assert _sees_traced(lambda add: add(torch.zeros(2, requires_grad=True)).sum().backward()) == {("", OBSERVED): 1}


def test_tracers_and_transforms_see_the_traced_form():
    assert _sees_traced(lambda add: make_fx(add)(torch.zeros(2)))
    assert _sees_traced(lambda add: torch.func.vmap(add)(torch.zeros(2, 3)))
    assert _sees_traced(lambda add: torch.func.jvp(add, (torch.zeros(2),), (torch.ones(2),)))


def test_subclasses_and_autocast_see_the_traced_form():
    class Mine(torch.Tensor):
        pass

    assert _sees_traced(lambda add: add(torch.zeros(2).as_subclass(Mine)))
    with torch.autocast("cpu"):
        assert _sees_traced(lambda add: add(torch.zeros(2)))


def test_default_device_is_not_a_tracer():
    add, form, _ = made(plus_one, device="cpu")
    with torch.device("cpu"):
        add(torch.zeros(2))
    assert form.function.calls == 1


def test_compilers_see_the_traced_form_in_one_graph_without_recompiling():
    torch._dynamo.reset()
    add, _, _ = made(lambda x: pytest.fail("a form ran"), lambda x: x + 1, device="cpu")
    add.reference = add.traced = plus_one
    compiles = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: add(x) * 2, backend=compiles, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))
    assert compiles.frame_count == 1
    assert not ways()
    torch._dynamo.reset()


def test_nothing_is_verified_during_graph_capture(monkeypatch, fake_accelerator):
    monkeypatch.setattr(dispatch, "AGAIN", 1)  # nor proved again
    add, form, reference = made(plus_one)
    seen, new = torch.randn(3), torch.randn(4)
    add(seen)
    monkeypatch.setattr(proof, "is_capturing", lambda: True)
    for x in (seen, new, new):
        assert torch.equal(add(x), x + 1)
    assert (form.function.calls, reference.calls) == (2, 3)
    assert len(add.decisions()) == 1
    monkeypatch.setattr(proof, "is_capturing", lambda: False)
    add(new)
    assert len(add.decisions()) == 2


# Proofs


def test_nan_equal_to_stock_is_exact(fake_accelerator):
    made(plus_one)[0](torch.tensor([NAN, 1.0, 2.0]))
    assert gate.verdicts()[0].exact


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("planted"), RuntimeError("NPU out of memory. Tried to allocate 2 GiB")]
)
def test_after_out_of_memory_a_form_is_not_tried_again(error, fake_accelerator):
    add, form, _ = made(lambda x: (_ for _ in ()).throw(error))
    x = torch.randn(3)
    for _ in range(3):
        assert torch.equal(add(x), x + 1)
    assert form.function.calls == 1
    (verdict,) = gate.verdicts()
    assert not verdict.exact
    assert "no memory" in verdict.reason


@pytest.mark.parametrize("fails", ["form", "reference", "comparison"])
def test_out_of_memory_keeps_no_memory_alive(fails, fake_accelerator):
    """Stock runs when what had been made until then is gone: it may need that memory."""
    results, alive = [], []

    def keep(x):
        results.append(weakref.ref(x))
        return x

    def give_up(*args):
        raise torch.OutOfMemoryError("planted")

    def ours(x):
        result = keep(x + 1)
        return give_up() if fails == "form" else result

    def stock(x):
        alive.append(sum(tensor() is not None for tensor in results))
        if fails == "reference" and len(alive) == 1:
            give_up()
        return x + 1

    add, _, _ = made(ours, stock, agree=give_up if fails == "comparison" else None)
    x = torch.randn(3)
    assert torch.equal(add(x), x + 1)
    assert len(alive) == (2 if fails == "reference" else 1)
    assert alive[-1] == (fails == "comparison")
    assert [tensor() for tensor in results] == [None]


def test_out_of_memory_of_the_reference_propagates(fake_accelerator):
    def stock(x):
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        made(plus_one, stock)[0](torch.randn(3))


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("form", [plus_one, lambda x: x.no_such_method()])
def test_errors_of_stock_propagate_and_no_form_is_rejected(device, form, monkeypatch):
    if device != "cpu":
        monkeypatch.setattr(dispatch, "_device", lambda args: torch.device("cuda"))

    def stock(x):
        raise ValueError("bad input")

    add, _, _ = made(form, stock, device=device)
    if device != "cpu" or form is not plus_one:
        with pytest.raises(ValueError, match="bad input"):
            add(torch.zeros(1))
        assert not add.decisions()


@pytest.mark.parametrize(
    "rows",
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
def test_uninformative_values_do_not_verify_a_form(rows, wrap, fake_accelerator):
    """Zeros are what a model has before it is trained, and what servers warm up with."""

    def scaled(x, by):
        return x * (by.rows if isinstance(by, Rows) else by)

    def wrong(x, by):
        rows = by.rows if isinstance(by, Rows) else by
        return torch.where(rows == 0, rows, torch.where(rows == 1, x, x * rows + 1))

    x = torch.randn(3, 40)
    for ours, exact in ((wrong, False), (scaled, True)):
        gate.reset()
        scale, _, _ = made(ours, scaled)
        assert torch.equal(scale(x, wrap(rows)).nan_to_num(), scaled(x, rows).nan_to_num())
        assert [verdict.exact for verdict in scale.verdicts()] == [exact]


def test_substituted_values_have_the_layout_of_the_arguments(fake_accelerator):
    x = torch.zeros(4, 6, dtype=torch.bfloat16)[:, ::2].t()
    seen = []

    def ours(x):
        seen.append((x.shape, x.stride(), x.dtype, x.device))
        return x + 1

    state = torch.get_rng_state()
    assert torch.equal(made(ours)[0](x), x + 1)
    assert seen == [(x.shape, x.stride(), x.dtype, x.device)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.any()


def test_close_form_waits_for_informative_values(fake_accelerator):
    add, form, _ = made(plus_one, agree=lambda ours, stock, x: torch.equal(ours, stock), fidelity=Fidelity.CLOSE)
    for x in (torch.zeros(30), torch.zeros(30), torch.randn(30)):
        add(x)
    assert form.function.calls == 1
    assert len(gate.verdicts()) == 1
    assert ways() == {("", BLIND): 2, ("", tally.FIRST_SIGHT): 1}


def test_non_tensor_arguments_can_be_uninformative(fake_accelerator):
    add, form, _ = made(plus_one, tells_nothing=lambda x: bool(x.isnan().any()))
    add(torch.tensor([NAN, 1.0, 2.0]))
    assert form.function.calls == 0
    assert not add.decisions()


def test_verification_is_repeated_on_later_values(monkeypatch, fake_accelerator):
    """A form that is right for the first values only."""
    monkeypatch.setattr(dispatch, "AGAIN", 4)
    add, form, _ = made(lambda x: x + 1 + (x > 3))
    add(torch.tensor([1.0, 2.0, 0.5]))
    x = torch.tensor([1.0, 2.0, 4.0])
    results = [torch.equal(add(x), x + 1) for _ in range(8)]
    assert results == [False] * 3 + [True] * 5
    assert form.function.calls == 5
    assert [verdict.exact for verdict in gate.verdicts()] == [True, False]


def test_form_survives_out_of_memory_in_a_later_verification(monkeypatch, fake_accelerator):
    monkeypatch.setattr(dispatch, "AGAIN", 2)
    short = []

    def stock(x):
        if short:
            raise torch.OutOfMemoryError("planted")
        return x + 1

    add, form, _ = made(lambda x: 1 + x, stock)
    x = torch.randn(3)
    add(x)
    short.append(1)
    for _ in range(3):
        assert torch.equal(add(x), x + 1)
    assert form.function.calls == 1 + 3 + 1
    assert ways()["ours", ""] == 3


def test_without_the_gate_forms_run_unchecked_until_it_returns(fake_accelerator):
    add, _, reference = made(lambda x: x + 2)
    gate.enabled = False
    for _ in range(2):
        assert torch.equal(add(torch.zeros(3)), torch.full((3,), 2.0))
    assert reference.calls == 0
    assert [decision.proved for decision in add.decisions().values()] == [False]
    gate.enabled = True
    assert not add.decisions()
    assert torch.equal(add(torch.zeros(3)), torch.ones(3))


def test_fidelity_allows():
    assert Fidelity.CLOSE.allows(Fidelity.EXACT)
    assert not Fidelity.EXACT.allows(Fidelity.CLOSE)
    assert Fidelity("close") is Fidelity.CLOSE


@pytest.mark.parametrize("dim", [512, 5120])
def test_orders_of_additions_differ_in_nearly_all_rows_for_comparisons(dim):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rows = proof.rows_that_tell_orders(dim, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert rows.shape == (1, proof.ROWS, dim)

    def normed(mean, square):
        return (rows - mean) * torch.rsqrt(square + 1e-6)

    mean = rows.mean(-1, keepdim=True)
    mirrored = rows.flip(-1).mean(-1, keepdim=True)
    squares = (rows - mean).square().mean(-1, keepdim=True)
    other = (rows - mirrored).square().flip(-1).mean(-1, keepdim=True)
    differs = (normed(mean, squares) != normed(mirrored, other)).any(-1)
    assert differs.float().mean() > 0.5
