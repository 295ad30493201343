"""What every test starts from: no network, and stock diffusers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["COLUMNS"] = "140"  # tables follow the terminal
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that spin while they wait take the cores of the other worker
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

import wan_patches
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

ROOT = Path(__file__).parents[1]

#: Files that take ten seconds and more, the longest first: workers begin with them, so that none is left alone with
#: one at the end. Of these only what is marked so belongs to the quick selection.
LONG = (
    "executor/test_executor.py",
    "executor/test_faults.py",
    "executor/test_vae_parallel.py",
    "patches/test_vae.py",
    "executor/test_groups.py",
    "beside/test_compiled_methods.py",
    "executor/test_layouts.py",
    "executor/test_ray.py",
    "test_compile.py",
    "beside/test_held_caches.py",
    "executor/test_sharding.py",
    "test_beside_others.py",
    "diagnostics/test_script_runner.py",
    "diagnostics/test_profiling.py",
    "executor/test_fork.py",
    "executor/test_streaming.py",
    "executor/test_transport.py",
    "bench/test_variants.py",
    "beside/test_watchers.py",
    "beside/test_wrappers.py",
    "examples/test_service.py",
    "test_examples.py",
    "pipelines/test_streaming.py",
    "upstream/test_streaming.py",
    "upstream/test_relatives.py",
    "diagnostics/test_doctor.py",
    "bench/test_model.py",
    "ops/triton/test_layer_norm.py",
    "ops/triton/test_close.py",
    "ops/triton/test_rms_norm.py",
    "bench/test_block.py",
    "bench/test_pipeline.py",
    "patches/test_modulation.py",
    "patches/test_blocks_of_relatives.py",
    "bench/test_ops.py",
    "ops/triton/test_rope.py",
    "properties/test_registry.py",
    "ops/triton/test_modulation.py",
    "patching/test_registry.py",
    "test_plugin.py",
    "bench/test_sharding.py",
    "bench/test_vae_parallel.py",
    "bench/test_transport.py",
    "beside/test_interfaces.py",
    "beside/test_traced.py",
    "beside/test_replaced_functions.py",
    "upstream/test_toggling.py",
    "cli/test_bench.py",
    "cli/test_cli.py",
    "patches/test_vae_tiling.py",
    "test_soak.py",
    "beside/test_warnings.py",
    "bench/test_demo.py",
    "bench/test_gpu.py",
    "emulated_device/test_pipelines.py",
    "emulated_device/test_offload.py",
    "emulated_device/test_bench_gpu.py",
    "emulated_device/test_kernels.py",
)

STAND_IN = Path(__file__).with_name("emulated_device") / "torch_npu_stand_in.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=("names", "values", "all"),
        default="values",
        help="of each test: a case for each family, patch or other name that it is parametrised with; a case for each"
        " value of each parameter (the default); or all combinations of them",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    for item in items:
        loop = item.get_closest_marker("loop")
        if loop is not None and not set(loop.args) & set(map(str, item.callspec.params.values())):
            item.add_marker("slow")
    order = {path: place for place, path in enumerate(LONG)}
    items.sort(key=lambda item: order.get(_path(item), len(LONG)))
    seen: set[str] = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen or _path(item) in LONG or item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
            continue
        seen.add(function)
        item.add_marker("quick")
    yield  # here `-m` and `-k` choose
    if config.getoption("cases") != "all" and not any("::" in argument for argument in config.args):
        _keep_one_of_each(config, items, names_only=config.getoption("cases") == "names")


def _path(item: pytest.Item) -> str:
    """Of the file, in the folder of the tests."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _keep_one_of_each(config: pytest.Config, items: list[pytest.Item], names_only: bool) -> None:
    """Goes without cases whose values have all been in cases before; names are parametrised as strings."""
    kept, left, seen = [], [], set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        call = getattr(item, "callspec", None)
        if names_only:
            values = [f"{key} {value}" for key, value in call.params.items() if isinstance(value, str)] if call else []
        else:  # the ids: values can be anything
            values = [f"{nth} {value}" for nth, value in enumerate(call._idlist)] if call else []
        new = {function, *(f"{function} {value}" for value in values)}
        if new <= seen:
            left.append(item)
        else:
            kept.append(item)
            seen |= new
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files, in the order of collection: a worker that has the emulated accelerator cannot go back."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """After a whole run: the seconds of each room beside its budget, which never fails a run."""
    page = ROOT / ".github" / "CONTRIBUTING.md"
    chosen = [
        argument for argument in map(str, config.invocation_params.args) if argument.startswith(("-m", "-k", "--"))
    ]
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
    if not whole or not page.is_file():
        return
    rows = re.findall(r"^\| ([\w/]+) \| (\d+) \|$", page.read_text(), re.M)
    budget = {room: int(seconds) for room, seconds in rows}
    spent: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                room = "/".join(report.nodeid.split("/")[:2])
                spent[room if room in budget else "other"] += report.duration
    terminalreporter.section("seconds by room, of the budget")
    for room, seconds in budget.items():
        if room != "total":
            more = "  more than its budget" if spent[room] > seconds else ""
            terminalreporter.write_line(f"{room:24}{spent[room]:8.0f}{seconds:8}{more}")
    terminalreporter.write_line(f"{'total':24}{spent.total():8.0f}{sum(budget.values()) - budget.get('total', 0):8}")


@pytest.fixture(autouse=True)
def _stock_before_and_after():
    wan_patches.disable()
    tally.reset()
    gate.reset()
    yield
    wan_patches.disable()


@pytest.fixture
def any_size():
    """Forms are asked about inputs of any size."""
    from wan_patches.ops.dispatch import at_any_size

    with at_any_size():
        yield


@pytest.fixture
def as_on_cuda(any_size, monkeypatch):
    """Ops take tensors on the CPU for such on a GPU for which there are kernels."""
    import torch

    from wan_patches.ops import dispatch, triton

    monkeypatch.setattr(dispatch, "_device", lambda args: torch.device("cuda"))
    monkeypatch.setattr(triton, "is_usable", lambda device: True)


@pytest.fixture
def one_thread():
    """Small models only wait for more, and much so on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def _at_calls_of_diffusers(then):
    """`then()` runs before the body of each of its functions."""

    def profile(frame, event, _):
        if event == "call" and "/diffusers/" in frame.f_code.co_filename:
            sys.setprofile(None)
            then()
            sys.setprofile(profile)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture
def toggled():
    """What a function gives while patches come or go at a few of the calls in it, chosen by each seed.

    `toggled(run, seeds, **options)`; `options` are those of `enable`.
    """

    def results(run, seeds, **options):
        calls = 0

        def count():
            nonlocal calls
            calls += 1

        with _at_calls_of_diffusers(count):
            run()
        for seed in seeds:
            yield one(run, calls, random.Random(seed), options)

    def one(run, calls, pick, options):
        points = set(pick.sample(range(calls), min(calls, pick.choice((1, 2, 6, 20)))))
        nth, on = 0, pick.random() < 0.5

        def switch():
            wan_patches.enable(**options) if on else wan_patches.disable()

        def call():
            nonlocal nth, on
            if nth in points:
                on = not on
                switch()
            nth += 1

        switch()
        try:
            with _at_calls_of_diffusers(call):
                return run()
        finally:
            wan_patches.disable()

    return results


@pytest.fixture
def torch_npu_stand_in(monkeypatch):
    """A module that stands where torch_npu and mindiesd would be; see its docstring."""
    spec = importlib.util.spec_from_file_location("torch_npu_stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (spec.name, "torch_npu", "mindiesd"):
        monkeypatch.setitem(sys.modules, name, module)
    from wan_patches.ops import npu

    npu.forget()
    gate.reset()
    yield module
    npu.forget()
    gate.reset()
