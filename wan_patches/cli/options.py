"""Options and arguments shared by several commands, and the parsing of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Script and patches

Script = Annotated[str, typer.Argument(help="Script to run; with -m the name of a module.")]
Arguments = Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")]
Module = Annotated[bool, typer.Option("-m", help="Run a module, like `python -m`.")]
Patches = Annotated[
    str | None, typer.Option(help="Comma-separated names of patches (see `wan-patches status`); default: all.")
]
Fidelity = Annotated[str, typer.Option(help="exact, or close to also allow patches that change rounding.")]
Gate = Annotated[
    bool, typer.Option("--gate/--no-gate", help="On accelerators, compare each operation with stock the first time.")
]

# Video

Prompt = Annotated[str | None, typer.Option(help="Description of the video.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the video.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Number of frames of the video.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise and of random weights.")]

# Machine and files

Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, npu, ...")]
Dtype = Annotated[str, typer.Option(help="Data type: fp32, bf16 or fp16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of torch threads on the CPU.")]
Chart = Annotated[Path | None, typer.Option(help="PNG file to draw a chart of the result to.")]


def names(patches: str | None) -> list[str] | None:
    """Splits a value of `Patches` into names; None stands for all patches."""
    return None if patches is None else [name.strip() for name in patches.split(",") if name.strip()]


def size(text: str | None) -> tuple[int, int] | None:
    """Parses a value of `Size` into width and height in pixels.

    Raises:
        typer.BadParameter: the text does not have the form WIDTHxHEIGHT.
    """
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter("the size must have the form WIDTHxHEIGHT, for example 832x480", param_hint="--size")
    return int(width), int(height)
