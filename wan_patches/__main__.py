"""The command line: `wan-patches`, or `python -m wan_patches`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

import wan_patches
from wan_patches.diagnostics.preflight import check_file, check_folder
from wan_patches.tables import text

# Commands import torch and diffusers when they run: `--help` must be fast.
# Status 1 is a finding (bits differ, there is a problem), 2 that there is none: what is asked for cannot be done.

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
    "verify": ("transformers", "accelerate", "ftfy"),
}


class _Outside(BaseException):
    """What a command leaves to be done outside of typer, which would catch what a script raises."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action


def main() -> None:
    """The console command."""
    hook = sys.excepthook
    try:
        app()
    except _Outside as outside:
        action = outside.action
    sys.excepthook = hook  # typer has put its own there
    action()


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


# everything after the script is the script's
@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(help="The script; with -m the name of a module.")],
    arguments: Annotated[Optional[list[str]], typer.Argument(help="What the script gets.")] = None,  # noqa: UP045
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
    patches: Annotated[
        Optional[str], typer.Option(help="Names with commas between them; by default all that `status` lists.")  # noqa: UP045
    ] = None,
    fidelity: Annotated[str, typer.Option(help="exact, or close to allow patches that move rounding.")] = "exact",
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="On accelerators: compare with stock at first sight.")
    ] = True,
) -> None:
    """Run a Python script, unchanged, with the patches enabled.

    As `python SCRIPT ARGUMENTS` does: same exit status, same tracebacks. A line on stderr says at the end what was
    active. Also as `torchrun ... -m wan_patches run SCRIPT` and `accelerate launch ... -m wan_patches run SCRIPT`.
    """
    from wan_patches.diagnostics.script_runner import run as run_script

    _enable(_names(patches), fidelity, gate)
    raise _Outside(lambda: run_script(script, arguments or (), module=module))


@app.command(context_settings={"allow_interspersed_args": False})
def profile(
    script: Annotated[str, typer.Argument(help="The script; with -m the name of a module.")],
    arguments: Annotated[Optional[list[str]], typer.Argument(help="What the script gets.")] = None,  # noqa: UP045
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
    patches: Annotated[
        Optional[str], typer.Option(help='Names with commas between them; "" for stock, by default all.')  # noqa: UP045
    ] = None,
    fidelity: Annotated[str, typer.Option(help="exact, or close to allow patches that move rounding.")] = "exact",
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="On accelerators: compare with stock at first sight.")
    ] = True,
    json: Annotated[Optional[Path], typer.Option(help="Write the profile here.")] = None,  # noqa: UP045
    chart: Annotated[Optional[Path], typer.Option(help="Draw it here, as PNG.")] = None,  # noqa: UP045
    trace: Annotated[
        Optional[Path], typer.Option(help="Write the trace of torch's profiler here, for chrome://tracing.")  # noqa: UP045
    ] = None,
    copies: Annotated[
        bool, typer.Option(help="On accelerators: count copies and waits, for which every operator is kept in memory.")
    ] = True,
) -> None:
    """Run a Python script with the patches enabled, and print to stderr where the time of its pipelines went.

    By stage and by patched operation, and which calls took stock's way and why. Exits with the script's status.
    """
    from wan_patches.diagnostics.profiling import obstacle
    from wan_patches.diagnostics.profiling import run as run_script

    if wrong := obstacle(chart, json, trace):
        _fail(wrong)
    _enable(_names(patches), fidelity, gate)
    _import("torch")
    given: dict[str, Any] = {"json": json, "chart": chart, "trace": trace, "copies": copies}
    raise _Outside(lambda: run_script(script, arguments or (), module=module, **given))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what works on this machine, what does not, and what to do about it.

    Works where `import torch` fails. Exits with status 1 if there is a problem; warnings are none.
    """
    from wan_patches.diagnostics.doctor import examine

    found = examine()
    typer.echo(found.json() if json else str(found))
    if found.problems:
        raise typer.Exit(1)


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
    _check(check_folder, out)
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
        _fail(wrong, 1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A folder, a name on the Hub, or tiny:FAMILY (such as tiny:wan_t2v).")],
    prompt: Annotated[Optional[str], typer.Option(help="What the video shows.")] = None,  # noqa: UP045
    image: Annotated[Optional[Path], typer.Option(help="The picture of image-to-video.")] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT of the video.")] = None,  # noqa: UP045
    frames: Annotated[Optional[int], typer.Option(min=1, help="Frames of the video.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Denoising steps; few will do.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of the noise, and of random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    patches: Annotated[
        Optional[str], typer.Option(help="Names with commas between them; by default all that `status` lists.")  # noqa: UP045
    ] = None,
    fidelity: Annotated[str, typer.Option(help="exact, or close to allow patches that move rounding.")] = "exact",
    repeat: Annotated[int, typer.Option(min=0, help="Measured runs of each; 0 measures nothing.")] = 1,
    json: Annotated[Optional[Path], typer.Option(help="Write what was found here.")] = None,  # noqa: UP045
    report: Annotated[Optional[Path], typer.Option(help="Write a report in HTML here.")] = None,  # noqa: UP045
) -> None:
    """Run a model stock and patched: equal bits of operations, blocks, stages and video; time and memory.

    Exits with status 0 if every bit is the same, 1 if not (and names the patch), 2 if it could not be found out: an
    error, stock code that does not repeat itself, or no patch in force.
    """
    width_height, names = _size(size), _names(patches)
    _check(check_file, json, report)
    with _errors("verify"):
        from rich.console import Console

        from wan_patches.bench.demo import open_image
        from wan_patches.bench.measure import device_of, dtype_of
        from wan_patches.bench.verification import subject

        on, precision = device_of(device), dtype_of(dtype)
        photo = None if image is None else open_image(image)
        try:
            with wan_patches.enabled(names, fidelity=fidelity):  # what is misspelt is said before a model is loaded
                pass
        except ValueError as error:
            _fail(str(error))
        choice: dict[str, Any] = {"prompt": prompt, "size": width_height, "frames": frames, "steps": steps}
        with Console(stderr=True).status("loading") as shown:
            found = subject(model, photo, on, precision, seed=seed, **choice)
            try:
                verification = wan_patches.verify(
                    found.pipe, patches=names, fidelity=fidelity, repeat=repeat,
                    on_run=lambda purpose: shown.update(purpose), **found.arguments(),
                )  # fmt: skip
            except Exception as error:  # of the pipeline itself, with stock code
                _fail(f"{type(error).__name__}: {error}. Does this model run with these arguments at all?")
    typer.echo(str(verification))
    written = _write((json, verification.save_json), (report, verification.save_html))
    if verification.verdict == "different":
        raise typer.Exit(1)
    if verification.undecided or not written:
        raise typer.Exit(2)


@app.command()
def upstream(
    old: Annotated[Path, typer.Argument(help="A wheel of diffusers, or a folder that holds `diffusers/`.")],
    new: Annotated[Path, typer.Argument(help="Another.")],
    diff: Annotated[bool, typer.Option("--diff", help="Also what changed in each function.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also functions that did not change.")] = False,
) -> None:
    """What changed between two versions of diffusers, of what patches change or rely on.

    Exits with status 1 if the patches know the old text of a function and not the new one.
    """
    from wan_patches.diagnostics import upstream as run

    try:
        sources = run.Source(old), run.Source(new)
    except (OSError, ValueError) as error:
        _fail(str(error))
    found = run.compare(*sources, wan_patches._registry.patches())
    shown = [function for function in found if everything or function.diff or function.is_lost]
    typer.echo(text(run.table(shown, *sources, diffs=diff)))
    lost = sum(function.is_lost for function in found)
    typer.echo(f"{len(found)} functions: {sum(bool(f.diff) for f in found)} changed, {lost} not known any more.")
    raise typer.Exit(1 if lost else 0)


@bench.command()
def ops(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="Smaller shapes, shorter runs.")] = False,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Threads of torch on the CPU.")] = None,  # noqa: UP045
) -> None:
    """Each operation by itself: time, memory, equal bits. Exits with status 1 if a single bit differs."""
    _operations("ops", json, device, dtype, quick, threads)


@bench.command()
def forms(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="The smallest sizes only, shorter runs.")] = False,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Threads of torch on the CPU.")] = None,  # noqa: UP045
) -> None:
    """Each form beside the reference of its op, from the smallest size on. Exits with status 1 if a bit differs."""
    _operations("forms", json, device, dtype, quick, threads)


def _operations(name: str, json: Path | None, device: str, dtype: str, quick: bool, threads: int | None) -> None:
    _check(check_file, json)
    with _errors("bench"):
        from wan_patches.bench.measure import device_of, dtype_of

        run = importlib.import_module(f"wan_patches.bench.{name}")
        rows = run.measure(device_of(device), dtype_of(dtype), quick=quick, threads=threads)
        typer.echo(text(run.table(rows)))
    different = [f"{row.op} {row.shape}" for row in rows if row.exact is False]
    _end(different, (json, lambda path: run.write_json(path, rows, device_of(device), threads)))


@bench.command()
def overhead(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes per row.")] = 5,
) -> None:
    """What enable() costs, and the dispatch of one call."""
    _costs("overhead", json, repeats)


@bench.command()
def executor(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(min=1, help="Workers that are killed, per row.")] = 5,
) -> None:
    """A small request's way through an executor, and the time without a worker that has died."""
    _costs("executor", json, repeats)


def _costs(name: str, json: Path | None, repeats: int) -> None:
    _check(check_file, json)
    with _errors("bench"):
        from wan_patches.bench import overhead as costs

        rows = importlib.import_module(f"wan_patches.bench.{name}").measure(repeats)
        typer.echo(text(costs.table(rows)))
    _end([], (json, lambda path: costs.write_json(path, rows)))


@bench.command()
def transport(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="An eighth of the size, shorter runs.")] = False,
) -> None:
    """Results from one process to another. Exits with status 1 if a value does not arrive as it was."""
    _check(check_file, json)
    with _errors("bench"):
        from wan_patches.bench import transport as run

        rows = run.measure(quick=quick)
        typer.echo(text(run.table(rows)))
    different = [f"{row.case} through {row.transport}" for row in rows if not row.equal]
    _end(different, (json, lambda path: run.write_json(path, rows)), finding="NOT what was sent")


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
    _check(check_file, json)
    with _errors("bench"):
        from wan_patches.bench import vae as run
        from wan_patches.bench.measure import device_of, dtype_of

        on = device_of(device)
        rows, shared = run.measure(on, dtype_of(dtype), quick=quick, threads=threads, parallel=parallel)
        typer.echo(text(run.table(rows, shared)))
    different = [f"{row.op} {row.shape}" for row in rows if not row.exact]
    different += [f"{row.case.operation} in tiles" for row in shared if not row.equal]
    _end(different, (json, lambda path: run.write_json(path, rows, shared, on, threads)))


# What `bench block`, `model` and `pipeline` take
_Shape = Annotated[
    str, typer.Option(help="14b-480p, 14b-720p, 1.3b-480p, ti2v-5b, helios, or tiny, tiny-ti2v, tiny-helios.")
]
_Frames = Annotated[Optional[int], typer.Option(min=1, help="Of the video; on a CPU there are fewer by default.")]  # noqa: UP045
_Size = Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT of the video; on a CPU smaller by default.")]  # noqa: UP045
_Layers = Annotated[Optional[int], typer.Option(min=1, help="Blocks of the model; all by default.")]  # noqa: UP045
_Compile = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--compile/--no-compile", help="Also through torch.compile; by default on accelerators only."),
]
_Regional = Annotated[bool, typer.Option("--regional", help="Compile the blocks, not the whole model.")]
_Attention = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Backend, as diffusers names it (native, _native_cudnn, flash, ...); by default its own choice."),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")]
_Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
_Threads = Annotated[Optional[int], typer.Option(min=1, help="Threads of torch on the CPU.")]  # noqa: UP045
_Seconds = Annotated[float, typer.Option(min=0, help="About how long is measured; each way three times at least.")]
_Json = Annotated[Optional[Path], typer.Option(help="Write the result and the machine's facts here.")]  # noqa: UP045
_Chart = Annotated[Optional[Path], typer.Option(help="Draw it here, as PNG.")]  # noqa: UP045


@bench.command()
def block(
    shape: _Shape = "14b-480p", device: _Device = "auto", dtype: _Dtype = "bf16", frames: _Frames = None,
    size: _Size = None, attention: _Attention = None, compiled: _Compile = None, threads: _Threads = None,
    seconds: _Seconds = 5.0, json: _Json = None, chart: _Chart = None,
) -> None:  # fmt: skip
    """One transformer block with random weights: stock, patched, compiled, and the floor under all of them.

    Also the rotary embedding by itself. Exits with status 1 if a single bit differs.
    """
    wanted = {"name": shape, "frames": frames, "size": _size(size), "attention": attention}
    _ways("block", wanted, device, dtype, compiled, json, chart, threads=threads, seconds=seconds)


@bench.command()
def model(
    shape: _Shape = "14b-480p", device: _Device = "auto", dtype: _Dtype = "bf16", frames: _Frames = None,
    size: _Size = None, layers: _Layers = None, attention: _Attention = None, compiled: _Compile = None,
    regional: _Regional = False, threads: _Threads = None, seconds: _Seconds = 10.0, json: _Json = None,
    chart: _Chart = None,
) -> None:  # fmt: skip
    """One forward of a denoiser with random weights, in the same ways. Exits with status 1 if a single bit differs."""
    wanted = {"name": shape, "frames": frames, "size": _size(size), "layers": layers, "attention": attention}
    options = {"regional": regional, "threads": threads, "seconds": seconds}
    _ways("model", wanted, device, dtype, compiled, json, chart, **options)


@bench.command()
def pipeline(
    shape: _Shape = "14b-480p", device: _Device = "auto", dtype: _Dtype = "bf16", frames: _Frames = None,
    size: _Size = None, layers: _Layers = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 4,
    attention: _Attention = None, compiled: _Compile = None, regional: _Regional = False, threads: _Threads = None,
    seconds: _Seconds = 10.0, json: _Json = None, chart: _Chart = None,
) -> None:  # fmt: skip
    """A pipeline with random weights from noise to frames, likewise. Exits with status 1 if a single bit differs."""
    wanted = {"name": shape, "frames": frames, "size": _size(size), "layers": layers, "attention": attention}
    options = {"regional": regional, "steps": steps, "threads": threads, "seconds": seconds}
    _ways("pipeline", wanted, device, dtype, compiled, json, chart, **options)


def _ways(
    name: str, shape: dict[str, Any], device: str, dtype: str, compiled: bool | None, json: Path | None,
    chart: Path | None, **options: Any,
) -> None:  # fmt: skip
    from wan_patches.diagnostics.profiling import obstacle

    if wrong := obstacle(chart, json):
        _fail(wrong)
    with _errors("bench"):
        from wan_patches.bench import variants
        from wan_patches.bench.measure import device_of, dtype_of
        from wan_patches.bench.shapes import shape_of

        on, precision = device_of(device), dtype_of(dtype)
        wanted = shape_of(device=on, **shape)
        run = importlib.import_module(f"wan_patches.bench.{name}")
        compiled = on.type != "cpu" if compiled is None else compiled
        found = run.measure(wanted, on, precision, compiled=compiled, **options)
        typer.echo(text(variants.table(found)))
    _end(
        found.different(),
        (json, lambda path: variants.write_json(path, found, on, options["threads"])),
        (chart, lambda path: variants.chart(found, on).savefig(path)),
    )


@bench.command()
def sharding(
    json: Annotated[Optional[Path], typer.Option(help="Write the rows and the machine's facts here.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    ranks: Annotated[int, typer.Option(min=2, help="Processes that share the weights.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
) -> None:
    """Memory of weights that are divided among ranks. Exits with status 1 if a single bit differs."""
    _check(check_file, json)
    with _errors("bench"):
        from wan_patches.bench import sharding as run
        from wan_patches.bench.measure import device_of, dtype_of

        rows = run.measure(device_of(device), dtype_of(dtype), ranks=ranks, quick=quick)
        typer.echo(text(run.table(rows)))
    different = [row.way for row in rows if not row.exact]
    _end(different, (json, lambda path: run.write_json(path, rows, device_of(device))))


@bench.command()
def compatibility(
    families: Annotated[Optional[list[str]], typer.Argument(help="By default all that this diffusers has.")] = None,  # noqa: UP045
    json: Annotated[
        Optional[Path], typer.Option(help="Folder for a record, named after the versions.")  # noqa: UP045
    ] = None,
    production: Annotated[
        bool, typer.Option("--production", help="Forms are asked from the sizes on at which they are fast. Takes long.")
    ] = False,
) -> None:
    """Each pipeline: its patches, how many calls took forms, equal bits. Exits with status 1 if a bit differs."""
    _check(check_folder, json)
    with _errors("bench"):
        from wan_patches.bench import compatibility as run

        rows = run.measure(families or (), production)
        typer.echo(text(run.table(rows)))
    different = [row.family for row in rows if not row.identical]
    _end(different, (json, lambda path: run.write_json(path, rows)))


# What commands share


def _names(patches: str | None) -> list[str] | None:
    return None if patches is None else [name.strip() for name in patches.split(",") if name.strip()]


def _enable(names: list[str] | None, fidelity: str, gate: bool) -> None:
    try:
        wan_patches.enable(names, fidelity=fidelity, gate=gate)
    except ValueError as error:
        _fail(str(error))


def _check(check: Callable[[Path], None], *paths: Path | None) -> None:
    """What could not be written is said before long work."""
    try:
        for path in paths:
            if path is not None:
                check(path)
    except OSError as error:
        _fail(str(error))


@contextlib.contextmanager
def _errors(extra: str) -> Iterator[None]:
    """What the user can mend, in one sentence and without a traceback."""
    if missing := [package for package in _NEEDS[extra] if importlib.util.find_spec(package) is None]:
        _fail(f'{" and ".join(missing)} must be installed for this: pip install "wan-patches[{extra}]"')
    _import("torch", "diffusers.pipelines.pipeline_utils")  # both import torch_npu where it is installed
    from wan_patches.bench.measure import MeasurementError

    try:
        yield
    except MeasurementError as error:
        _fail(str(error))


def _import(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # not only ImportError: a backend that torch loads may raise anything
            from wan_patches.diagnostics.doctor.probes import chain

            reason = ", caused by ".join(line.rstrip(".") for line in chain(error))
            _fail(f"{module.partition('.')[0]} cannot be imported: {reason}; run `wan-patches doctor`")


def _write(*files: tuple[Path | None, Callable[[Path], object]]) -> bool:
    """Whether all could be written; which not, and why, is said."""
    written = True
    for path, write in files:
        try:
            if path is not None:
                write(path)
        except (OSError, ValueError) as error:  # a full disk; a kind of picture that nobody knows
            typer.echo(f"Error: {path} was not written: {error}", err=True)
            written = False
    return written


def _end(
    different: list[str], *files: tuple[Path | None, Callable[[Path], object]], finding: str = "NOT bit-identical"
) -> None:
    """The end of a measurement that has been printed: files, what is `different`, and the status."""
    written = _write(*files)
    if different:
        _fail(f"{finding}: {'; '.join(different)}.", 1)
    if not written:
        raise typer.Exit(2)


def _fail(message: str, status: int = 2) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(status)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter("a size is WIDTHxHEIGHT, for example 832x480", param_hint="--size")
    return int(width), int(height)


if __name__ == "__main__":
    main()
