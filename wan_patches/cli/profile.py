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
    patches: Annotated[
        str | None, typer.Option(help='Names with commas between them; "" for stock, by default all.')
    ] = None,
    fidelity: options.Fidelity = "exact",
    gate: options.Gate = True,
    json: Annotated[Path | None, typer.Option(help="Write the profile here.")] = None,
    chart: options.Chart = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the trace of torch's profiler here, for chrome://tracing.")
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
        shared.fail(wrong)
    shared.enable(options.names(patches), fidelity, gate)
    shared.require("torch")
    given: dict[str, Any] = {"json": json, "chart": chart, "trace": trace, "copies": copies}
    raise shared.Outside(lambda: run_script(script, arguments or (), module=module, **given))
