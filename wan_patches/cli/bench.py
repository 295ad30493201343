"""`wan-patches bench`: one command for each table that `wan_patches.bench` measures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from wan_patches.cli import options, shared
from wan_patches.diagnostics.preflight import check_file, check_folder
from wan_patches.tables import text
from wan_patches.testing.names import FAMILIES, RELATIVES

app = typer.Typer(help="Measure the patches, executors and parallel VAE against stock.", no_args_is_help=True)

Only = Annotated[str, typer.Option(help="Measure only rows with this in their name, such as 'decode 81x480x832'.")]
Rows = Annotated[Path | None, typer.Option(help="JSON file to write the rows and the machine's facts to.")]


@app.command()
def ops(
    json: Rows = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="Use smaller shapes and shorter runs.")] = False,
    threads: options.Threads = None,
    only: Only = "",
) -> None:
    """Measure each patched operation: time, memory, bit equality. Exits with status 1 if a single bit differs."""
    _operations("ops", json, device, dtype, quick=quick, threads=threads, only=only)


@app.command()
def forms(
    json: Rows = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="Use only the smallest sizes and shorter runs.")] = False,
    threads: options.Threads = None,
    only: Only = "",
) -> None:
    """Measure each form against its op's reference, smallest size first. Exits with status 1 if a bit differs."""
    _operations("forms", json, device, dtype, quick=quick, threads=threads, only=only)


def _operations(name: str, json: Path | None, device: str, dtype: str, **more: Any) -> None:
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench.measure import device_of, dtype_of

        run = importlib.import_module(f"wan_patches.bench.{name}")
        rows = run.measure(device_of(device), dtype_of(dtype), **more)
        typer.echo(text(run.table(rows)))
    different = [f"{row.op} {row.shape}" for row in rows if row.exact is False]
    shared.end(different, (json, lambda path: run.write_json(path, rows, device_of(device), more["threads"])))


@app.command()
def overhead(
    json: Rows = None, repeats: Annotated[int, typer.Option(min=1, help="Number of fresh processes per row.")] = 5
) -> None:
    """Measure the cost of enable() and of dispatching one call."""
    _costs("overhead", json, repeats)


@app.command()
def executor(
    json: Rows = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of workers killed per row.")] = 5,
) -> None:
    """Measure the latency of a small request through an executor, and the recovery time after a worker dies."""
    _costs("executor", json, repeats)


def _costs(name: str, json: Path | None, repeats: int) -> None:
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench import overhead as costs

        rows = importlib.import_module(f"wan_patches.bench.{name}").measure(repeats)
        typer.echo(text(costs.table(rows)))
    shared.end([], (json, lambda path: costs.write_json(path, rows)))


@app.command()
def transport(
    json: Rows = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use an eighth of the size and shorter runs.")] = False,
) -> None:
    """Measure the transfer of results between processes. Exits with status 1 if a value arrives changed."""
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench import transport as run

        rows = run.measure(quick=quick)
        typer.echo(text(run.table(rows)))
    different = [f"{row.case} through {row.transport}" for row in rows if not row.equal]
    shared.end(different, (json, lambda path: run.write_json(path, rows)), finding="Changed in transfer")


@app.command()
def vae(
    json: Rows = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
    threads: options.Threads = None,
    parallel: Annotated[
        bool, typer.Option(help="Also measure VAE tiles split between two processes, on two cores.")
    ] = True,
    only: Only = "",
) -> None:
    """Measure the VAE: time, memory, bit equality. Exits with status 1 if a single bit differs."""
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench import vae as run
        from wan_patches.bench.measure import device_of, dtype_of

        on = device_of(device)
        more: dict[str, Any] = {"quick": quick, "threads": threads, "parallel": parallel, "only": only}
        rows, tiles = run.measure(on, dtype_of(dtype), **more)
        typer.echo(text(run.table(rows, tiles)))
    different = [f"{row.op} {row.shape}" for row in rows if not row.exact]
    different += [f"{row.case.operation} in tiles" for row in tiles if not row.equal]
    shared.end(different, (json, lambda path: run.write_json(path, rows, tiles, on, threads)))


# `bench block`, `model` and `pipeline`

Frames = Annotated[int | None, typer.Option(min=1, help="Frames of the video; the default is smaller on a CPU.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the video; the default is smaller on a CPU.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Number of transformer blocks; all by default.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Also measure with torch.compile; default: on accelerators only."),
]
Regional = Annotated[bool, typer.Option("--regional", help="Compile the blocks separately instead of the whole model.")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention backend by its diffusers name (native, _native_cudnn, flash, ...); default: diffusers' choice."
    ),
]
Seconds = Annotated[
    float, typer.Option(min=0, help="Approximate duration of the measurement; at least three calls of each variant.")
]
Result = Annotated[Path | None, typer.Option(help="JSON file to write the result and the machine's facts to.")]


@app.command()
def block(
    shape: options.Shape = "14b-480p", device: options.Device = "auto", dtype: options.Dtype = "bf16",
    frames: Frames = None, size: Size = None, attention: Attention = None, compiled: Compile = None,
    threads: options.Threads = None, seconds: Seconds = 5.0, json: Result = None, chart: options.Chart = None,
) -> None:  # fmt: skip
    """Measure one transformer block with random weights: stock, patched, compiled, and the floor of its matmuls.

    Also measures the rotary embedding by itself. Exits with status 1 if a single bit differs.
    """
    wanted = {"name": shape, "frames": frames, "size": options.size(size), "attention": attention}
    _ways("block", wanted, device, dtype, compiled, json, chart, threads=threads, seconds=seconds)


@app.command()
def model(
    shape: options.Shape = "14b-480p", device: options.Device = "auto", dtype: options.Dtype = "bf16",
    frames: Frames = None, size: Size = None, layers: Layers = None, attention: Attention = None,
    compiled: Compile = None, regional: Regional = False, threads: options.Threads = None, seconds: Seconds = 10.0,
    json: Result = None, chart: options.Chart = None,
) -> None:  # fmt: skip
    """Measure one forward pass of a denoiser with random weights, in the same variants as `block`.

    Exits with status 1 if a single bit differs.
    """
    wanted = {"name": shape, "frames": frames, "size": options.size(size), "layers": layers, "attention": attention}
    _ways("model", wanted, device, dtype, compiled, json, chart, regional=regional, threads=threads, seconds=seconds)


@app.command()
def pipeline(
    shape: options.Shape = "14b-480p", device: options.Device = "auto", dtype: options.Dtype = "bf16",
    frames: Frames = None, size: Size = None, layers: Layers = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 4,
    vae_dtype: Annotated[
        str | None, options.one_of(options.DTYPES, "Data type of the autoencoder; default: that of the denoiser.")
    ] = None,
    attention: Attention = None, compiled: Compile = None, regional: Regional = False,
    threads: options.Threads = None, seconds: Seconds = 10.0, json: Result = None, chart: options.Chart = None,
) -> None:  # fmt: skip
    """Measure a pipeline with random weights from noise to frames, in the same variants as `block`.

    Exits with status 1 if a single bit differs.
    """
    wanted = {"name": shape, "frames": frames, "size": options.size(size), "layers": layers, "attention": attention}
    others = {"regional": regional, "steps": steps, "vae_dtype": vae_dtype, "threads": threads, "seconds": seconds}
    _ways("pipeline", wanted, device, dtype, compiled, json, chart, **others)


def _ways(
    name: str, shape: dict[str, Any], device: str, dtype: str, compiled: bool | None, json: Path | None,
    chart: Path | None, **others: Any,
) -> None:  # fmt: skip
    from wan_patches.diagnostics.profiling import obstacle

    if wrong := obstacle(chart, json):
        shared.fail(wrong)
    with shared.errors("bench"):
        from wan_patches.bench import variants
        from wan_patches.bench.measure import device_of, dtype_of
        from wan_patches.bench.shapes import shape_of

        on, precision = device_of(device), dtype_of(dtype)
        wanted = shape_of(device=on, **shape)
        run = importlib.import_module(f"wan_patches.bench.{name}")
        if others.get("vae_dtype") is not None:
            others["vae_dtype"] = dtype_of(others["vae_dtype"])
        compiled = on.type != "cpu" if compiled is None else compiled
        found = run.measure(wanted, on, precision, compiled=compiled, **others)
        typer.echo(text(variants.table(found)))
    shared.end(
        found.different(),
        (json, lambda path: variants.write_json(path, found, on, others["threads"])),
        (chart, lambda path: variants.chart(found, on).savefig(path)),
    )


@app.command()
def gpu(
    out: Annotated[
        Path | None, typer.Option(help="Folder for logs and JSON; later runs on the same device add to it.")
    ] = None,
    part: Annotated[int | None, typer.Option(min=1, max=3, help="Part, of at most 9 minutes; default: all.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Seconds in which all must end; default: 540 a part.")
    ] = None,
    only: Annotated[str, typer.Option(help="Run or predict only what has this in its name.")] = "",
    predict: Annotated[
        bool, typer.Option("--predict", help="Predict times from counted bytes, without a GPU, beside those in --out.")
    ] = False,
    device: Annotated[str, options.one_of(options.ACCELERATORS, "Device; a checkout has an emulated one.")] = "cuda",
    dtype: options.Dtype = "bf16",
) -> None:
    """Run all measurements on a GPU, each in its own process with a time limit, and say what to mend.

    Exits with status 1 if a bit differs or a test fails, and with 2 if a step failed or was stopped.
    """
    if out is None and not predict:
        raise typer.BadParameter("name a folder for the results", param_hint="--out")
    shared.preflight(check_folder, out)
    if predict or out is None:
        _predict(out, only)
        return
    with shared.errors("bench"):
        from wan_patches.bench import gpu as run

        seconds = budget or run.PART_SECONDS * (len(run.PARTS) if part is None else 1)
        try:
            with shared.progress("looking for the device") as tell:
                run.run(out, device, dtype, part=part, only=only, budget=seconds, tell=tell)
        except OSError as error:
            shared.fail(f"{out} cannot be written: {error}")
        typer.echo(text(run.report(out)))
    raise typer.Exit(run.status(out))


def _predict(out: Path | None, only: str) -> None:
    with shared.errors("bench"):
        from wan_patches.bench import predict

        rows = predict.measure(only)
        typer.echo(text(predict.table(rows, out)))
    file = None if out is None or only else out / predict.FILE
    shared.end([], (file, lambda path: predict.write_json(path, rows)))


@app.command()
def sharding(
    json: Rows = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "bf16",
    ranks: Annotated[int, typer.Option(min=2, help="Number of processes that share the weights.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
) -> None:
    """Measure the memory of weights sharded over ranks. Exits with status 1 if a single bit differs."""
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench import sharding as run
        from wan_patches.bench.measure import device_of, dtype_of

        rows = run.measure(device_of(device), dtype_of(dtype), ranks=ranks, quick=quick)
        typer.echo(text(run.table(rows)))
    different = [row.way for row in rows if not row.exact]
    shared.end(different, (json, lambda path: run.write_json(path, rows, device_of(device))))


@app.command()
def compatibility(
    families: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pipeline families; default: all that the installed diffusers has.",
            autocompletion=lambda: [*FAMILIES, *RELATIVES],
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Folder for the JSON record, which is named after the versions.")
    ] = None,
    production: Annotated[
        bool, typer.Option("--production", help="Use forms only at sizes where they are fast, as in production. Slow.")
    ] = False,
    others: Annotated[
        bool,
        typer.Option("--others", help="Run other models that share the rotary embedding or the autoencoder."),
    ] = False,
) -> None:
    """Run each pipeline stock and patched: active patches, calls served by forms, bit equality.

    Exits with status 1 if a single bit differs.
    """
    if others and production:
        raise typer.BadParameter("--others has no production sizes; leave out one of the two")
    for name in families or ():
        options.family(name, RELATIVES if others else FAMILIES)
    shared.preflight(check_folder, json)
    with shared.errors("bench"):
        from wan_patches.bench import compatibility as run

        rows = run.measure_others(families or ()) if others else run.measure(families or (), production)
        typer.echo(text(run.table(rows)))
    different = [row.family for row in rows if not row.identical]
    shared.end(different, (json, lambda path: run.write_json(path, rows)))


@app.command()
def reach(json: Annotated[Path | None, typer.Option(help="JSON file to write the pipelines to.")] = None) -> None:
    """List all pipelines of the installed diffusers with the patches of their code. Runs none of them."""
    shared.preflight(check_file, json)
    with shared.errors("bench"):
        from wan_patches.bench import reach as run

        pipelines = run.measure()
        typer.echo(text(run.table(pipelines)))
    shared.end([], (json, lambda path: run.write_json(path, pipelines)))
