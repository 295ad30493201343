"""The pipelines of the installed diffusers and the patches of their code."""

from __future__ import annotations

import diffusers
import pytest

import wan_patches
from wan_patches.bench import reach
from wan_patches.bench.compatibility import Row
from wan_patches.bench.reach import TILES, Pipeline

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def reports():
    """Those of the modules of four pipelines."""
    names = ("WanImageToVideoPipeline", "FluxPipeline", "StableDiffusionPipeline", "KandinskyV22Pipeline")
    classes = [getattr(diffusers, name) for name in names]
    with wan_patches.enabled():
        return classes, [report for report in wan_patches.status().reports if report.state == "active"]


def test_patches_are_found_through_components_and_imports(reports):
    wan, flux, stable, kandinsky = (reach._pipeline(cls, reports[1]) for cls in reports[0])
    assert wan.denoisers == ("WanTransformer3DModel",)
    expected = {"conditioning", "frames", "modulation", "preprocess", "qk", "rope", "step_loop", "vae"}
    assert set(wan.patches) == expected
    assert flux.denoisers == ("FluxTransformer2DModel",)
    assert set(flux.patches) == {"rope", TILES}  # a function that the transformer's module imports
    assert set(stable.patches) == {TILES}
    assert kandinsky.patches == ()


def test_denoisers_take_the_runs_of_their_pipelines_and_their_own():
    pipelines = [
        Pipeline("APipeline", ("A",), ("rope", TILES)),
        Pipeline("AToBPipeline", ("A",), (TILES,)),
        Pipeline("BPipeline", ("B",), (TILES,)),
        Pipeline("CPipeline", ("C",), ()),
        Pipeline("DPipeline", ("D",), ("frames",)),
    ]
    runs = [
        Row("a", "APipeline", ("rope",), {}, True, {"rope": (3, 4)}),
        Row("alone", "A", ("qk",), {}, True, {"qk": (1_000, 1_000)}),
        Row("c", "C", ("rope",), {}, False, {"rope": (0, 2)}),
    ]
    lines, few = reach.by_denoiser(pipelines, runs)
    assert lines == [
        ["A", "A, AToB", "qk, rope", "2", "1,003 of 1,004", "yes"],
        ["C", "C", "rope", "1", "0 of 2", "**no**"],
        ["D", "D", "frames", "0", "not run", "-"],
    ]
    assert [one.name for one in few] == ["BPipeline"]


def test_records_are_read_as_written(tmp_path):
    pipelines = [Pipeline("APipeline", ("A",), ("rope",)), Pipeline("BPipeline", (), ())]
    reach.write_json(tmp_path / "pipelines.json", pipelines)
    assert reach.read_json(tmp_path / "pipelines.json") == pipelines
