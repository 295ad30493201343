"""Lists all pipelines of the installed diffusers with the patches of their code.

A pipeline has a patch if the patch changes its own module, that of a class of its components, or a function or class
that one of these modules imports. Whether the changed code is called, and by how many calls, is not visible here: the
records of `wan_patches.bench.compatibility` say so for the pipelines that run small.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from rich import box
from rich.table import Table

import wan_patches
from wan_patches.bench.compatibility import Row
from wan_patches.patching import tally

#: Patches that add a choice of the user's to every pipeline, and change none.
_OF_CHOICE = ("attention_backends",)
_AUTOENCODERS = ("autoencoder_kl_wan", "autoencoder_kl_qwenimage")  # `vae` makes more of these than cross-fading tiles
TILES = "vae (tiles)"
#: Beginnings of the names under which pipelines keep the models that remove noise.
_DENOISERS = ("transformer", "unet", "prior", "decoder")


@dataclass(frozen=True)
class Pipeline:
    """One pipeline class.

    denoisers: the classes of its transformers or UNets.
    patches: the names of the patches; `TILES` for `vae` in an autoencoder of which only tiles are patched.
    """

    name: str
    denoisers: tuple[str, ...]
    patches: tuple[str, ...]


def measure() -> list[Pipeline]:
    """Imports all pipelines of the installed diffusers, and returns them by name."""
    classes = list(_pipelines())
    with wan_patches.enabled():
        reports = [report for report in wan_patches.status().reports if report.state == "active"]
    return [_pipeline(cls, reports) for cls in classes]


def table(pipelines: Iterable[Pipeline]) -> Table:
    """Returns the pipelines as a table."""
    found = Table("pipeline", "denoisers", "patches", box=box.SIMPLE, pad_edge=False)
    for pipeline in pipelines:
        found.add_row(pipeline.name, ", ".join(pipeline.denoisers), ", ".join(pipeline.patches))
    return found


def write_json(path: Path, pipelines: Iterable[Pipeline]) -> None:
    """Writes the pipelines and the version of diffusers."""
    content = {"diffusers": version("diffusers"), "pipelines": [asdict(pipeline) for pipeline in pipelines]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> list[Pipeline]:
    """Returns the pipelines of a record."""
    pipelines = json.loads(path.read_text())["pipelines"]
    return [Pipeline(one["name"], tuple(one["denoisers"]), tuple(one["patches"])) for one in pipelines]


def by_denoiser(pipelines: Sequence[Pipeline], runs: Sequence[Row]) -> tuple[list[list[str]], list[Pipeline]]:
    """Returns a line for each denoiser that has patches, and the pipelines that have at most tiles.

    runs: small runs of pipelines or of their denoisers alone. A line has the denoisers, their pipelines, the patches,
    the number of runs, the calls by forms in them, and whether all bits are stock's.
    """
    grouped: dict[tuple[str, ...], list[Pipeline]] = {}
    for one in pipelines:
        grouped.setdefault(one.denoisers, []).append(one)
    lines: list[list[str]] = []
    few: list[Pipeline] = []
    for denoisers, members in grouped.items():
        names = {*denoisers, *(one.name for one in members)}
        found = [row for row in runs if row.pipeline in names]
        called = {patch for row in found for patch in row.patches}
        few += [one for one in members if not called and set(one.patches) <= {TILES}]
        members = [one for one in members if one not in few]
        if not members:
            continue
        patches = sorted({*called, *(patch for one in members for patch in one.patches)} - {TILES})
        taken, total = tally.total(count for row in found for count in row.calls.values())
        bits = "-" if not found else "yes" if all(row.identical for row in found) else "**no**"
        pipes = ", ".join(one.name.removesuffix("Pipeline") for one in members)
        calls = f"{taken:,} of {total:,}" if found else "not run"
        lines.append([", ".join(denoisers) or "-", pipes, ", ".join(patches), str(len(found)), calls, bits])
    return sorted(lines), few


def _pipelines() -> Iterator[type]:
    for name in dir(diffusers):
        if name.endswith("Pipeline"):
            found = getattr(diffusers, name)  # without its dependencies, an object that says so
            is_one = isinstance(found, type) and found.__module__.startswith("diffusers.pipelines.")
            if is_one and found is not diffusers.DiffusionPipeline:
                yield found


def _pipeline(cls: Any, reports: Sequence[wan_patches.Report]) -> Pipeline:
    hints = typing.get_type_hints(cls.__init__)
    components = {name: list(_classes(hint)) for name, hint in hints.items()}
    denoisers = [
        found.__name__
        for name, classes in components.items()
        if name.startswith(_DENOISERS)
        for found in classes
        if found.__module__.startswith("diffusers.models.")
    ]
    used = {cls, *(found for classes in components.values() for found in classes)}
    bases = [base for found in used for base in found.__mro__[:-1] if not base.__name__.endswith("Mixin")]
    names = {base.__module__ for base in bases} - _GENERAL
    modules = [sys.modules[name] for name in names if name.startswith("diffusers.")]
    patches = {_name(report) for report in reports if any(_reaches(report, module) for module in modules)}
    return Pipeline(cls.__name__, tuple(dict.fromkeys(denoisers)), tuple(sorted(patches - {*_OF_CHOICE})))


#: Modules of base classes. They, and those of mixins, import models and layers of all kinds.
_GENERAL = {"diffusers.pipelines.pipeline_utils", "diffusers.models.modeling_utils", "diffusers.configuration_utils"}


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _reaches(report: wan_patches.Report, module: ModuleType) -> bool:
    if report.module == module.__name__:
        return True
    owners = [(name, getattr(sys.modules[report.module], name, None)) for name in map(_top, report.targets)]
    return any(owner is not None and vars(module).get(name) is owner for name, owner in owners)


def _top(target: str) -> str:
    return target.partition(".")[0]


def _name(report: wan_patches.Report) -> str:
    is_whole = report.name != "vae" or report.module.rpartition(".")[2] in _AUTOENCODERS
    return report.name if is_whole else TILES
