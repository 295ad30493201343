"""`wan-patches status`."""

from __future__ import annotations

import contextlib
import importlib
from typing import Annotated

import typer

import wan_patches


def status(
    import_: Annotated[
        bool, typer.Option("--import", help="Import all modules that patches apply to, to see the final states.")
    ] = False,
    all_: Annotated[bool, typer.Option("--all", help="List every patched function.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Enable all patches and print their state, one line each."""
    found = wan_patches.enable()
    if import_:
        for module in sorted({report.module for report in found.reports}):
            with contextlib.suppress(ModuleNotFoundError):  # the installed version has no such module
                importlib.import_module(module)
    found = wan_patches.status(verbose=all_)
    typer.echo(found.to_json() if json else str(found))
