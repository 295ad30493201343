"""The floor makes the calls that a forward makes, and no others."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter

import diffusers
import pytest
import torch
import torch.nn.functional as F

from wan_patches.bench import floor, shapes

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]
PER_BLOCK = 10  # projections of two attentions, and two of the feed-forward

pytestmark = pytest.mark.usefixtures("one_thread")


def _noted(name, backend=None):
    shape = shapes.shape_of(name, CPU, attention=backend)
    model = shapes.build(shape, CPU, torch.bfloat16)
    arguments = shapes.inputs(shape, model, CPU, torch.bfloat16)
    with torch.no_grad(), floor.recording() as steps:
        model(**arguments)
    return model, steps


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_product_and_attention_call_is_recorded_once(name):
    model, steps = _noted(name)
    kinds = Counter(step.kind for step in steps)
    # embeddings of time and text, those of time twice for history; patches; the last projection
    around = (2 + 1) * (2 if "helios" in name else 1) + 2 + (4 if "helios" in name else 1) + 1
    assert kinds == {"matmul": PER_BLOCK * len(model.blocks) + around, "attention": 2 * len(model.blocks)}
    used = {id(step.arguments[1]) for step in steps if step.function is F.linear}
    assert {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)} == used


@pytest.mark.parametrize("name", TINY)
def test_the_floor_repeats_the_recorded_calls(name):
    _, steps = _noted(name)
    again = floor.Floor(steps, CPU)
    with torch.no_grad(), floor.recording() as seen:
        again()

    def sort(steps):
        return [(step.kind, [x for x in (*step.arguments, *step.keywords.values()) if isinstance(x, floor._Like)])
                for step in steps]  # fmt: skip

    def matmuls(steps):
        return [step for step in sort(steps) if step[0] == "matmul"]

    assert matmuls(seen) == matmuls(steps)
    assert len(seen) == len(steps) == again.matmuls + again.attentions
    weights = [(s.arguments[1], t.arguments[1]) for s, t in zip(steps, seen) if s.function is F.linear]
    assert all(weight is same for weight, same in weights)


def test_attention_uses_the_selected_backend():
    _, steps = _noted("tiny", backend="_native_math")
    attention = [step for step in steps if step.kind == "attention"]
    assert {str(getattr(step.keywords["backend"], "value", "")) for step in attention} == {"_native_math"}
    _, steps = _noted("tiny")  # a separate model
    assert {step.keywords["backend"] for step in steps if step.kind == "attention"} == {None}
    active = diffusers.models.attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    assert str(active.value) == "native"


def test_inputs_of_a_call_do_not_share_memory_and_are_not_zero():
    queries = torch.randn(1, 2, 8, 16)
    with floor.recording() as steps:
        F.scaled_dot_product_attention(queries, queries.transpose(2, 3).contiguous().transpose(2, 3), queries + 1)
        F.linear(torch.ones(3, 16)[:, ::2], torch.nn.Parameter(torch.ones(2, 8)))
    (_, attention, _), (_, linear, _) = floor.Floor(steps, CPU)._calls
    starts = sorted(x.data_ptr() for x in attention)
    assert all(after - before >= queries.nbytes for before, after in itertools.pairwise(starts))
    assert attention[1].stride() == (256, 128, 1, 8)
    assert linear[0].stride() == (16, 2)
    assert all(x.std() > 0.1 for x in (*attention, linear[0]))


def test_diffusers_is_restored_after_an_error():
    module = importlib.import_module("diffusers.models.transformers.transformer_wan")
    stock = module.dispatch_attention_fn
    with pytest.raises(ZeroDivisionError), floor.recording():  # noqa: PT012
        assert module.dispatch_attention_fn is not stock
        _ = 1 / 0
    assert module.dispatch_attention_fn is stock


def test_a_copy_moves_every_byte_twice():
    copy = floor.Copy(CPU, 1024)
    copy()
    assert copy.bytes == 2048
    assert torch.equal(copy._target, copy._source)
