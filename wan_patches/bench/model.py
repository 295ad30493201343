"""Benchmarks one forward of a whole denoiser in every variant against the floor."""

from __future__ import annotations

from typing import Any

import torch

from wan_patches.bench import variants
from wan_patches.bench.measure import using_threads
from wan_patches.bench.shapes import Shape, build, inputs


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    regional: bool = False,
    seconds: float = 10.0,
    threads: int | None = None,
) -> variants.Result:
    """Measures a shape's model, called as its pipeline calls it; see `variants.measure`.

    With `regional`, the compiled variants compile the blocks, which share one graph, instead of the whole model.

    Per-token timesteps are an ordinary tensor here: only the pipeline knows that they hold two values.
    """
    with using_threads(threads):
        model = build(shape, device, dtype)
        arguments = inputs(shape, model, device, dtype)

        def make() -> variants.Call:
            return lambda: model(**arguments)[0]

        subject = variants.Subject(make, variants.compilable(model, regional))
        more: dict[str, Any] = {"compiled": compiled, "regional": regional, "seconds": seconds}
        return variants.measure("model", shape, subject, device, dtype, **more)
