"""`wan-patches verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import wan_patches
from wan_patches.cli import options, shared
from wan_patches.diagnostics.preflight import check_file


def verify(
    model: Annotated[
        str, typer.Argument(help="Model: a folder, a name on the Hub, or tiny:FAMILY (such as tiny:wan_t2v).")
    ],
    prompt: options.Prompt = None,
    image: Annotated[Path | None, typer.Option(help="Input image for image-to-video.")] = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; a few are enough.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    patches: options.Patches = None,
    fidelity: options.Fidelity = "exact",
    repeat: Annotated[int, typer.Option(min=0, help="Number of measured runs of each; 0 skips measuring.")] = 1,
    json: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write a report to.")] = None,
) -> None:
    """Run a model stock and patched and compare: bits of operations, blocks, stages and video; time and memory.

    Exits with status 0 if every bit is the same, and 1 if not; then it names the patch.
    Exits with status 2 if no conclusion is possible: an error, stock runs that differ, or no active patch.
    """
    width_height = options.size(size)
    if model.startswith("tiny:"):
        options.family(model.removeprefix("tiny:"), param_hint="model")
    shared.preflight(check_file, json, report)
    shared.check_patches(patches, fidelity)
    with shared.errors("verify"):
        from wan_patches.bench.demo import open_image
        from wan_patches.bench.measure import device_of, dtype_of
        from wan_patches.bench.verification import subject

        on, precision = device_of(device), dtype_of(dtype)
        photo = None if image is None else open_image(image)
        choice: dict[str, Any] = {"prompt": prompt, "size": width_height, "frames": frames, "steps": steps}
        with shared.progress("loading") as tell:
            found = subject(model, photo, on, precision, seed=seed, **choice)
            try:
                verification = wan_patches.verify(
                    found.pipe, patches=patches, fidelity=fidelity, repeat=repeat,
                    on_run=tell, **found.arguments(),
                )  # fmt: skip
            except Exception as error:  # raised by the pipeline itself with stock code
                shared.fail(f"{type(error).__name__}: {error}. Check that the model runs without wan-patches.")
    typer.echo(str(verification))
    written = shared.write((json, verification.save_json), (report, verification.save_html))
    if verification.verdict == "different":
        raise typer.Exit(1)
    if verification.undecided or not written:
        raise typer.Exit(2)
