"""Small tensors kept on both host and device, against torch's results for the same values."""

from __future__ import annotations

import gc
import itertools
import math
import random

import pytest
import torch

from wan_patches.ops import step_loop

CPU = torch.device("cpu")


class Owner:
    pass


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)


SPECIAL = [0.0, -0.0, 1.0, 0.5, 1 / 3, -2.7e-9, 1e-45, 1e30, math.inf, -math.inf]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_equal_torch_tensor(default, dtype, request):
    before = torch.get_default_dtype()
    request.addfinalizer(lambda: torch.set_default_dtype(before))
    torch.set_default_dtype(default)
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    for first, second in itertools.product(kinds, kinds):
        values = [torch.tensor(v, dtype=first) for v in SPECIAL] + [torch.tensor(1.1, dtype=second), 1.0, 0.1]
        assert same(step_loop.numbers(values, CPU, dtype), torch.tensor(values, dtype=dtype))
        elsewhere = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in values]
        assert step_loop.numbers(elsewhere, torch.device("meta"), dtype).dtype == (
            dtype or torch.tensor(values, device="cpu").dtype
        )
    assert same(step_loop.numbers([0.5], CPU, dtype), torch.tensor([0.5], dtype=dtype))
    assert same(step_loop.numbers([0, 1, 7], CPU, torch.long), torch.tensor([0, 1, 7]))


def test_copy_is_made_once_per_values_and_freed_with_its_owner(monkeypatch):
    made = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, copy: made.append(1) or self.clone())
    owner, other, values = Owner(), Owner(), torch.tensor([1.0, 0.5, 0.0])
    first = step_loop.on_device(owner, values, CPU)
    assert first is not values
    assert step_loop.on_device(owner, values.clone(), CPU) is first
    assert len(made) == 1
    values[1] = 0.25  # written to: another copy
    assert torch.equal(step_loop.on_device(owner, values, CPU), values)
    assert step_loop.on_device(owner, values.double(), CPU).dtype == torch.float64
    assert step_loop.on_device(other, values, CPU) is not first
    assert len(made) == 4
    for nth in range(2 * step_loop.CAPACITY):
        step_loop.on_device(owner, values + nth, CPU)
    assert len(step_loop._copies[owner]) == step_loop.CAPACITY
    known = len(step_loop._copies)
    del owner, other
    gc.collect()
    assert len(step_loop._copies) == known - 2


def test_moved_values_are_known_until_modified():
    values = torch.tensor([9, 5, 1])
    made = step_loop.moved(Owner(), values, CPU)
    again = step_loop.moved(Owner(), values, CPU)
    assert same(made, values)
    assert made.data_ptr() not in (values.data_ptr(), again.data_ptr())
    assert torch.equal(step_loop.noted(made), values)
    values[0] = 4  # the host's tensor is not what was moved
    assert step_loop.noted(made)[0] == 9
    made[1:][0] = 7  # through a view
    assert step_loop.noted(made) is None
    assert step_loop.on_host(made).tolist() == [9, 7, 1]
    step_loop.note(made, torch.tensor([9, 7, 2]), exact=False)
    assert step_loop.noted(made) is None
    assert step_loop.noted(made, exact=False)[2] == 2
    assert step_loop.on_host(made)[2] == 1


def test_inference_mode():
    with torch.inference_mode():
        untracked = torch.tensor([3.0, 2.0])
        assert step_loop.on_host(untracked) is None
        step_loop.note(untracked, untracked)
        assert step_loop.noted(untracked) is None
        made = step_loop.moved(Owner(), untracked, CPU)
        assert not made.is_inference()
        assert torch.equal(step_loop.noted(made), untracked)
        made[1].add_(1)  # a write that is noticed here as well
        assert step_loop.noted(made) is None
        assert not step_loop.on_host(made).is_inference()
    weight = torch.ones(2, requires_grad=True)
    (weight * made).sum().backward()  # can be saved for the backward pass
    assert weight.grad.tolist() == [3.0, 3.0]


def test_position():
    timesteps = torch.arange(10.0)
    elements = list(timesteps)
    assert [step_loop.position(timesteps, t) for t in elements] == list(range(10))
    part = timesteps[4::2]
    assert [step_loop.position(part, t) for t in part] == [0, 1, 2]
    assert step_loop.position(part, elements[4]) == 0
    for foreign in (elements[5], elements[3], torch.tensor(4.0), elements[4].double(), timesteps[4:5]):
        assert step_loop.position(part, foreign) is None
    assert step_loop.position(timesteps[:0], elements[0]) is None
    assert step_loop.position(timesteps[:1].expand(3), elements[0]) is None


def matrix(values, order):
    """The matrix of UniPC, in single precision, with errors in its entries as those of another device."""
    *before, base, last = values
    nodes = [(value - base) / (last - base) for value in reversed(before)] + [1.0]
    nodes = [node * (1 + random.uniform(-1, 1) * 1e-5) for node in nodes[-order:-1]] + [1.0]
    rows = torch.tensor(nodes, dtype=torch.float32)
    return torch.stack([rows**power for power in range(len(nodes))])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_matrices_of_apart_steps_are_never_singular(order):
    random.seed(order)
    passed = 0
    for _ in range(4000):
        values = [random.uniform(-9, 2)]
        for _ in range(order):
            values.append(values[-1] + 10 ** random.uniform(-5, 2) * random.choice([1, 1, 1, -1, 0]))
        if not step_loop.apart(values):
            continue
        passed += 1
        full = matrix(values, order)
        for square in (full, full[:-1, :-1]):
            if square.numel():
                solution, info = torch.linalg.solve_ex(square, torch.ones(len(square)))
                assert info == 0, values
                assert solution.isfinite().all(), values
    assert passed > 200


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 2.0], [0.0, 1.0, math.inf], [-math.inf, 0.0, 1.0],
        [0.0, math.nan, 1.0], [0.0, 1e-4, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.0015, 1.0, 2.0],
    ],
)  # fmt: skip
def test_close_steps_are_not_apart(values):
    assert not step_loop.apart(values)
    assert step_loop.apart([0.0, 1.0, 2.5, 3.0])
