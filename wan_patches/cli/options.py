"""Options and arguments that several commands take, and the values that their texts stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# A script and the patches that it runs with

Script = Annotated[str, typer.Argument(help="The script; with -m the name of a module.")]
Arguments = Annotated[list[str] | None, typer.Argument(help="What the script gets.")]
Module = Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")]
Patches = Annotated[
    str | None, typer.Option(help="Names with commas between them; by default all that `status` lists.")
]
Fidelity = Annotated[str, typer.Option(help="exact, or close to allow patches that move rounding.")]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", help="On accelerators: compare with stock at first sight.")]

# A video

Prompt = Annotated[str | None, typer.Option(help="What the video shows.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the video.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of the video.")]
Seed = Annotated[int, typer.Option(help="Of the noise, and of random weights.")]

# The machine, and the files

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, npu, ...")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")]
Chart = Annotated[Path | None, typer.Option(help="Draw it here, as PNG.")]


def names(patches: str | None) -> list[str] | None:
    """Splits a value of `Patches`; None stands for all patches."""
    return None if patches is None else [name.strip() for name in patches.split(",") if name.strip()]


def size(text: str | None) -> tuple[int, int] | None:
    """Parses a value of `Size` into width and height in pixels.

    Raises:
        typer.BadParameter: the text is not of the form WIDTHxHEIGHT.
    """
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter("a size is WIDTHxHEIGHT, for example 832x480", param_hint="--size")
    return int(width), int(height)
