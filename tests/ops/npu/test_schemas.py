"""All calls of torch_npu, against the schemas that its wheels register."""

from __future__ import annotations

import inspect
import json
import zipfile

import pytest
import torch

from wan_patches.ops.npu import norms, refresh, rope

SCHEMAS = {
    (version, name): torch._C.parse_schema(schema)
    for version, functions in refresh.schemas().items()
    for name, schema in functions.items()
}
FITS = {
    "Tensor": lambda value: isinstance(value, torch.Tensor),
    "str": lambda value: isinstance(value, str),
    "float": lambda value: isinstance(value, float),
    "int": lambda value: type(value) is int,
    "bool": lambda value: isinstance(value, bool),
    "List[int]": lambda value: isinstance(value, (list, tuple)) and all(type(item) is int for item in value),
}


def complaint(schema, args, kwargs):
    """What is wrong with a call, or nothing."""
    arguments = list(schema.arguments)
    positional = [argument for argument in arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        return f"{len(args)} positional arguments, {len(positional)} in the schema"
    given = dict(zip((argument.name for argument in positional), args))
    known = {argument.name for argument in arguments}
    if wrong := [name for name in kwargs if name not in known or name in given]:
        return f"no such argument, or twice: {wrong}"
    given |= kwargs
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                return f"{argument.name} is missing"
            continue
        kind = str(argument.type)
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
        if not (optional and given[argument.name] is None) and not FITS[kind](given[argument.name]):
            return f"{argument.name} is {given[argument.name]!r}, which is no {kind}"
    return ""


@pytest.fixture
def calls(torch_npu_stand_in, monkeypatch):
    """The calls of the stand-in's functions, as they come."""
    made = []

    def recorded(name):
        function = getattr(torch_npu_stand_in, name)

        def record(*args, **kwargs):
            made.append((name, args, kwargs))
            return function(*args, **kwargs)

        return record

    for name in refresh.FUNCTIONS:
        monkeypatch.setattr(torch_npu_stand_in, name, recorded(name))
    return made


def check(made):
    assert made
    for version in refresh.schemas():
        for name, args, kwargs in made:
            assert complaint(SCHEMAS[version, name], args, kwargs) == "", (version, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_calls_fit_the_schemas_of_every_version(dtype, calls):
    x, weight = torch.ones(1, 6, 2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    rope.rotary_mul(x, torch.ones(1, 6, 1, 4), torch.ones(1, 6, 1, 4))
    for parameter in (None, weight, weight.float()):
        norms._rms_norm(x, parameter, 1e-6)
        norms.layer_norm(x, parameter, None, 1e-6)
        norms.layer_norm(x, parameter, weight, 1e-6)
    assert {name for name, _, _ in calls} == {*refresh.FUNCTIONS} - {"npu_fusion_attention"}
    check(calls)


def test_diffusers_calls_of_fused_attention_fit_the_schemas_of_every_version(calls, torch_npu_stand_in, monkeypatch):
    """`npu_fusion_attention` is called by diffusers' `_native_npu`, which our backend falls back to."""
    from diffusers.models import attention_dispatch as module

    monkeypatch.setattr(module, "npu_fusion_attention", torch_npu_stand_in.npu_fusion_attention)
    x = torch.ones(1, 6, 2, 8, dtype=torch.bfloat16)
    module._AttentionBackendRegistry._backends[module.AttentionBackendName._NATIVE_NPU](x, x, x)
    assert [name for name, _, _ in calls] == ["npu_fusion_attention"]
    check(calls)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "wrong"),
    [
        ("npu_rotary_mul", (torch.ones(1), torch.ones(1)), {}, "r2 is missing"),
        ("npu_rotary_mul", (torch.ones(1),) * 3 + (1,), {}, "rotary_mode is 1, which is no str"),
        (
            "npu_rms_norm",
            (),
            {"self": torch.ones(1), "gamma": torch.ones(1)},
            r"no such argument, or twice: \['self'\]",
        ),
        ("npu_rms_norm", (torch.ones(1),) * 2 + (1e-6, 1), {}, "4 positional arguments, 3 in the schema"),
        ("npu_layer_norm_eval", (torch.ones(1), [1.0]), {}, r"normalized_shape is \[1.0\], which is no List\[int\]"),
    ],
)
def test_calls_that_do_not_fit_are_detected(name, args, kwargs, wrong):
    with pytest.raises(AssertionError, match=wrong):
        assert complaint(SCHEMAS["2.13.0", name], args, kwargs) == ""


@pytest.mark.parametrize("name", refresh.FUNCTIONS)
def test_the_stand_in_has_the_signature_of_the_newest_version(name, torch_npu_stand_in):
    schema = SCHEMAS[list(refresh.schemas())[-1], name]
    parameters = inspect.signature(getattr(torch_npu_stand_in, name)).parameters.values()
    assert [parameter.name for parameter in parameters] == [argument.name for argument in schema.arguments]
    for parameter, argument in zip(parameters, schema.arguments):
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            assert parameter.default == argument.default_value
    assert len(schema.returns) == (7 if name == "npu_fusion_attention" else 2 if name == "npu_rms_norm" else 1)


# The script


def wheel(folder, version, texts):
    path = folder / f"torch_npu-{version}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(refresh.LIBRARY, b"\x7fELF\x00" + b"\x00\x01".join(text.encode() for text in texts) + b"\x00")
    return path


TEXTS = [
    "npu::npu_rotary_mul(Tensor input, int[2] sizes=[1, 2], str mode='(half)') -> Tensor",
    "npu_rotary_mul(Tensor input, str mode='half') -> Tensor",
    "npu_rotary_mul_backward(Tensor grad) -> Tensor",
    "_npu_rotary_mul(Tensor input) -> Tensor",
    "npu_rotary_mul(Tensor input, str mode='half') -> Tensor",
    "npu_rotary_mul expects four dimensions",
]


def test_schemas_are_read_from_a_wheel(tmp_path):
    found = refresh.read(wheel(tmp_path, "3.0.0", TEXTS[1:]), ["npu_rotary_mul"])
    assert found == {"npu_rotary_mul": TEXTS[1]}


@pytest.mark.parametrize(("texts", "many"), [(TEXTS, 2), (TEXTS[2:4], 0)])
def test_no_schema_or_several_raise(texts, many, tmp_path):
    with pytest.raises(LookupError, match=f"has {many} schemas of npu_rotary_mul"):
        refresh.read(wheel(tmp_path, "3.0.0", texts), ["npu_rotary_mul"])


def test_the_file_is_written_in_the_order_of_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(refresh, "PATH", tmp_path / "schemas.json")
    texts = [f"{name}(Tensor input) -> Tensor" for name in refresh.FUNCTIONS]
    for version in ("2.13.0", "2.4.0.post4", "2.9.0"):
        refresh.main([str(wheel(tmp_path, version, texts))])
    assert list(json.loads((tmp_path / "schemas.json").read_text())) == ["2.4.0.post4", "2.9.0", "2.13.0"]
    assert refresh.schemas()["2.9.0"]["npu_rms_norm"] == "npu_rms_norm(Tensor input) -> Tensor"
