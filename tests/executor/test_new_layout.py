"""A layout is one file and its line in the table: one that the package does not have, in executors and messages."""

from __future__ import annotations

import pytest
import torch
from toy_layout import Dot, Rows

from wan_patches import ParallelExecutor
from wan_patches.executor.layouts import LAYOUTS, Layout, named, place, resolve

CPU = torch.device("cpu")

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def rows(monkeypatch):
    """The layout "rows" in the table, of this process only."""
    layout = Rows()
    monkeypatch.setitem(LAYOUTS, layout.name, layout)
    return layout


def test_a_new_layout_runs_on_a_group_of_ranks(rows):
    vector = torch.arange(8.0) + 1
    with ParallelExecutor(Dot, devices=["cpu", "cpu"], layout="rows", threads=1, spares=0) as executor:
        requests = [executor.submit(vector * scale) for scale in (1, 2)]
        assert [request.result(60) for request in requests] == [Dot()(vector), Dot()(vector * 2)]
        assert [worker.rank for worker in executor.health().workers] == [0, 1]


def test_a_new_layout_is_listed_and_checked_as_the_others_are(rows):
    assert named("rows") is rows
    assert resolve("rows", [CPU] * 4, 2, None) == (rows, 2)
    with pytest.raises(ValueError, match="known: auto, inline, replicas, context, cfg, sharded, rows"):
        resolve("columns", [CPU], None, None)
    with pytest.raises(ValueError, match="layout 'rows' needs groups of 3 devices, and there are 4"):
        resolve("rows", [CPU] * 4, 3, None)
    with pytest.raises(ValueError, match="group_size=2 is for context, cfg, sharded and rows"):
        resolve("replicas", [CPU] * 2, 2, None)
    with pytest.raises(ValueError, match="`parallel` belongs to the layout 'context', not to 'rows'"):
        place(Dot(), "rows", CPU, "ring")
    with pytest.raises(ValueError, match="layout 'rows' needs 2 or more devices in a group, not 1"):
        place(Dot(), "rows", CPU)


def test_a_new_layout_of_this_process_needs_no_workers(monkeypatch):
    class Doubled(Layout):
        name = "doubled"
        in_process = True
        one_device = True

        def place(self, pipe, device, parallel):
            pipe.weights = pipe.weights * 2

    monkeypatch.setitem(LAYOUTS, Doubled.name, Doubled())
    vector = torch.ones(8)
    with ParallelExecutor(Dot, devices="cpu", layout="doubled") as executor:
        assert executor.submit(vector).result(60) == 2 * Dot()(vector)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_its_own_module_and_the_name_it_is_found_by(name):
    assert LAYOUTS[name].name == name
    assert type(LAYOUTS[name]).__module__ == f"wan_patches.executor.layouts.{name}"
