"""Subjects of `wan-patches verify`: a model by folder or name, or a tiny one that needs no weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from PIL import Image

from wan_patches.bench.demo import Subject, model_subject
from wan_patches.bench.measure import MeasurementError
from wan_patches.testing.families import FAMILIES, available

__all__ = ["subject"]

TINY = "tiny:"


def subject(
    model: str,
    image: Image.Image | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Subject:
    """Returns a pipeline and its arguments. `tiny:FAMILY` is a family in `wan_patches.testing`, with random weights.

    Raises:
        MeasurementError: the model is unknown, cannot be loaded, or requires an argument that is missing.
    """
    if model.startswith(TINY):
        return _tiny(model.removeprefix(TINY), image, device, dtype, prompt, size, frames, steps, seed)
    found = model_subject(model, image, device, dtype, prompt=prompt, size=size, frames=frames, steps=steps, seed=seed)
    given = found.arguments()
    needed = inspect.signature(found.pipe.__call__).parameters.values()
    named = (one for one in needed if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
    if missing := [one.name for one in named if one.default is one.empty and one.name not in given]:
        remedy = "give one with --image" if missing == ["image"] else "use wan_patches.verify(pipe, ...) in Python"
        raise MeasurementError(f"{type(found.pipe).__name__} also needs {' and '.join(missing)}: {remedy}.")
    return found


def _tiny(
    name: str,
    image: Image.Image | None,
    device: torch.device,
    dtype: torch.dtype,
    prompt: str | None,
    size: tuple[int, int] | None,
    frames: int | None,
    steps: int | None,
    seed: int,
) -> Subject:
    if name not in available():
        older = f" (diffusers {'.'.join(map(str, FAMILIES[name].since))} or newer has it)" if name in FAMILIES else ""
        raise MeasurementError(f"Unknown tiny model {name!r}{older}; known: {', '.join(available())}.")
    family = FAMILIES[name]
    pipe: Any = family.build(dtype=dtype, vae_dtype=dtype, seed=seed)
    pipe.to(device)
    more: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}

    def arguments() -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        return family.inputs(
            image=image, seed=seed, size=size, frames=frames, steps=steps or 2, generator=generator,
            output_type="pil", **more,
        )  # fmt: skip

    return Subject(TINY + name, pipe, arguments, image if "image" in family.takes else None)
