"""The numbers on the results page, and the front page's picture, are those of the recorded files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from wan_patches.bench import readme, variants

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"


HOW = "make it anew: python -m wan_patches.bench.readme"


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, tables in readme.PAGES.items() for name in tables])
def test_the_page_has_the_table_of_the_results(page, name):
    _, table, _ = readme.parts((RESULTS / page).read_text(), name)
    assert table == readme.PAGES[page][name](RESULTS), HOW


def test_the_front_page_shows_the_picture_of_the_results():
    assert (RESULTS / readme.PICTURE).read_text() == readme.picture(RESULTS), HOW
    assert f"(examples/results/{readme.PICTURE})" in (ROOT / "README.md").read_text()


def test_the_picture_is_small_and_still():
    text = readme.picture(RESULTS)
    assert len(text) < 20_000
    drawn = ElementTree.fromstring(text)
    assert {element.tag.rpartition("}")[2] for element in drawn.iter()} == {"svg", "title", "rect", "text"}
    assert not re.search(r"\b(href|on\w+|style)=", text)
    written = [element.text for element in drawn.iter() if element.tag.endswith("}text")]
    rows = json.loads((RESULTS / "cpu-vae-bf16.json").read_text())["rows"]
    row = next(row for row in rows if (row["op"], row["shape"]) == ("decode", "5x352x640"))
    times = f"{row['stock_ms'] / 1e3:.2f} → {row['patched_ms'] / 1e3:.2f} s"
    assert written[written.index(times) - 1] == f"{row['patched_ms'] / row['stock_ms']:.2f}"


def test_one_command_makes_the_tables_and_the_picture(tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    (folder / readme.PICTURE).unlink()
    page = re.sub(r"(<!-- vae -->).*(<!-- /vae -->)", r"\1\nold\n\2", (RESULTS / "README.md").read_text(), flags=re.S)
    (folder / "README.md").write_text(page)
    readme.main(folder)
    for name in (*readme.PAGES, readme.PICTURE):
        assert (folder / name).read_text() == (RESULTS / name).read_text()


def test_tables_are_written_between_their_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "PAGES", {"README.md": {"sharding": readme.TABLES["sharding"]}})
    row = json.loads((RESULTS / "cpu-sharding.json").read_text())["rows"][0]
    (tmp_path / "cpu-sharding.json").write_text(json.dumps({"rows": [row | {"held_mib": 1234.4, "exact": False}]}))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- sharding -->\nold\n<!-- /sharding -->\nafter\n")
    readme.update(page, tmp_path)
    before, _, after = page.read_text().partition("\n|")
    assert before == "before\n<!-- sharding -->"
    assert "1,234 MiB" in after
    assert after.endswith("| **no** |\n<!-- /sharding -->\nafter\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines <!-- sharding -->"):
        readme.update(page, tmp_path)


CPU = {"device": "cpu", "cpu": "AMD EPYC", "threads": 2}
GPU = {"device": "NVIDIA H200", "cpu": "AMD EPYC", "threads": 16}
RESULT = variants.Result(
    **{"bench": "model", "shape": "14b-480p", "dtype": "bf16", "video": (21, 60, 104), "tokens": 32760, "layers": 40},
    **{"of_layers": 40, "floor_ms": 2040.0, "matmuls": 406, "attentions": 80, "copy_gb_s": 4000.0},
    **{"deterministic": True, "patches": ("rope",)},
    rows=(
        variants.Row("stock", ms=2800.0, peak_mib=5000.0, exact=True),
        variants.Row("patched", ms=2100.0, peak_mib=4000.0, exact=True),
        variants.Row("compiled stock", ms=2090.0, peak_mib=4500.0, exact=False),
        variants.Row("compiled patched", ms=2200.0, peak_mib=4500.0, exact=False),
    ),
)


def _kept(folder, name, facts, result):
    (folder / name).write_text(json.dumps({"machine": facts, **variants.to_json(result)}))


def test_missing_measurements_are_marked(tmp_path):
    table = readme.TABLES["performance"](tmp_path).splitlines()
    assert len(table) == 2 + 11
    assert all(line.endswith("| not measured yet | - |") for line in table[2:])


def test_reached_and_missed_goals_are_distinguished(tmp_path):
    _kept(tmp_path, "h200-model-14b-480p-bf16.json", GPU, RESULT)
    _kept(tmp_path, "h200-model-helios-bf16.json", GPU, replace(RESULT, shape="helios", floor_ms=1900.0))
    rope = variants.Rope(gb=1.3, stock_ms=4.0, patched_ms=1.3 / (0.87 * 4000) * 1e3, exact=True, copy_gb_s=4000.0)
    _kept(tmp_path, "h200-block-14b-480p-bf16.json", GPU, replace(RESULT, bench="block", rope=rope))
    table = readme.TABLES["performance"](tmp_path)
    assert "| forward, Wan 14B 480p | at most 1.040 of the floor | **1.029** | NVIDIA H200 |" in table
    assert "| forward, Wan 14B 480p | at most 0.820 of stock | **0.750** | NVIDIA H200 |" in table
    assert "| forward, Wan 14B 480p | at most 1.000 of stock, compiled | 1.005, missed | NVIDIA H200 |" in table
    assert "| forward, Wan 14B 480p | at most 1.000 of stock's peak of memory | **0.800** | NVIDIA H200 |" in table
    assert "| forward, Helios | at most 1.060 of the floor | 1.105, missed | NVIDIA H200 |" in table
    assert "| at least 85% of a copy's bandwidth | **87%** | NVIDIA H200 |" in table
    assert "| block, Wan 1.3B, on a CPU | at most 0.860 of stock | not measured yet | - |" in table
    assert "| anything patched | at least 0.97 times as fast as stock | 0.95, missed | " in table
    line = "| model 14b-480p: 32,760 tokens, bf16 | NVIDIA H200 | 2,800 (1.00) | 2,100 (0.75) | - | 2,090 (0.75) |"
    assert f"{line} 2,200 (0.79) | 2,040 | 5,000, 4,000 MiB | yes |" in table


def test_folders_of_the_run_on_a_gpu_count(tmp_path):
    (tmp_path / "h200").mkdir()
    _kept(tmp_path / "h200", "model-14b-480p.json", GPU, RESULT)
    row = {"op": "decode", "shape": "1x2", "dtype": "fp32", "ratio": 0.8}
    (tmp_path / "h200" / "vae-fp32-480p.json").write_text(json.dumps({"machine": GPU, "rows": [row]}))
    table = readme.TABLES["performance"](tmp_path)
    assert "| at most 1.040 of the floor | **1.029** | NVIDIA H200 |" in table
    assert "| 0.80, missed | decode 1x2, fp32, NVIDIA H200 |" in table


def test_a_goal_applies_to_one_kind_of_device_and_to_bf16(tmp_path):
    block = replace(RESULT, bench="block", shape="1.3b-480p", other_cores=1.5)
    _kept(tmp_path, "h200-block-1.3b-480p-bf16.json", GPU, block)
    _kept(tmp_path, "cpu-block-1.3b-480p-fp32.json", CPU, replace(block, dtype="fp32"))
    goal = "| block, Wan 1.3B, on a CPU | at most 0.860 of stock |"
    assert f"{goal} not measured yet | - |" in readme.TABLES["performance"](tmp_path)
    _kept(tmp_path, "cpu-block-1.3b-480p-bf16.json", CPU, block)
    assert f"{goal} ~**0.750** | AMD EPYC, 2 threads |" in readme.TABLES["performance"](tmp_path)


def test_single_operations_count_for_the_lowest_speed(tmp_path):
    row = {"op": "rope", "shape": "1x2", "dtype": "bf16", "ratio": 0.9}
    (tmp_path / "cpu-ops-bf16.json").write_text(json.dumps({"machine": CPU, "rows": [row]}))
    assert "| 0.90, missed | rope 1x2, bf16, AMD EPYC, 2 threads |" in readme.TABLES["performance"](tmp_path)
