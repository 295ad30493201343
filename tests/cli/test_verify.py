"""`wan-patches verify`: its exit status, what it prints and what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
from typer.testing import CliRunner

import wan_patches
from wan_patches import cli
from wan_patches.ops import rope as rope_op
from wan_patches.testing.families import FAMILIES, images

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["verify", *arguments])


TINY = ("tiny:wan_t2v", "--frames", "5", "--steps", "1", "--repeat", "0", "--device", "cpu", "--dtype", "fp32")


def test_the_command_exits_with_0_if_all_bits_are_the_same(tmp_path):
    report, rows = tmp_path / "report.html", tmp_path / "rows.json"
    done = run(*TINY, "--report", str(report), "--json", str(rows), "--patches", "rope", "--patches", "frames,")
    assert done.exit_code == 0, done.output
    assert "Every bit is the same" in done.output
    assert "Every bit is the same" in report.read_text()
    assert set(json.loads(rows.read_text())["patches"]) == {"rope", "frames"}


def test_the_command_exits_with_1_and_names_the_patch(monkeypatch):
    reference = rope_op.apply_rotary_emb.reference
    monkeypatch.setattr(rope_op.apply_rotary_emb, "reference", lambda *args: reference(*args) + 1)
    done = run(*TINY)
    assert done.exit_code == 1
    assert "patch 'rope' in diffusers.models.transformers.transformer_wan" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny:wan_t3v"], "'wan_t3v' is not one of wan_t2v, "),
        (["no-such-folder"], "Cannot load the model no-such-folder"),
        (["tiny:wan_t2v", "--patches", "rpoe"], "unknown patch rpoe"),
        (["tiny:wan_t2v", "--fidelity", "near"], "'near' is not one of exact, close"),
        (["tiny:wan_t2v", "--size", "47x"], "WIDTHxHEIGHT"),
        (["tiny:wan_t2v", "--size", "47x31"], "Check that the model runs without wan-patches."),
        (["tiny:wan_t2v", "--report", "no-such-folder/report.html"], "there is no folder no-such-folder"),
        (["tiny:wan_t2v", "--json", "."], "is a folder"),
        (["tiny:wan_t2v", "--dtype", "fp7"], "'fp7' is not one of fp32, bf16, fp16"),
        ([*TINY, "--patches", "timesteps"], "NOT verified: no patch was in force"),
        (["tiny:wan22_i2v", "--image", "no-such-photo.png"], "Cannot read the image"),
    ],
)
def test_the_command_exits_with_2_if_the_verdict_is_unknown(arguments, message):
    done = run(*arguments, "--device", "cpu")
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_command_exits_with_2_if_stock_is_nondeterministic(monkeypatch):
    from wan_patches.bench import verification

    def subject(*args, **kwargs):
        found, calls = build(*args, **kwargs), itertools.count(1)

        def another_run(pipe, step, timestep, given):
            return {"latents": given["latents"] + 1e-2 * next(calls)}

        given = {**found.arguments(), "callback_on_step_end": another_run}
        return dataclasses.replace(found, arguments=lambda: given)

    build = verification.subject
    monkeypatch.setattr(verification, "subject", subject)
    done = run(*TINY)
    assert done.exit_code == 2
    assert "NOT verified: runs of stock code differ from each other" in done.output


def test_file_errors_do_not_hide_the_result(monkeypatch, tmp_path):
    def fail(found, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wan_patches.Verification, "save_html", fail)
    report, rows = tmp_path / "report.html", tmp_path / "rows.json"
    done = run(*TINY, "--patches", "frames", "--report", str(report), "--json", str(rows))
    assert done.exit_code == 2
    assert "Every bit is the same" in done.output
    assert "report.html was not written: [Errno 28] No space left on device" in done.output
    assert json.loads(rows.read_text())["exact"] is True


def test_the_command_accepts_a_folder_and_names_missing_inputs(tmp_path):
    folder, photo = tmp_path / "model", tmp_path / "photo.png"
    FAMILIES["wan22_i2v"].build().save_pretrained(folder)
    images()[0].save(photo)
    rest = ("--size", "48x32", "--frames", "5", "--steps", "1", "--repeat", "0", "--device", "cpu", "--dtype", "fp32")
    done = run(str(folder), *rest)
    assert done.exit_code == 2
    assert "WanImageToVideoPipeline also needs image: give one with --image." in done.output
    done = run(str(folder), *rest, "--image", str(photo))
    assert done.exit_code == 0, done.output
    assert re.search(r"Every bit is the same, fast .*\(WanImageToVideoPipeline on cpu", done.output)
