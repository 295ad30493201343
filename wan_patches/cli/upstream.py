"""`wan-patches upstream`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import wan_patches
from wan_patches.cli import shared
from wan_patches.tables import text


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
        shared.fail(str(error))
    found = run.compare(*sources, wan_patches._registry.patches())
    shown = [function for function in found if everything or function.diff or function.is_lost]
    typer.echo(text(run.table(shown, *sources, diffs=diff)))
    lost = sum(function.is_lost for function in found)
    typer.echo(f"{len(found)} functions: {sum(bool(f.diff) for f in found)} changed, {lost} not known any more.")
    raise typer.Exit(1 if lost else 0)
