"""`wan-patches bench gpu --device emulated`: the steps as on a GPU, at tiny sizes, kernels in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from typer.testing import CliRunner

from wan_patches.bench import gpu
from wan_patches.cli import app
from wan_patches.ops.dispatch import ops

pytestmark = pytest.mark.npu_emulated


@pytest.mark.usefixtures("_device")  # builds it, or says why not
@pytest.mark.parametrize(
    "names", [("kernels", "block-14b-480p"), pytest.param((), marks=pytest.mark.slow, id="all")], ids="+".join
)
def test_every_step_runs_and_the_report_says_so(names, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    if names:
        monkeypatch.setattr(gpu, "STEPS", tuple(step for step in gpu.STEPS if step.name in names))
    done = CliRunner().invoke(app, ["bench", "gpu", "--device", "emulated", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output + "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "MEND" not in done.output
    left_out = [step.name for step in gpu.STEPS if not step.tiny]
    assert {name for name, outcome in gpu.outcomes(tmp_path).items() if outcome.state != gpu.DONE} == set(left_out)
    assert re.search(r"^OK +kernels: \d\d exact; ", done.output, re.M)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    importlib.import_module("wan_patches.bench.forms")  # declares the ops
    with_kernels = {op.name for op in ops() if any(form.device == "cuda" for form in op.forms)}
    with_kernels -= {"convolution + lengths", "convolution + residual"}  # mostly the convolution, no copy of memory
    assert {row["op"] for row in rows if row["kernels"]} == with_kernels
    assert all(row["gb"] > 0 and row["copy_gb_s"] > 0 for row in rows if row["form"])
