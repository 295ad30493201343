"""`wan-patches profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wan_patches.cli import options, shared


def profile(
    script: options.Script,
    arguments: options.Arguments = None,
    module: options.Module = False,
    patches: options.Patches = None,
    stock: Annotated[bool, typer.Option("--stock", help='Run without patches; like --patches "".')] = False,
    fidelity: options.Fidelity = "exact",
    gate: options.Gate = True,
    json: Annotated[Path | None, typer.Option(help="JSON file to write the profile to.")] = None,
    chart: options.Chart = None,
    trace: Annotated[
        Path | None, typer.Option(help="File for the trace of torch's profiler; view it in chrome://tracing.")
    ] = None,
    copies: Annotated[
        bool, typer.Option(help="On accelerators, count copies and waits; keeps every operator in memory.")
    ] = True,
) -> None:
    """Run a Python script with the patches enabled, and print to stderr where its pipelines spent their time.

    Lists times by stage and by patched operation, and which calls fell back to stock and why.
    Exits with the script's status.
    """
    from wan_patches.diagnostics.profiling import obstacle
    from wan_patches.diagnostics.profiling import run as run_script

    if wrong := obstacle(chart, json, trace):
        shared.fail(wrong)
    shared.enable([] if stock else patches, fidelity, gate)
    shared.require("torch")
    given: dict[str, Any] = {"json": json, "chart": chart, "trace": trace, "copies": copies}
    raise shared.Outside(lambda: run_script(script, arguments or (), module=module, **given))
