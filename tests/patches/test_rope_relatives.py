"""The rotary embedding functions outside the Wan family, patched and stock, at the same arguments."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import wan_patches
from wan_patches.patching import tally

pytestmark = pytest.mark.upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, SEQ, HEADS, DIM = 2, 300, 3, 64
ROWS, HALVES = "complex product over whole rows", "a few tokens at a time"


class Case(NamedTuple):
    """A function of diffusers: its module in `diffusers.models`, its name, and what makes its arguments.

    form: the form that is expected to serve it; empty for stock's operations.
    in_fp32: the same for fp32, where products of complex numbers in single precision need no cast.
    """

    module: str
    function: str
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    form: str
    in_fp32: str | None = None


def _queries(dtype: torch.dtype, heads_first: bool = False) -> torch.Tensor:
    """As attention makes them, a view of a projection; `heads_first` with heads and tokens exchanged."""
    x = torch.randn(BATCH, SEQ, HEADS * DIM).to(dtype).unflatten(2, (HEADS, DIM))
    return x.transpose(1, 2) if heads_first else x


def _angles(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, SEQ, DIM // 2) * 100


def _of_neighbours(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    full = _angles(*shape).repeat_interleave(2, dim=-1)
    return full.cos(), full.sin()


def _of_halves() -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.cat([_angles()] * 2, dim=-1)
    return full.cos(), full.sin()


def _numbers(*shape: int, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    angles = _angles(*shape)
    return torch.polar(torch.ones_like(angles), angles).to(dtype)


def _split() -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.rand(BATCH, SEQ, HEADS, DIM // 2) * 100).transpose(1, 2)
    return angles.cos(), angles.sin()


def _positions() -> torch.Tensor:
    """A row for each position along one of the axes."""
    return torch.polar(torch.ones(16, DIM // 2), torch.rand(16, DIM // 2) * 100).to(torch.complex128)


def _matrices(*shape: int) -> torch.Tensor:
    angles = _angles(*shape)
    rows = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1)
    return rows.unflatten(-1, (2, 2))


def _unlike_tables(dtype: torch.dtype) -> tuple[Any, ...]:
    cos, sin = torch.randn(2, SEQ, DIM)
    return _queries(dtype), (cos, sin), True, -1, 1


_SHARED = "embeddings", "apply_rotary_emb"
_QWEN = "apply_rotary_emb_qwen"

CASES = {
    "flux": Case(*_SHARED, lambda d: (_queries(d), _of_neighbours(), True, -1, 1), ROWS),
    "hunyuan_dit": Case(*_SHARED, lambda d: (_queries(d, heads_first=True), _of_neighbours()), ROWS),
    "contiguous heads": Case(*_SHARED, lambda d: (_queries(d, True).contiguous(), _of_neighbours()), ROWS),
    "tokens after a prompt": Case(
        *_SHARED,
        lambda d: (torch.cat((_queries(d, True)[:, :, :77], _queries(d, True)), dim=2)[:, :, 77:], _of_neighbours()),
        ROWS,
    ),
    "another table": Case(*_SHARED, _unlike_tables, ""),
    "cosmos": Case(*_SHARED, lambda d: (_queries(d, heads_first=True), _of_halves(), True, -2), HALVES),
    "ace_step": Case(*_SHARED, lambda d: (_queries(d), _of_halves(), True, -2, 1), HALVES),
    "lumina": Case(*_SHARED, lambda d: (_queries(d), _numbers(BATCH), False), HALVES, in_fp32=""),
    "qwen_image": Case(
        "transformers.transformer_qwenimage", _QWEN, lambda d: (_queries(d), _numbers(), False), HALVES, in_fp32=""
    ),
    "qwen_image_2.1": Case(
        "transformers.transformer_qwenimage21", _QWEN, lambda d: (_queries(d), _numbers(), False), HALVES, in_fp32=""
    ),
    "nucleus": Case(
        "transformers.transformer_nucleusmoe_image",
        "_apply_rotary_emb_nucleus",
        lambda d: (_queries(d), _numbers(), False),
        HALVES,
        in_fp32="",
    ),
    **{
        name: Case(
            f"transformers.transformer_{name}",
            "apply_rotary_emb",
            lambda d: (_queries(d, heads_first=True), _numbers(1, 1, dtype=torch.complex128)),
            HALVES,
        )
        for name in ("anyflow", "anyflow_far")
    },
    **{
        name: Case(
            f"transformers.transformer_{name}",
            function,
            lambda d: (torch.randn(BATCH, SEQ, DIM).to(d), _of_neighbours(BATCH)),
            ROWS,
        )
        for name, function in (
            ("ltx", "apply_rotary_emb"),
            ("ltx2", "apply_interleaved_rotary_emb"),
            ("sana_wm_refiner", "apply_interleaved_rotary_emb"),
        )
    },
    **{
        f"{name}, split": Case(
            f"transformers.transformer_{name}",
            "apply_split_rotary_emb",
            lambda d: (torch.randn(BATCH, SEQ, HEADS * DIM).to(d), _split()),
            HALVES,
        )
        for name in ("ltx2", "sana_wm_refiner")
    },
    "wan_animate_2": Case(
        "transformers.transformer_wan_animate_2",
        "rope_apply",
        lambda d: (_queries(d), torch.tensor([[3, 10, 10], [12, 5, 5]]), _positions()),
        HALVES,
    ),
    "joyimage": Case(
        "transformers.transformer_joyimage",
        "_apply_rotary_emb",
        lambda d: (_queries(d), _queries(d), _of_neighbours()),
        ROWS,
    ),
    "joyimage_edit": Case(
        "transformers.transformer_joyimage_edit_plus",
        "_apply_rotary_emb_batched",
        lambda d: (_queries(d), _queries(d), _of_neighbours(BATCH)),
        ROWS,
    ),
    "longcat_audio": Case(
        "transformers.transformer_longcat_audio_dit",
        "_apply_rotary_emb",
        lambda d: (_queries(d), _of_halves()),
        HALVES,
    ),
    **{
        name: Case(
            f"transformers.transformer_{name}",
            "apply_rotary",
            lambda d: (_queries(d), _matrices().unsqueeze(1)),
            ROWS,
        )
        for name in ("kandinsky6", "kandinsky6_sr")
    },
    "prx": Case(
        "transformers.transformer_prx",
        "apply_rope",
        lambda d: (_queries(d, heads_first=True).contiguous(), _matrices(BATCH, 1)),
        ROWS,
    ),
    "prx, in the order of a projection": Case(
        "transformers.transformer_prx",
        "apply_rope",
        lambda d: (_queries(d, heads_first=True), _matrices(BATCH, 1)),
        ROWS,
    ),
    "hidream": Case(
        "transformers.transformer_hidream_image",
        "apply_rope",
        lambda d: (_queries(d), _queries(d), _matrices(BATCH).unsqueeze(2)),
        ROWS,
    ),
}


def _function(case: Case) -> Callable[..., Any]:
    try:
        module = importlib.import_module(f"diffusers.models.{case.module}")
    except ModuleNotFoundError:
        pytest.skip("this diffusers does not have the model")
    return getattr(module, case.function)  # type: ignore[no-any-return]


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _check(function: Callable[..., Any], arguments: tuple[Any, ...]) -> set[str]:
    """Compares the bits and the strides of both, and returns the forms that ran; empty for stock's operations."""
    stock = _tensors(function(*arguments))
    tally.reset()
    with wan_patches.enabled(["rope"]):
        patched = _tensors(function(*arguments))
    for ours, theirs in zip(patched, stock, strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)
    return {way.form for way in tally.counted()}


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_patched_function_has_the_bits_of_stock(name, dtype, threads, any_size):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        case = CASES[name]
        forms = _check(_function(case), case.arguments(dtype))
        in_fp32 = case.form if case.in_fp32 is None else case.in_fp32
        assert forms == {in_fp32 if dtype == torch.float32 else case.form}
    finally:
        torch.set_num_threads(before)


def _shared() -> Callable[..., torch.Tensor]:
    return _function(CASES["flux"])


@pytest.mark.parametrize(
    ("x", "tables", "options"),
    [
        ((1, 8, 4, 64), (8, 64), {"sequence_dim": 3}),
        ((1, 8, 4, 64), (8, 64), {"sequence_dim": 1, "use_real_unbind_dim": 0}),
        ((1, 8, 4, 64), (7, 64), {"sequence_dim": 1}),
        ((1, 8, 4, 64), (8, 32), {"sequence_dim": 1}),
        ((1, 8, 4, 63), (8, 63), {"sequence_dim": 1}),
        ((8, 4, 64), (8, 64), {}),
    ],
)
def test_wrong_arguments_raise_the_errors_of_stock(x, tables, options, any_size):
    arguments = torch.randn(x), tuple(torch.randn(2, *tables))
    with pytest.raises((RuntimeError, ValueError, IndexError)) as of_stock:
        _shared()(*arguments, **options)
    with wan_patches.enabled(["rope"]), pytest.raises(of_stock.type) as of_ours:
        _shared()(*arguments, **options)
    assert str(of_ours.value) == str(of_stock.value)


@pytest.mark.parametrize(
    ("x_dtype", "table_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("seq", [1, 300])
@pytest.mark.parametrize("unbind", [-1, -2])
def test_unusual_dtypes_and_shapes_have_the_bits_of_stock(x_dtype, table_dtype, seq, unbind, any_size):
    """One token of `x` with a table of many is broadcast."""
    x = torch.randn(1, seq, 4, 64, dtype=torch.float64).to(x_dtype)
    cos, sin = (table.to(table_dtype) for table in _of_neighbours())
    assert _check(_shared(), (x, [cos, sin], True, unbind, 1)) == {""}


@pytest.mark.parametrize("unbind", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_half_dtypes(dtype, unbind, any_size):
    tables = [table.to(dtype) for table in (_of_neighbours() if unbind == -1 else _of_halves())]
    assert _check(_shared(), (_queries(dtype), tables, True, unbind, 1)) == {ROWS if unbind == -1 else HALVES}


@pytest.mark.parametrize("dim", [2, 6, 44, 96, 120, 128])
@pytest.mark.parametrize("unbind", [-1, -2])
def test_any_head_dimension(dim, unbind, any_size):
    for dtype in DTYPES:
        x = torch.randn(2, 5, 700, 2 * dim).to(dtype)[..., :dim]
        angles = torch.rand(700, dim // 2)
        full = angles.repeat_interleave(2, -1) if unbind == -1 else torch.cat((angles, angles), -1)
        _check(_shared(), (x, (full.cos(), full.sin()), True, unbind))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_stock(name, any_size):
    function = _function(CASES[name])
    x, *others = CASES[name].arguments(torch.float32)

    def gradient():
        queries = x.detach().clone().requires_grad_()
        _tensors(function(queries, *others))[0].square().sum().backward()
        return queries.grad

    stock = gradient()
    with wan_patches.enabled(["rope"]):
        assert torch.equal(gradient(), stock)
    assert not any(way.form for way in tally.counted())


@pytest.mark.parametrize("name", [name for name in CASES if name != "wan_animate_2"])  # which reads its grid sizes
def test_compiled_calls_have_one_graph_and_the_bits_of_stock(name, any_size):
    function = _function(CASES[name])
    arguments = CASES[name].arguments(torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    results = []
    for patches in ([], ["rope"]):
        torch.compiler.reset()
        with wan_patches.enabled(patches), torch.no_grad():
            compiled = torch.compile(lambda *a: function(*a), backend=backend, fullgraph=True)
            results.append([_tensors(compiled(*arguments)) for _ in range(2)][-1])
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("grids", "stride", "form"),
    [
        ([[5, 2, 30]] * 2, 1, HALVES),
        ([[5, 2, 30]] * 2, 3, HALVES),
        ([[4, 2, 30]] * 2, 1, ""),  # the rest of the tokens is not rotated
        ([[5, 2, 30]], 1, ""),  # and neither is the second sample returned
        ([[5, 2, 30]] * 2, 8, ""),  # positions past the end of the table
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids_of_wan_animate_2(grids, stride, form, dtype, any_size):
    function = _function(CASES["wan_animate_2"])
    table = torch.cat([_positions()] * 2)
    arguments = _queries(dtype), torch.tensor(grids), table, stride
    if stride == 8:
        with pytest.raises(RuntimeError) as of_stock:
            function(*arguments)
        with wan_patches.enabled(["rope"]), pytest.raises(RuntimeError, match=re.escape(str(of_stock.value))):
            function(*arguments)
    else:
        assert _check(function, arguments) == {form}


@pytest.mark.parametrize("dim", [32, 44, 128])
@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_split_in_halves(dtype, threads, dim, any_size):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        function = _function(CASES["ltx2, split"])
        angles = torch.rand(1, 5, 3000, dim // 2) * 100
        tables = angles.cos(), angles.sin()
        for layout in (tables, [table.transpose(1, 2).contiguous().transpose(1, 2) for table in tables]):
            forms = _check(function, (torch.randn(1, 3000, 5 * dim).to(dtype), layout))
            assert forms == {"" if dim == 44 else HALVES}
        x = torch.randn(1, 5, 3000, dim).to(dtype)  # with an axis of heads
        assert _check(function, (x, tables)) == {""}
        assert _check(function, (torch.randn(1, 3000, 5 * dim).to(dtype), [t.bfloat16() for t in tables])) == {""}
    finally:
        torch.set_num_threads(before)


def test_small_inputs_are_left_to_stock():
    x, tables = torch.randn(1, 4, 2, 64), tuple(torch.randn(2, 4, 64))
    assert _check(_shared(), (x, tables, True, -1, 1)) == {""}


@pytest.mark.parametrize("name", ["flux", "cosmos", "ltx", "prx"])
def test_input_is_unchanged_and_the_result_shares_no_memory(name, any_size):
    function = _function(CASES[name])
    x, *others = CASES[name].arguments(torch.float32)
    copy = x.clone()
    with wan_patches.enabled(["rope"]), torch.no_grad():
        result = function(x, *others)
    assert torch.equal(x, copy)
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_devices_without_a_form_are_left_to_stock(name, any_size):
    def on_meta(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(on_meta, value))
        is_moved = isinstance(value, torch.Tensor) and value.dtype != torch.int64  # grid sizes are read
        return value.to("meta") if is_moved else value

    function, arguments = _function(CASES[name]), on_meta(CASES[name].arguments(torch.bfloat16))
    stock = _tensors(function(*arguments))
    with wan_patches.enabled(["rope"]):
        patched = _tensors(function(*arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in patched] == [(x.shape, x.dtype, x.stride()) for x in stock]
    assert {way.form for way in tally.counted()} == {""}
