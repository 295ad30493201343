"""The record of one diffusers version, and the README's table made from several records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from wan_patches import cli
from wan_patches.bench import compatibility
from wan_patches.bench.compatibility import JUDGED, Row, markdown, measure, read_json
from wan_patches.bench.measure import MeasurementError
from wan_patches.ops import frames
from wan_patches.ops.dispatch import SMALL
from wan_patches.testing.families import FAMILIES, available

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "examples" / "results" / "compatibility"
PRODUCTION = RECORDS.with_name("compatibility-production")

T2V = Row("wan_t2v", "WanPipeline", ("frames", "rope"), {}, True, {"frames": (1, 1), "rope": (7, 8)})


@pytest.mark.usefixtures("one_thread")
def test_a_family_is_recorded_with_the_patches_that_ran():
    (row,) = measure(["wan22_i2v"])
    assert (row.family, row.pipeline) == ("wan22_i2v", "WanImageToVideoPipeline")
    assert set(row.patches) >= {"conditioning", "frames", "preprocess", "rope", "vae"}
    assert row.skipped == {}
    assert row.identical


#: What takes stock's way at any size, by patch.
STOCKS = {"preprocess": {"preprocess: the input is not PIL images in RGB"}}  # VACE's mask


@pytest.mark.loop("wan_t2v", "wan_vace", "skyreels_v2_df_i2v", "helios_i2v")
@pytest.mark.parametrize("name", available())
def test_all_calls_are_computed_by_forms(name):
    """On a CPU, minimum sizes are ignored; `bench forms` measures from which sizes on forms are fast."""
    (row,) = measure([name])
    assert row.identical
    assert set(row.calls) >= {"frames", "vae"}
    for patch, (taken, total) in row.calls.items():
        others = row.reasons.get(patch, {})
        assert set(others) <= STOCKS.get(patch, set()), (patch, others)
        assert taken == total - sum(others.values()) > 0, (patch, row.reasons)


#: Families whose images have too few tokens for the norms of their keys, as the README says.
TOO_FEW = {family for family in FAMILIES if family.startswith(("wan21_", "wan_animate", "chronoedit"))}
TOO_FEW |= {"skyreels_v2_i2v"}


def test_at_production_sizes_nearly_all_calls_are_fast():
    (*_, record) = read_json(PRODUCTION).values()
    assert {row.family for row in record} == set(FAMILIES)
    for row in record:
        assert row.identical
        assert {"frames", "vae"} <= set(row.calls)
        for patch in set(JUDGED) & set(row.calls):
            fast, total = row.calls[patch]
            if patch != "qk" or row.family not in TOO_FEW:
                assert fast >= 0.95 * total > 0, (row.family, patch)
            assert all(reason.endswith(SMALL) for reason in row.reasons.get(patch, {})), (row.family, patch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan_t2v", "wan22_i2v", "wan_vace"])
def test_minimum_sizes_of_forms_apply_in_production(name):
    (row,) = measure([name], production=True)
    assert row.identical
    for patch in ("modulation", "qk", "rope", "frames", "vae"):
        taken, total = row.calls[patch]
        assert taken == total > 0


@pytest.mark.usefixtures("one_thread")
def test_a_different_bit_is_recorded(monkeypatch, tmp_path):
    ours = frames.video_to_float
    monkeypatch.setattr(frames, "video_to_float", lambda *args: ours(*args).clamp_(max=0.5))
    (row,) = measure(["wan_t2v"])
    assert not row.identical
    monkeypatch.setattr(compatibility, "measure", lambda families, production: [row])
    done = CliRunner().invoke(cli.app, ["bench", "compatibility", "--json", str(tmp_path)])
    assert done.exit_code == 1
    assert "NOT bit-identical: wan_t2v." in done.output
    (path,) = tmp_path.iterdir()
    assert path.name == f"{diffusers.__version__}-torch-{torch.__version__.partition('+')[0]}.json"
    assert json.loads(path.read_text())["rows"][0]["identical"] is False
    assert read_json(tmp_path) == {diffusers.__version__: [row]}


@pytest.mark.usefixtures("one_thread")
def test_a_skipped_patch_is_recorded_with_its_reason(monkeypatch):
    from diffusers.models.transformers import transformer_wan

    def rewritten(self, attn, hidden_states, *args, **kwargs):
        return hidden_states

    monkeypatch.setattr(transformer_wan.WanAttnProcessor, "__call__", rewritten)
    monkeypatch.setattr(diffusers.WanImageToVideoPipeline, "__call__", rewritten)  # not used by text to video
    (row,) = measure(["wan_t2v"])
    assert "rope" not in row.patches
    assert "frames" in row.patches
    assert sorted(row.skipped) == ["qk", "rope"]
    assert all("WanAttnProcessor.__call__" in reason for reason in row.skipped.values())


def test_unavailable_families_are_named(monkeypatch):
    with pytest.raises(MeasurementError, match=r"Unknown family 'wan_9'; known: wan_t2v, "):
        measure(["wan_9"])
    monkeypatch.setitem(FAMILIES, "helios", dataclasses.replace(FAMILIES["helios"], since=(99, 1)))
    with pytest.raises(
        MeasurementError, match=r"helios requires diffusers 99.1 or newer, not .*; available families: wan_t2v, "
    ):
        measure(["helios"])


def test_the_table_lists_the_patches_of_each_version():
    helios = Row("helios", "HeliosPipeline", ("rope",), {}, True)
    without = Row("wan_t2v", "WanPipeline", ("frames",), {"rope": "the text of __call__ is not known"}, True)
    other = dataclasses.replace(helios, family="helios_i2v", identical=False, reasons={"rope": {"rope: few": 3}})
    assert markdown({"0.35.2": [without], "0.36.0": [T2V, helios], "0.40.0": [helios, T2V, other]}) == "\n".join(
        [
            "| pipeline | patches | 0.35.2 | 0.36.0 | 0.40.0 |",
            "| --- | --- | --- | --- | --- |",
            "| `WanPipeline` | frames, rope | not rope | 8 of 9 | 8 of 9 |",
            "| `HeliosPipeline` | rope | - | not exercised | **differs** |",
            "",
            r"- rope, 0.35.2: the text of \_\_call\_\_ is not known",
            "- rope, 3 calls in stock's operations: rope: few",
        ]
    )


def test_versions_are_in_order_and_another_torch_is_named(tmp_path):
    for nth, versions in enumerate([("0.10.0", "2.13.0"), ("0.9.0", "2.13.0"), ("0.10.0", "2.9.1")]):
        content = {"versions": dict(zip(("diffusers", "torch"), versions)), "rows": [dataclasses.asdict(T2V)]}
        (tmp_path / f"{nth}.json").write_text(json.dumps(content))
    assert read_json(tmp_path) == {name: [T2V] for name in ("0.9.0", "0.10.0, torch 2.9.1", "0.10.0")}
    assert list(read_json(tmp_path)) == ["0.9.0", "0.10.0, torch 2.9.1", "0.10.0"]


def test_no_recorded_version_differs():
    records = read_json(RECORDS)
    assert records
    assert all(row.identical for record in records.values() for row in record)


def test_models_of_other_families_have_rows():
    from wan_patches.bench.compatibility import measure_others, others

    rows = measure_others(["flux", "qwen_image"])
    assert [(row.family, row.patches, row.identical) for row in rows] == [
        ("flux", ("rope",), True),
        ("qwen_image", ("qk", "rope", "vae"), True),
    ]
    assert all(fast == total > 0 for row in rows for fast, total in row.calls.values())
    text = others(rows)
    assert "| flux | `FluxPipeline` | rope | 12 of 12 | yes |" in text
    with pytest.raises(MeasurementError, match="flux"):
        measure_others(["nothing"])


#: Prompts that are sorted on accelerators only, and norms of channels that do not lie next to each other.
STOCK = {
    *((name, "conditioning") for name in ("hunyuan_video_1.5", "hunyuan_image")),
    *((name, "qk") for name in ("ace_step", "ltx_i2v", "ltx_condition", "prx")),
}


def test_record_of_other_families_is_exact_and_fast():
    *_, newest = read_json(RECORDS.with_name("compatibility-others")).values()
    assert len(newest) > 35
    for row in newest:
        assert row.identical
        assert row.calls
        slow = {(row.family, patch) for patch, (fast, total) in row.calls.items() if fast != total}
        assert slow == {pair for pair in STOCK if pair[0] == row.family}
