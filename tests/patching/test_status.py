from __future__ import annotations

import json
from dataclasses import replace

import wan_patches
from wan_patches import Fidelity, Report, Status
from wan_patches.patching.status import details
from wan_patches.patching.tally import Way
from wan_patches.tables import text


def _lines(*reports):
    return [line.strip() for line in text(*details(Status(reports)), width=200).splitlines()]


def _report(state, fidelity, **implementations):
    return Report("norm", "diffusers.a", ("f",), state, "", fidelity, implementations)


def test_patches_that_are_off_are_not_listed_as_running():
    exact, close = _report("active", Fidelity.EXACT, GPUs="two"), _report("off", Fidelity.CLOSE, GPUs="one")
    assert _lines(exact, close)[-1] == "norm (exact): two on GPUs"
    assert not any("(close)" in line for line in _lines(exact, close))


def test_each_fidelity_and_each_implementation_is_listed_once():
    exact, close = _report("active", Fidelity.EXACT, GPUs="two"), _report("active", Fidelity.CLOSE, GPUs="one")
    other = _report("active", Fidelity.EXACT, CPUs="three")
    assert _lines(exact, close, exact, other)[-2:] == [
        "norm (exact): two on GPUs; three on CPUs",
        "norm (close): one on GPUs",
    ]


def test_exact_patches_are_listed_as_exact():
    import diffusers.models.transformers.transformer_wan  # noqa: F401

    with wan_patches.enabled() as status:
        shown = str(replace(status, verbose=True))
    assert "modulation (exact): " in shown
    assert "(close): " not in shown
    with wan_patches.enabled(fidelity="close") as status:
        assert "modulation (close): " in str(replace(status, verbose=True))


REASONS = [f"reason number {n} of many, which takes more than one line of eighty columns, for sure" for n in range(60)]


def test_the_summary_has_at_most_40_lines_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    reports = [Report(f"patch_{n % 15}", f"diffusers.m{n}", ("f",), "skipped", REASONS[n]) for n in range(60)]
    lines = str(Status(tuple(reports), advice=("buy " * 50,))).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert {"patch_0", "patch_14"} <= {line.split()[0] for line in lines if line}
    assert REASONS[0].split(",")[0] in " ".join(lines)
    assert any(line.startswith("... ") and line.endswith("lines more") for line in lines)


def test_the_summary_says_what_ran_where_and_why_not():
    slow = Way("diffusers.models.transformers.transformer_wan", "m:f", "op", "", "too few")
    ways = {slow: 3, slow._replace(form="chunks", reason=""): 5}
    reports = (
        Report("rope", "diffusers.models.transformers.transformer_wan", ("f",), "active", ways=ways),
        Report("rope", "diffusers.models.transformers.transformer_helios", ("f",), "waiting for import"),
        Report("frames", "diffusers.video_processor", ("f",), "waiting for import"),
        Report("vae", "diffusers.autoencoder", ("f",), "off", ways=ways),
    )
    lines = [" ".join(line.split()) for line in str(Status(reports)).splitlines()]
    assert "rope 1 of 1 module 5 of 8 wan" in lines
    assert "frames not imported" in lines
    assert "rope 3: too few" in lines
    assert "Off: vae" in lines


def test_json_has_every_report():
    way = Way("diffusers.a", "m:f", "op", "chunks")
    found = json.loads(Status((Report("rope", "diffusers.a", ("f",), "active", ways={way: 2}),)).to_json())
    assert found["patches"][0]["calls"] == [
        {"module": "diffusers.a", "entry": "m:f", "op": "op", "form": "chunks", "reason": "", "calls": 2}
    ]
    assert found["gate"] == found["advice"] == []


def test_the_summary_fits_where_every_patch_was_called_in_many_modules(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    way = Way("diffusers.a", "m:f", "op", "", "a reason that is as long as most of those that forms give for stock")
    called = [
        Report(f"patch_{patch}", f"diffusers.pipelines.pipeline_of_family_{n}", ("f",), "active", ways={way: 1})
        for patch in range(11)
        for n in range(16)
    ]
    off = [Report(f"a_patch_that_is_off_{n}", "diffusers.b", ("f",), "off") for n in range(12)]
    lines = str(Status((*called, *off))).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert any("13 more" in line for line in lines)
    assert lines[-1].startswith("Each function: ")
