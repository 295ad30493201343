"""Runs a photograph through real pipelines, stock and patched, in one process: times, equal bits, videos, a picture.

Without a model, the pipelines have the published architectures, reduced in size, and random weights: the images are
meaningless, but their equality is not. With a model, the demo runs its real pipeline.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import wan_patches
from wan_patches.bench.measure import MeasurementError
from wan_patches.bench.stages import LATENTS, POSTPROCESS, STAGES, Run, record
from wan_patches.testing.families import FAMILIES

DEFAULT_PHOTO = "mpl-data/sample_data/grace_hopper.jpg"  # in matplotlib, which is not imported for it
PROMPT = "A portrait, the camera moves slowly to the left"
AMPLIFIED = 16  # factor of the differences in the contact sheet

_SMALL = ("wan22_i2v", "helios_i2v")
_SIZE, _FRAMES, _STEPS = (256, 320), 17, 2
#: Fewer heads than the published models, of the same width.
_TRANSFORMER = {"num_attention_heads": 4}
#: Name of the dtype argument of `from_pretrained`.
_DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
_CALM = 1.3  # longest total over shortest of the same code; medians of a few runs tolerate no more
_VAE = {"base_dim": 4}  # convolutions, which no patch changes, would take most of the time on a CPU


@dataclass(frozen=True)
class Subject:
    """A pipeline and its arguments; `arguments` returns new ones, with a new generator, for every call."""

    name: str
    pipe: Any
    arguments: Callable[[], dict[str, Any]]
    image: Image.Image | None = None
    fps: int = 16


@dataclass(frozen=True)
class Comparison:
    """The measured runs of one subject; `stock[i]` and `patched[i]` ran one after the other.

    Only the first stock run and the first patched run keep their outputs, since videos are large.

    same: by stage, in order, whether every patched run gave the bits of the first stock run.
    deterministic: whether every stock run gave these bits; if not, comparisons are meaningless.
    """

    subject: Subject
    stock: tuple[Run, ...]
    patched: tuple[Run, ...]
    same: dict[str, bool]
    deterministic: bool

    def first_difference(self) -> str | None:
        """Returns the first stage with a difference, or None."""
        return next((stage for stage, same in self.same.items() if not same), None)


def default_photo() -> Path:
    """Returns the path of the photograph in matplotlib's sample data.

    Raises:
        MeasurementError: matplotlib or its sample data is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (photo := Path(folder) / DEFAULT_PHOTO).is_file():
            return photo
    raise MeasurementError(
        'The default photograph is part of matplotlib: pip install "wan-patches[demo]", or give one with --image.'
    )


def open_image(path: Path) -> Image.Image:
    """Returns the image at `path` in RGB; raises `MeasurementError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise MeasurementError(f"Cannot read the image {path.name}: {error}") from None


def small_subjects(
    image: Image.Image,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    families: Sequence[str] = _SMALL,
    **build: Any,
) -> list[Callable[[], Subject]]:
    """Returns builders of small pipelines, one for each of `families` that the installed diffusers has.

    `dtype` applies to the transformer and the encoders; the autoencoder is in fp32, as in diffusers' documentation of
    Wan. `build` is passed to the builders of `wan_patches.testing.families` and overrides the defaults of the demo.
    """
    options = {"head_dim": 128, "transformer": _TRANSFORMER, "vae": _VAE, "seed": seed, **build}

    def make(name: str) -> Subject:
        family = FAMILIES[name]
        pipe: Any = family.build(dtype=dtype, **options)
        pipe.to(device)
        more: dict[str, Any] = {}
        if "num_latent_frames_per_chunk" in family.call:  # one chunk, as long as in the published model
            more["num_latent_frames_per_chunk"] = ((frames or _FRAMES) - 1) // 4 + 1

        def arguments() -> dict[str, Any]:
            return family.inputs(
                image=image,
                size=size or _SIZE,
                frames=frames or _FRAMES,
                steps=steps or _STEPS,
                prompt=prompt or PROMPT,
                generator=torch.Generator(device).manual_seed(seed),
                output_type="pil",
                **more,
            )

        return Subject(name, pipe, arguments, image if "image" in family.takes else None)

    return [functools.partial(make, name) for name in families if FAMILIES[name].available]


def model_subject(
    model: str,
    image: Image.Image | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Subject:
    """Loads a pipeline from a folder or from the Hub. Omitted arguments have the defaults of the pipeline.

    Raises:
        MeasurementError: the model cannot be loaded.
    """
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{_DTYPE: dtype}).to(device)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeasurementError(f"Cannot load the model {model}: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipe.__call__).parameters
    width, height = size or (None, None)
    chosen: dict[str, Any] = {
        "image": image,
        "height": height,
        "width": width,
        "num_frames": frames,
        "frames": frames,
        "num_inference_steps": steps,
    }
    given = {name: value for name, value in chosen.items() if value is not None and name in takes}

    def arguments() -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        return {"prompt": prompt or PROMPT, "generator": generator, "output_type": "pil", **given}

    return Subject(Path(model).name, pipe, arguments, given.get("image"))


def compare(subject: Subject, device: torch.device, repeats: int, on_step: Callable[[], None]) -> Comparison:
    """Runs the subject stock and patched in turns: once as warm-up, then `repeats` measured runs of each."""
    runs: dict[bool, list[Run]] = {False: [], True: []}
    found: dict[bool, list[dict[str, bool]]] = {False: [], True: []}
    for nth in range(repeats + 1):
        for patched in (False, True) if nth % 2 else (True, False):
            with wan_patches.enabled(None if patched else ()):
                try:
                    run = record(subject.pipe, subject.arguments(), device, on_step)
                except ValueError as error:  # diffusers' check of the arguments
                    raise MeasurementError(f"{subject.name} refuses the arguments: {error}") from error
            if nth == 0:  # on accelerators, the first-sight gate returns stock's results for the first patched run
                continue
            runs[patched].append(run)
            if runs[False]:  # the first round begins with stock
                found[patched].append(runs[False][0].same(run))
            if len(runs[patched]) > 1:
                run.outputs = {}
    same = {stage: all(one.get(stage, False) for one in found[True]) for stage in found[True][0]}
    deterministic = all(all(one.values()) for one in found[False])
    return Comparison(subject, tuple(runs[False]), tuple(runs[True]), same, deterministic)


def demo(
    subjects: Sequence[Callable[[], Subject]], device: torch.device, out: Path, *, repeats: int = 3
) -> list[Comparison]:
    """Compares every subject; writes two videos for each and one contact sheet for all into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    comparisons = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} steps"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for make in subjects:
            task = progress.add_task("building", total=None)
            subject = make()
            progress.update(task, description=subject.name)
            comparison = compare(subject, device, repeats, functools.partial(progress.advance, task))
            comparisons.append(comparison)
            for side, run in (("stock", comparison.stock[0]), ("patched", comparison.patched[0])):
                write_video(out / f"{subject.name}-{side}.mp4", run.frames, subject.fps)
    contact_sheet(comparisons).save(out / "contact-sheet.png")
    return comparisons


def verdict(comparisons: Sequence[Comparison]) -> str | None:
    """Returns the failures as text, or None: the first stage with a difference, or nondeterministic stock runs."""
    found = []
    for comparison in comparisons:
        name, stage = comparison.subject.name, comparison.first_difference()
        if not comparison.deterministic:
            found.append(f"{name}: two stock runs differ, nothing can be compared.")
        elif stage is not None:
            found.append(f"{name}: NOT bit-identical, the first stage that differs is: {stage}.")
    return " ".join(found) or None


def table(comparisons: Sequence[Comparison]) -> Group:
    """Returns a table of each pipeline's stages: stock and patched medians, and bit equality."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    found.add_column("pipeline", no_wrap=True)
    found.add_column("stage", no_wrap=True)
    for column in ("stock ms", "patched ms", "ratio"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("bit-identical", no_wrap=True)
    for comparison in comparisons:
        same = comparison.same
        rows = [stage for stage in STAGES if stage in same]
        for nth, stage in enumerate(rows):
            name = comparison.subject.name if nth == 0 else ""
            stock, patched = (
                statistics.median(run.seconds.get(stage, 0.0) for run in runs)
                for runs in (comparison.stock, comparison.patched)
            )
            label = "latents" if stage == LATENTS and comparison.subject.image is None else stage
            found.add_row(name, label, *_times(stock, patched), _yes(same[stage]))
        totals = (statistics.median(r.total for r in runs) for runs in (comparison.stock, comparison.patched))
        video = f"{_yes(same[POSTPROCESS])} (video)"
        found.add_row("", "total", *_times(*totals), video, style="bold", end_section=True)
    active = sorted({report.name for report in _active()})
    rounds = len(comparisons[0].stock) if comparisons else 0
    notes = [f"Medians of {rounds} runs each, stock and patched in turns. Patches: {', '.join(active) or 'none'}."]
    spread = max((_spread(runs) for c in comparisons for runs in (c.stock, c.patched)), default=1.0)
    if spread > _CALM:
        notes.append(f"The machine was busy: the same code took up to {spread:.1f} times as long. Trust no ratio here.")
    return Group(found, *notes)


def _spread(runs: Sequence[Run]) -> float:
    totals = [run.total for run in runs]
    return max(totals) / min(totals)


def _active() -> Sequence[wan_patches.Report]:
    with wan_patches.enabled() as status:
        return [report for report in status.reports if report.state == "active"]


def _times(stock: float, patched: float) -> tuple[str, str, str]:
    return f"{stock * 1e3:,.1f}", f"{patched * 1e3:,.1f}", f"{stock / patched:.2f}x" if patched else ""


def _yes(same: bool) -> str:
    return "yes" if same else "NO"


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes frames, uint8 `(frames, height, width, 3)`, as MP4 (H.264)."""
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.height, stream.width = (size // 2 * 2 for size in frames.shape[1:3])  # halved colour planes
        stream.pix_fmt = "yuv420p"
        for frame in frames[:, : stream.height, : stream.width]:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode(None))


def contact_sheet(comparisons: Sequence[Comparison], columns: int = 6, height: int = 120) -> Image.Image:
    """Draws one picture for all pipelines: the input, stock and patched frames, and their amplified differences."""
    sheets = [_sheet(comparison, columns, height) for comparison in comparisons]
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _sheet(comparison: Comparison, columns: int, height: int, label: int = 16, gap: int = 4) -> Image.Image:
    stock, patched = comparison.stock[0].frames, comparison.patched[0].frames
    if stock.shape == patched.shape:
        difference = np.abs(stock.astype(np.int16) - patched)
        worst = f"largest of the whole video: {difference.max()}"
        amplified = (difference * AMPLIFIED).clip(0, 255).astype(np.uint8)
    else:
        worst, amplified = "the shapes differ", np.full_like(stock, 255)
    width = round(height * stock.shape[2] / stock.shape[1])
    name = comparison.subject.name
    rows = (
        (f"{name}: stock", stock),
        (f"{name}: patched", patched),
        (f"{name}: difference x {AMPLIFIED} ({worst})", amplified),
    )
    left = width + 2 * gap
    sheet = Image.new("RGB", (left + columns * (width + gap), len(rows) * (height + label) + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    if comparison.subject.image is not None:
        draw.text((gap, 2), "input", "black")
        photo = comparison.subject.image.copy()
        photo.thumbnail((width, height))
        sheet.paste(photo, (gap, label))
    for nth, (title, frames) in enumerate(rows):
        top = nth * (height + label)
        draw.text((left, top + 2), title, "black")
        for column, index in enumerate(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)):
            picture = Image.fromarray(frames[index])
            if nth == 2:  # averaging would dim a difference of one pixel
                picture = _brightest(picture, width, height)
            sheet.paste(picture.resize((width, height)), (left + column * (width + gap), top + label))
    return sheet


def _brightest(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Returns `picture` shrunk to the brightest pixel of each block."""
    block = max(1, picture.width // width, picture.height // height)
    pixels = np.asarray(picture)
    rows, columns = (np.arange(0, size, block) for size in pixels.shape[:2])
    return Image.fromarray(np.maximum.reduceat(np.maximum.reduceat(pixels, rows, axis=0), columns, axis=1))
