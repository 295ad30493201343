from __future__ import annotations

import wan_patches
from wan_patches import Fidelity, Report, Status
from wan_patches.patching.status import table
from wan_patches.tables import text


def _lines(*reports):
    return [line.strip() for line in text(*table(Status(reports)), width=200).splitlines()]


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
        shown = str(status)
    assert "modulation (exact): " in shown
    assert "(close): " not in shown
    with wan_patches.enabled(fidelity="close") as status:
        assert "modulation (close): " in str(status)
