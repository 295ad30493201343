"""`wan-patches doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine and installation: what works, what does not, and how to fix it.

    Works even if `import torch` fails.
    Exits with status 1 if there is a problem; warnings do not count.
    """
    from wan_patches.diagnostics.doctor import examine

    found = examine()
    typer.echo(found.json() if json else str(found))
    if found.problems:
        raise typer.Exit(1)
