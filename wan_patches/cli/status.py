"""`wan-patches status`."""

from __future__ import annotations

import contextlib
import importlib
from typing import Annotated

import typer

import wan_patches


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
