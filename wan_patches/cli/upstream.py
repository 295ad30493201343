"""`wan-patches upstream`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import wan_patches
from wan_patches.cli import shared
from wan_patches.tables import text


def upstream(
    old: Annotated[
        Path, typer.Argument(help="Old version: a diffusers wheel, or a folder that contains `diffusers/`.")
    ],
    new: Annotated[Path, typer.Argument(help="New version, likewise.")],
    diff: Annotated[bool, typer.Option("--diff", help="Also print the changes of each function.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also list functions that did not change.")] = False,
) -> None:
    """Compare two versions of diffusers: the functions that patches change or rely on.

    Exits with status 1 if a function's text is known in the old version and not in the new one.
    """
    from wan_patches.diagnostics import upstream as run

    try:
        sources = run.Source(old), run.Source(new)
    except (OSError, ValueError) as error:
        shared.fail(str(error))
    found = run.compare(*sources, wan_patches._registry.patches())
    shown = [function for function in found if everything or function.diff or function.is_lost]
    typer.echo(text(run.table(shown, *sources, diffs=diff)))
    lost = sum(function.is_lost for function in found)
    typer.echo(f"{len(found)} functions: {sum(bool(f.diff) for f in found)} changed, {lost} no longer known.")
    raise typer.Exit(1 if lost else 0)
