"""The command line: `wan-patches`, or `python -m wan_patches`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import wan_patches
from wan_patches.tables import text

# Commands import torch and diffusers when they run: `--help` must be fast.

app = typer.Typer(
    name="wan-patches", help="Faster Wan and Helios pipelines, with the same bits.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
bench = typer.Typer(help="Measures what this package does against what was there before.", no_args_is_help=True)
app.add_typer(bench, name="bench")

# What an extra of this package brings, as far as the command needs it.
_NEEDS = {
    "demo": ("transformers", "accelerate", "ftfy", "av"),
    "bench": ("transformers", "accelerate", "ftfy", "psutil"),
}


def main() -> None:
    """The console command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(wan_patches.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def status(
    import_: Annotated[
        bool, typer.Option("--import", help="Import the modules that patches are for, to see how each fares.")
    ] = False,
) -> None:
    """Enable all patches and print what became of each."""
    found = wan_patches.enable()
    if import_:
        for module in sorted({report.module for report in found.reports}):
            with contextlib.suppress(ModuleNotFoundError):  # the installed version has no such module
                importlib.import_module(module)
    typer.echo(str(wan_patches.status()))


@app.command()
def demo(
    image: Annotated[
        Optional[Path], typer.Option(help="A photograph; by default one from matplotlib's sample data.")  # noqa: UP045
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Real weights: a folder, or a name on the Hub.")  # noqa: UP045
    ] = None,
    prompt: Annotated[Optional[str], typer.Option(help="What the video shows.")] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT of the video.")] = None,  # noqa: UP045
    frames: Annotated[Optional[int], typer.Option(min=1, help="Frames of the video.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Denoising steps.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    out: Annotated[Path, typer.Option(help="Folder for the videos and the contact sheet.")] = Path("wan-patches-demo"),
    seed: Annotated[int, typer.Option(help="Of the noise, and of random weights.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each, after one to warm up.")] = 3,
) -> None:
    """Run pipelines stock and patched, side by side: times, equal bits, videos, a contact sheet.

    Without --model these are small pipelines of the real architectures with random weights. Exits with status 1 if a
    single bit differs.
    """
    width_height = _size(size)
    with _errors("demo"):
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
    typer.echo(f"Videos and contact-sheet.png are in {out}")
    if wrong := run.verdict(comparisons):
        _fail(wrong)


@bench.command()
def ops(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="Smaller shapes, shorter runs.")] = False,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Threads of torch on the CPU.")] = None,  # noqa: UP045
) -> None:
    """Each operation by itself: time, memory, equal bits. Exits with status 1 if a single bit differs."""
    with _errors("bench"):
        from wan_patches.bench import ops as run
        from wan_patches.bench.measure import device_of, dtype_of

        rows = run.measure(device_of(device), dtype_of(dtype), quick=quick, threads=threads)
        typer.echo(text(run.table(rows)))
        if json is not None:
            run.write_json(json, rows, device_of(device), threads)
    if different := [f"{row.op} {row.shape}" for row in rows if not row.exact]:
        _fail(f"NOT bit-identical: {'; '.join(different)}.")


@bench.command()
def overhead(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes per row.")] = 5,
) -> None:
    """What enable() costs, and the dispatch of one call."""
    with _errors("bench"):
        from wan_patches.bench import overhead as run

        rows = run.measure(repeats)
        typer.echo(text(run.table(rows)))
        if json is not None:
            run.write_json(json, rows)


@bench.command()
def transport(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="An eighth of the size, shorter runs.")] = False,
) -> None:
    """Results from one process to another. Exits with status 1 if a value does not arrive as it was."""
    with _errors("bench"):
        from wan_patches.bench import transport as run

        rows = run.measure(quick=quick)
        typer.echo(text(run.table(rows)))
        if json is not None:
            run.write_json(json, rows)
    if different := [f"{row.case} through {row.transport}" for row in rows if not row.equal]:
        _fail(f"NOT what was sent: {'; '.join(different)}.")


@bench.command()
def vae(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Threads of torch on the CPU.")] = None,  # noqa: UP045
    parallel: Annotated[bool, typer.Option(help="Also tiles shared by two processes, on two cores.")] = True,
) -> None:
    """The video autoencoder: time, memory, equal bits. Exits with status 1 if a single bit differs."""
    with _errors("bench"):
        from wan_patches.bench import vae as run
        from wan_patches.bench.measure import device_of, dtype_of

        on = device_of(device)
        rows, shared = run.measure(on, dtype_of(dtype), quick=quick, threads=threads, parallel=parallel)
        typer.echo(text(run.table(rows, shared)))
        if json is not None:
            run.write_json(json, rows, shared, on, threads)
    different = [f"{row.op} {row.shape}" for row in rows if not row.exact]
    different += [f"{row.case.operation} in tiles" for row in shared if not row.equal]
    if different:
        _fail(f"NOT bit-identical: {'; '.join(different)}.")


@bench.command()
def sharding(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    ranks: Annotated[int, typer.Option(min=2, help="Processes that share the weights.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
) -> None:
    """Memory of weights that are divided among ranks. Exits with status 1 if a single bit differs."""
    with _errors("bench"):
        from wan_patches.bench import sharding as run
        from wan_patches.bench.measure import device_of, dtype_of

        rows = run.measure(device_of(device), dtype_of(dtype), ranks=ranks, quick=quick)
        typer.echo(text(run.table(rows)))
        if json is not None:
            run.write_json(json, rows, device_of(device))
    if different := [row.way for row in rows if not row.exact]:
        _fail(f"NOT bit-identical: {'; '.join(different)}.")


@contextlib.contextmanager
def _errors(extra: str) -> Iterator[None]:
    """What the user can mend, in one sentence and without a traceback."""
    if missing := [package for package in _NEEDS[extra] if importlib.util.find_spec(package) is None]:
        _fail(f'{" and ".join(missing)} must be installed for this: pip install "wan-patches[{extra}]"')
    from wan_patches.bench.measure import MeasurementError

    try:
        yield
    except MeasurementError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter("a size is WIDTHxHEIGHT, for example 832x480", param_hint="--size")
    return int(width), int(height)


if __name__ == "__main__":
    main()
