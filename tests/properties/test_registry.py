"""Any sequence of enable, disable and nested blocks: what is wanted is in place, and nothing else is."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from strategies import amounts

import wan_patches
from wan_patches import Fidelity, PatchError, Report
from wan_patches.patching.fidelity import gate
from wan_patches.patching.status import ACTIVE, OFF

NAMES = sorted({report.name for report in wan_patches.status().reports})

choices = st.fixed_dictionaries(
    {},
    optional={
        "patches": st.one_of(st.none(), st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES)).map(tuple)),
        "fidelity": st.sampled_from([*Fidelity, *(fidelity.value for fidelity in Fidelity)]),
        "strict": st.booleans(),
        "gate": st.booleans(),
    },
)
mistakes = st.sampled_from(
    [
        ({"patches": ["rope", "nope"]}, "unknown patch nope; known: "),
        ({"patches": "nope"}, "unknown patch nope; known: "),
        ({"patches": [None]}, "unknown patch None; known: "),
        ({"patches": [NAMES[0], 7]}, "unknown patch 7; known: "),
        ({"fidelity": "best"}, "unknown fidelity 'best'; known: 'exact', 'close'"),
        ({"fidelity": None}, "unknown fidelity None; known: 'exact', 'close'"),
    ]
)


@dataclass
class Level:
    """What the bottom or a block wants: the arguments of the newest `enable` there, None after `disable`."""

    choice: dict[str, Any] | None = None

    def wants(self, report: Report) -> bool:
        if self.choice is None:
            return False
        names, close = self.choice.get("patches"), self.choice.get("fidelity") == Fidelity.CLOSE
        chosen = names is None or report.name in ((names,) if isinstance(names, str) else names)
        return chosen and (close or report.fidelity is Fidelity.EXACT)


class Sequences(RuleBasedStateMachine):
    """Random sequences of calls, beside a list of what each level should want."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.levels = [Level()]
        self.open: dict[contextlib.AbstractContextManager, Level] = {}
        self.stock: dict[types.FunctionType, types.CodeType] = {}

    @initialize()
    def begin(self) -> None:
        modules = {report.module for report in wan_patches.status().reports}
        for module in modules:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
        functions = (thing for thing in gc.get_objects() if type(thing) is types.FunctionType)
        self.stock = {f: f.__code__ for f in functions if f.__globals__.get("__name__") in modules}

    @rule(choice=choices)
    def enable(self, choice: dict[str, Any]) -> None:
        with contextlib.suppress(PatchError):  # `strict` beside a diffusers whose text is not known: nothing changes
            assert wan_patches.enable(**choice) == wan_patches.status()
            self.levels[-1].choice = choice

    @rule()
    def disable(self) -> None:
        wan_patches.disable()
        self.levels[-1].choice = None

    @rule(target=blocks, choice=choices)
    def enter(self, choice: dict[str, Any]) -> Any:
        block = wan_patches.enabled(**choice)
        try:
            assert block.__enter__() == wan_patches.status()
        except PatchError:
            return multiple()
        self.levels.append(Level(choice))
        self.open[block] = self.levels[-1]
        return block

    @rule(block=consumes(blocks), error=st.sampled_from([None, KeyError("in the block")]))
    def leave(self, block: contextlib.AbstractContextManager, error: Exception | None) -> None:
        """In any order, as blocks of several threads end."""
        assert not block.__exit__(type(error) if error else None, error, None)
        left = self.open.pop(block)
        self.levels = [level for level in self.levels if level is not left]

    @rule(mistake=mistakes, in_a_block=st.booleans())
    def err(self, mistake: tuple[dict[str, Any], str], in_a_block: bool) -> None:
        arguments, message = mistake
        with pytest.raises(ValueError, match=message):
            wan_patches.enabled(**arguments).__enter__() if in_a_block else wan_patches.enable(**arguments)

    @rule()
    def show(self) -> None:
        text = str(wan_patches.status())
        assert all(name in text for name in NAMES)

    @invariant()
    def what_is_wanted_is_in_place_and_nothing_else(self) -> None:
        level, status = self.levels[-1], wan_patches.status()
        for report in status.reports:
            if not level.wants(report):
                assert (report.state, report.reason) == (OFF, "")
            elif report.module in sys.modules:
                assert report.state == ACTIVE or report.reason  # another version's text, or none there
        assert gate.enabled is (level.choice is None or level.choice.get("gate", True))
        places = wan_patches._registry.places()
        assert {place.patch.name for place in places} == {r.name for r in status.reports if r.state == ACTIVE}
        assert {f for f, code in self.stock.items() if f.__code__ is not code} == {place.function for place in places}
        assert all(place.stock.__code__ is self.stock[place.function] for place in places)

    def teardown(self) -> None:
        for block in self.open:
            block.__exit__(None, None, None)
        wan_patches.disable()
        assert all(function.__code__ is code for function, code in self.stock.items())
        assert {report.state for report in wan_patches.status().reports} == {OFF}


@pytest.mark.upstream
@amounts(15, 1000)
def test_any_sequence_leaves_what_is_wanted_and_nothing_else(examples):
    run_state_machine_as_test(
        Sequences, settings=settings(max_examples=examples, stateful_step_count=20, deadline=None)
    )
