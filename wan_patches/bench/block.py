"""Benchmarks one transformer block in every variant against the floor, and its rotary embedding alone.

In each variant, the block gets the arguments from the model's own forward: a patched forward may pass shorter ones.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from diffusers.utils.torch_utils import randn_tensor

import wan_patches
from wan_patches.bench import variants
from wan_patches.bench.floor import Copy
from wan_patches.bench.measure import generator, identical, in_turns, using_threads
from wan_patches.bench.parts import AttentionWithoutLayers
from wan_patches.bench.shapes import Shape, build, inputs

_ROTARY = 3  # position of the rotary tables among a block's arguments


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    seconds: float = 5.0,
    threads: int | None = None,
) -> variants.Result:
    """Measures the first block of a shape's model; see `variants.measure`."""
    shape = replace(shape, config={**shape.config, "num_layers": 1})
    with using_threads(threads), torch.no_grad(), variants.said_once():
        model = build(shape, device, dtype)
        arguments = inputs(shape, model, device, dtype)

        def make() -> variants.Call:
            args, kwargs = _handed(model, arguments)
            return lambda: model.blocks[0](*args, **kwargs)

        subject = variants.Subject(make, [model.blocks[0]])
        found = variants.measure("block", shape, subject, device, dtype, compiled=compiled, seconds=seconds)
        return replace(found, rope=_rope(shape, model, arguments, device, dtype, seconds))


class _Reached(Exception):
    """Raised when the model calls its first block."""


def _handed(model: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the model's call of its first block. A hook would get stock's arguments instead."""
    handed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(block: Any, *args: Any, **kwargs: Any) -> None:
        handed.append((args, kwargs))
        raise _Reached

    with mock.patch.object(type(model.blocks[0]), "__call__", stop), contextlib.suppress(_Reached):
        model(**arguments)
    return handed[0]


def _rope(
    shape: Shape, model: Any, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype, seconds: float
) -> variants.Rope:
    """Measures the self-attention processor of the block with no-op projections, norms and attention.

    Only the rotary embedding of queries and keys remains, whether stock's or a form.
    """
    attention = model.blocks[0].attn1
    width = attention.heads * (dim := model.config.attention_head_dim)
    drawing = generator(device)
    size = (1, shape.tokens, width)
    query, key = (randn_tensor(size, generator=drawing, device=device, dtype=dtype) for _ in range(2))
    around = AttentionWithoutLayers(attention.heads, query, key)

    @contextlib.contextmanager
    def of(choice: tuple[str, ...] | None) -> Iterator[None]:
        module = sys.modules[type(attention.processor).__module__]
        with wan_patches.enabled(choice), mock.patch.object(module, "dispatch_attention_fn", around.attend):
            yield

    def call(tables: Any) -> Callable[[], Any]:
        return lambda: attention.processor(around, key, None, None, tables)

    calls: dict[str, Callable[[], Any]] = {}
    contexts = {"stock": functools.partial(of, ()), "patched": functools.partial(of, None)}
    results: list[list[torch.Tensor]] = []
    for name, context in contexts.items():
        with context():
            args, _ = _handed(model, arguments)
            calls[name] = call(args[_ROTARY])
            calls[name]()  # on accelerators, the first-sight gate returns stock's result for the first call
            calls[name]()
            results.append(list(around.attended))
    copy = Copy(device, 2 * query.nbytes)
    copy()
    turns = in_turns({**calls, "copy": copy}, device, around=contexts, seconds=seconds)
    tables = shape.tokens * dim * 4  # bytes: half a cosine and half a sine per element, in float32
    return variants.Rope(
        gb=(4 * query.nbytes + tables) / 1e9,
        stock_ms=turns.seconds["stock"] * 1e3,
        patched_ms=turns.seconds["patched"] * 1e3,
        exact=identical(*results),
        copy_gb_s=copy.bytes / turns.seconds["copy"] / 1e9,
    )
