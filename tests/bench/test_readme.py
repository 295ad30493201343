"""The README's figures are those of the files that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wan_patches.bench import readme

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"


@pytest.mark.parametrize("name", readme.TABLES)
def test_the_readme_has_the_table_of_the_results(name):
    _, table, _ = readme.parts((ROOT / "README.md").read_text(), name)
    how = "python -m wan_patches.bench.readme README.md examples/results"
    assert table == readme.TABLES[name](RESULTS), f"make it anew: {how}"


def test_tables_go_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "TABLES", {"sharding": readme.TABLES["sharding"]})
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
