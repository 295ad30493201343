"""Functions shared by the commands: errors, exit statuses, imports, files.

Exit status 1 is a finding (bits differ, there is a problem). Exit status 2 means that the command could not do its
work, so there is no finding.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import typer

import wan_patches

#: The packages of each extra that commands need.
NEEDS = {
    "demo": ("transformers", "accelerate", "ftfy", "av"),
    "bench": ("transformers", "accelerate", "ftfy", "psutil"),
    "verify": ("transformers", "accelerate", "ftfy"),
}


class Outside(BaseException):
    """Runs `action` outside of typer, which would otherwise catch the exceptions of a script."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints an error and ends the command with an exit status."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def errors(extra: str) -> Iterator[None]:
    """Reports errors that the user can fix in one sentence, without a traceback.

    Args:
        extra: the extra of this package (a key of `NEEDS`) whose packages the block needs.
    """
    if missing := [package for package in NEEDS[extra] if importlib.util.find_spec(package) is None]:
        fail(f'this command needs {" and ".join(missing)}: pip install "wan-patches[{extra}]"')
    require("torch", "diffusers.pipelines.pipeline_utils")  # both import torch_npu if it is installed
    from wan_patches.bench.measure import MeasurementError

    try:
        yield
    except MeasurementError as error:
        fail(str(error))


def require(*modules: str) -> None:
    """Imports modules; if one cannot be imported, ends the command with the reason."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # any exception, since torch loads backends that may raise anything
            from wan_patches.diagnostics.doctor.probes import chain

            reason = ", caused by ".join(line.rstrip(".") for line in chain(error))
            fail(f"{module.partition('.')[0]} cannot be imported: {reason}; run `wan-patches doctor`")


def enable(patches: list[str] | None, fidelity: str, gate: bool) -> None:
    """Enables patches; ends the command if a name or the fidelity is unknown."""
    try:
        wan_patches.enable(patches, fidelity=fidelity, gate=gate)
    except ValueError as error:
        fail(str(error))


def check_patches(patches: list[str] | None, fidelity: str) -> None:
    """Ends the command if a name or the fidelity is unknown; imports neither torch nor diffusers."""
    with wan_patches.enabled(()):  # so that nothing remains enabled
        enable(patches, fidelity, gate=True)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[str], None]]:
    """Shows on stderr what the command is doing: a spinner in a terminal, a line for each label elsewhere.

    Yields:
        A function that changes the label.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(label, err=True)
        yield lambda label: typer.echo(label, err=True)
        return
    with console.status(label) as shown:
        yield shown.update


def preflight(check: Callable[[Path], None], *paths: Path | None) -> None:
    """Ends the command before long work if `check` rejects one of the paths."""
    try:
        for path in paths:
            if path is not None:
                check(path)
    except OSError as error:
        fail(str(error))


def write(*files: tuple[Path | None, Callable[[Path], object]]) -> bool:
    """Writes files, each with its function; prints the errors and returns whether all files were written."""
    written = True
    for path, save in files:
        try:
            if path is not None:
                save(path)
        except (OSError, ValueError) as error:  # a full disk, or an image format that matplotlib lacks
            typer.echo(f"Error: {path} was not written: {error}", err=True)
            written = False
    return written


def end(
    different: list[str], *files: tuple[Path | None, Callable[[Path], object]], finding: str = "NOT bit-identical"
) -> None:
    """Ends a measurement after its table was printed: writes the files and sets the exit status.

    Args:
        different: the rows that failed the comparison.
        files: paths, and functions that write them.
        finding: what is wrong with the rows in `different`.
    """
    written = write(*files)
    if different:
        fail(f"{finding}: {'; '.join(different)}.", 1)
    if not written:
        raise typer.Exit(2)
