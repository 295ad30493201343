"""`wan-patches demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wan_patches.cli import options, shared
from wan_patches.diagnostics.preflight import check_folder
from wan_patches.tables import text


def demo(
    image: Annotated[Path | None, typer.Option(help="Input photo; default: one from matplotlib's sample data.")] = None,
    model: Annotated[str | None, typer.Option(help="Model with real weights: a folder, or a name on the Hub.")] = None,
    prompt: options.Prompt = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    out: Annotated[Path, typer.Option(help="Folder for the videos and the contact sheet.")] = Path("wan-patches-demo"),
    seed: options.Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measured runs of each, after one warm-up run.")] = 3,
) -> None:
    """Run pipelines stock and patched, side by side: times, bit equality, videos, a contact sheet.

    Without --model, runs small pipelines of the real architectures with random weights.
    Exits with status 1 if a single bit differs.
    """
    width_height = options.size(size)
    if model is None and any(side % 16 for side in width_height or ()):
        raise typer.BadParameter("width and height have to be multiples of 16", param_hint="--size")
    shared.preflight(check_folder, out)
    with shared.errors("demo"):
        from wan_patches.bench import demo as run
        from wan_patches.bench.measure import device_of, dtype_of

        on, precision = device_of(device), dtype_of(dtype)
        photo = run.open_image(image or run.default_photo())
        choice: dict[str, Any] = {"prompt": prompt, "size": width_height, "frames": frames}
        choice |= {"steps": steps, "seed": seed}
        if model is None:
            subjects = run.small_subjects(photo, on, precision, **choice)
        else:
            subjects = [lambda: run.model_subject(model, photo, on, precision, **choice)]
        comparisons = run.demo(subjects, on, out, repeats=repeats)
    typer.echo(text(run.table(comparisons)))
    typer.echo(f"Videos and contact-sheet.png were written to {out}")
    if wrong := run.verdict(comparisons):
        shared.fail(wrong, 1)
