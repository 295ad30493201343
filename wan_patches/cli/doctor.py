"""`wan-patches doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


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
