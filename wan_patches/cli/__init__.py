"""The command line: `wan-patches`, or `python -m wan_patches`.

Each command is a module. Commands import torch and diffusers only when they run, so that `--help` is fast.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import wan_patches
from wan_patches.cli import bench, demo, doctor, profile, run, status, upstream, verify
from wan_patches.cli.shared import Outside

__all__ = ["app", "main"]

app = typer.Typer(
    name="wan-patches", help="Faster Wan and Helios pipelines, bit-identical to stock.", no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False,
)  # fmt: skip

_OF_A_SCRIPT = {"allow_interspersed_args": False}  # options after the script belong to the script

app.command()(status.status)
app.command(context_settings=_OF_A_SCRIPT)(run.run)
app.command(context_settings=_OF_A_SCRIPT)(profile.profile)
app.command()(doctor.doctor)
app.command()(demo.demo)
app.command()(verify.verify)
app.command()(upstream.upstream)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs the console command."""
    hook = sys.excepthook
    try:
        app()
    except Outside as outside:
        action = outside.action
    sys.excepthook = hook  # typer has installed its own
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
