"""Options and arguments shared by several commands, and the parsing of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wan_patches.testing.names import FAMILIES

#: Names that commands refuse or complete before torch is imported; tests compare them with the registry and the bench.
PATCHES = (
    *("attention_backends", "conditioning", "frames", "modulation", "preprocess", "qk", "rope", "rotary_tables"),
    *("step_loop", "timesteps", "vae"),
)
DTYPES = ("fp32", "bf16", "fp16")
FIDELITIES = ("exact", "close")
ACCELERATORS = ("cuda", "npu", "emulated")
SHAPES = ("14b-480p", "14b-720p", "1.3b-480p", "ti2v-5b", "helios", "tiny", "tiny-ti2v", "tiny-helios")


def one_of(known: tuple[str, ...], help: str) -> Any:
    """An option that takes one of several words, and refuses others before anything is imported."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}")
        return value

    return typer.Option(callback=check, autocompletion=lambda: list(known), metavar="|".join(known), help=help)


def family(name: str, known: tuple[str, ...] = FAMILIES, param_hint: str = "families") -> str:
    """Returns the name of a small model.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=param_hint)
    return name


# Script and patches

Script = Annotated[str, typer.Argument(help="Script to run; with -m the name of a module.")]
Arguments = Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")]
Module = Annotated[bool, typer.Option("-m", help="Run a module, like `python -m`.")]
Patches = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Patches to use, with commas or the option repeated: {', '.join(PATCHES)}; default: all.",
        autocompletion=lambda: list(PATCHES),
    ),
]
Fidelity = Annotated[str, one_of(FIDELITIES, "`close` also allows patches that change rounding.")]
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
Dtype = Annotated[str, one_of(DTYPES, "Data type.")]
Shape = Annotated[str, one_of(SHAPES, "Model, and the size of its video.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of torch threads on the CPU.")]
Chart = Annotated[Path | None, typer.Option(help="PNG file to draw a chart of the result to.")]


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
