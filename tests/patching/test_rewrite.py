"""Recognises installed code, rewrites it, and rejects code that is not known."""

from __future__ import annotations

import ast
import gc
import importlib.util
import sys
import types
import weakref

import pytest

from wan_patches.patching import codeswap, rewrite
from wan_patches.patching.rewrite import Block, Body, Nested, Replace, Unknown, fingerprint, parse, rewritten

SOURCE = '''
"""A module to patch."""
import math
from collections import OrderedDict

class Base:
    def scale(self, x):
        return x * 10

class Model(Base):
    __secret = 3

    def scale(self, x: float, *, twice: bool = False) -> float:
        """Doc."""
        def rotate(a, b):
            c = a + b
            return c * 2
        if twice:
            x = super().scale(x)
        text = """
at the margin"""
        y = math.sqrt(rotate(x, self.__secret)) + len(OrderedDict.fromkeys(text))
        y = helper(y, 1) + helper(y, 2)
        z = y
        z = z + 1
        z = z.real
        return z

def helper(a, b=0):
    return a + b

def as_it_is(function):
    return function

@as_it_is
@as_it_is
def decorated(a, b):
    return [a + b for b in [b]]

def outer():
    state = [1]
    def inner(x):
        return x + state[0] + math.floor(1.5)
    return inner
'''


@pytest.fixture
def module(tmp_path):
    return load(tmp_path, SOURCE)


def load(folder, source: str, name: str = "module_to_patch"):
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_with(function: types.FunctionType, *edits):
    return codeswap.with_code(function, rewritten(function, edits))


def test_without_edits_the_code_is_the_same(module):
    for function in (module.Model.scale, module.helper, module.outer()):
        assert run_with(function).__code__.co_code == function.__code__.co_code
        assert parse(function).name == function.__name__


def test_super_name_mangling_and_closures_survive(module):
    model = module.Model()
    scale = run_with(module.Model.scale, Replace("helper(X, 2)", "helper(X, 5)"))
    assert scale(model, 2.0, twice=True) == model.scale(2.0, twice=True) + 3
    inner = module.outer()
    assert run_with(inner, Replace("math.floor(*ARGS)", "helper(7, *ARGS)"))(1) == 1 + 1 + 7 + 1.5


def test_equal_functions_are_parsed_once_and_stay_in_their_places(tmp_path, monkeypatch):
    edits = [Replace("A + 2", "A + 3")]
    text = "class {}:\n    def f(self, x):\n        def g(y):\n            return y + {}\n        return g(x)\n"
    here, there, other = (
        load(tmp_path, "\n" * lines + text.format(name, number), name)
        for lines, name, number in ((0, "Here", 2), (7, "There", 2), (0, "Other", 4))
    )
    parsed = []
    monkeypatch.setattr(rewrite, "parse", lambda function: parsed.append(function) or parse(function))
    first = rewritten(here.Here.f, edits)
    second = rewritten(there.There.f, edits)
    if hasattr(first, "co_qualname"):  # in Python 3.10 the name of `g` is a constant, so that these are not equal
        assert parsed == [here.Here.f]
    for code, function, name in ((first, here.Here.f, "Here"), (second, there.There.f, "There")):
        assert codeswap.with_code(function, code)(None, 1) == 4
        assert [(c.co_filename, c.co_firstlineno) for c in codes(code)] == [
            (c.co_filename, c.co_firstlineno) for c in codes(function.__code__)
        ]
        if hasattr(code, "co_qualname"):
            assert [c.co_qualname for c in codes(code)] == [f"{name}.f", f"{name}.f.<locals>.g"]
    assert fingerprint(here.Here.f) == fingerprint(there.There.f) != fingerprint(other.Other.f)
    with pytest.raises(Unknown):
        rewritten(other.Other.f, edits)


def codes(code):
    return [code, *(c for c in code.co_consts if isinstance(c, types.CodeType))]


def test_replace_requires_its_exact_count(module):
    with pytest.raises(Unknown, match="occurs 2 times, expected 1"):
        rewritten(module.Model.scale, [Replace("helper(X, Y)", "X")])
    model = module.Model()
    same = run_with(module.Model.scale, Replace("helper(X, Y)", "helper(Y, X)", count=2))
    assert same(model, 2.0) == model.scale(2.0)


def test_body_and_block_are_matched_by_fingerprint(module):
    nested = next(n for n in ast.walk(parse(module.Model.scale)) if getattr(n, "name", "") == "rotate")
    model = module.Model()
    body = Body(nested="rotate", replacements=((fingerprint(nested), "return (a + b) * 2"),))
    assert run_with(module.Model.scale, body)(model, 2.0) == model.scale(2.0)
    with pytest.raises(Unknown, match="is not known"):
        rewritten(module.Model.scale, [Body(nested="rotate", replacements=(("0" * 16, "return 1"),))])
    with pytest.raises(Unknown, match="for a reason"):
        rewritten(module.Model.scale, [Body((), nested="rotate", declined=((fingerprint(nested), "for a reason"),))])
    statements = parse(module.Model.scale).body[-4:-1]
    block = Block("z = y", "z = z.PART", "z = y + 1", frozenset({fingerprint(statements)}))
    with pytest.raises(Unknown, match="no block"):
        rewritten(module.Model.scale, [block])  # an attribute's name is not a wildcard
    block = Block("z = y", "z = z.real", "z = helper(y, 1)", frozenset({fingerprint(statements)}))
    assert run_with(module.Model.scale, block)(model, 2.0) == model.scale(2.0)
    with pytest.raises(Unknown, match="is not known"):
        rewritten(module.Model.scale, [Block("z = y", "z = z.real", "z = y", frozenset({"0" * 16}))])
    declined = ((fingerprint(statements), "for a reason"),)
    with pytest.raises(Unknown, match="for a reason"):
        rewritten(module.Model.scale, [Block("z = y", "z = z.real", "z = y", frozenset(), declined)])


def test_nested_function_of_known_text_is_required_and_left(module):
    function = module.Model.scale
    nested = next(node for node in ast.walk(parse(function)) if getattr(node, "name", "") == "rotate")
    known = Nested("rotate", frozenset((fingerprint(nested),)))
    assert rewritten(function, [known]) == function.__code__
    with pytest.raises(Unknown, match="the text of rotate is not known"):
        rewritten(function, [Nested("rotate", frozenset(("0" * 16,)))])
    with pytest.raises(Unknown, match="holds 0 functions named turn"):
        rewritten(function, [Nested("turn", frozenset())])


def test_fingerprints_ignore_code_without_meaning(tmp_path):
    a = load(tmp_path, 'def f(x: int) -> "int":\n    """Doc."""\n    y: int = x\n    return y\n', "a")
    b = load(tmp_path, "def f(x):\n    # comment\n\n    y = x\n    return (y)\n", "b")
    c = load(tmp_path, "def f(x):\n    y = x\n    return -y\n", "c")
    assert fingerprint(a.f) == fingerprint(b.f) != fingerprint(c.f)


def test_source_that_differs_from_running_code_is_rejected(module, tmp_path):
    import linecache

    (tmp_path / "module_to_patch.py").write_text(SOURCE.replace("a + b", "a - b"))
    linecache.checkcache()
    with pytest.raises(Unknown, match="not what runs"):
        parse(module.helper)
    made = {}
    exec("def made(x):\n    return x", made)
    with pytest.raises(Unknown, match="not available"):
        parse(made["made"])


def test_tracebacks_show_the_installed_file(module):
    code = rewritten(module.helper, [Replace("A + B", "A / B")])
    assert code.co_filename == module.__file__
    assert code.co_firstlineno == module.helper.__code__.co_firstlineno
    with pytest.raises(ZeroDivisionError) as raised:
        codeswap.with_code(module.helper, code)(1, 0)
    assert raised.traceback[-1].lineno + 1 == SOURCE[: SOURCE.index("return a + b")].count("\n") + 1


def test_line_numbers_match_the_source(module):
    for function in (module.Model.scale, module.helper, module.decorated, module.outer()):
        assert list(run_with(function).__code__.co_lines()) == list(function.__code__.co_lines())


def test_verified_sources_keep_no_code_alive(tmp_path):
    function = load(tmp_path, "def f(x):\n    return x\n", "short_lived").f
    parse(function)
    code = weakref.ref(function.__code__)
    del function, sys.modules["short_lived"]
    gc.collect()
    assert code() is None


def test_edits_of_several_patches_share_a_function(module):
    first, second = (Replace("helper(X, 1)", "helper(X, 3)"),), (Replace("helper(X, 2)", "helper(X, 4)"),)
    function, original = module.Model.scale, module.Model.scale.__code__
    model, site = module.Model(), codeswap.site(module.Model.scale)
    stock = model.scale(2.0)
    site.add(first, {})
    one = function.__code__
    site.add(second, {})
    assert model.scale(2.0) == stock + 4
    site.remove(first)
    assert model.scale(2.0) == stock + 2
    site.add(first, {})
    site.remove(second)
    assert function.__code__ is one  # cached: toggling makes no new code for a compiler to guard on
    site.remove(first)
    assert function.__code__ is original


def test_code_installed_by_others_stays(module):
    edit = (Replace("A + B", "A - B"),)
    site = codeswap.site(module.helper)
    site.add(edit, {})
    theirs = (lambda a, b=0: 42).__code__
    module.helper.__code__ = theirs
    site.remove(edit)
    assert module.helper.__code__ is theirs


def test_names_in_use_are_not_overwritten(module):
    with pytest.raises(Unknown, match="is taken"):
        codeswap.site(module.helper).add((Replace("A + B", "math(A, B)"),), {"math": object()})
    assert module.helper(1, 2) == 3


def test_only_called_names_are_added_to_the_module(module):
    """So that every target of a patch has a stock of its own."""
    edits = (Replace("A + B", "_wan_patches_called(A, B)"),)
    codeswap.site(module.helper).add(edits, {"_wan_patches_called": max, "_wan_patches_other": codeswap.STOCK})
    assert module.helper(1, 2) == 2
    assert not hasattr(module, "_wan_patches_other")


def test_functions_are_found_behind_wrappers(module):
    import functools

    import wrapt

    function = module.helper

    @functools.wraps(function)
    def decorated(*args):
        return function(*args)

    def closure(*args):
        return function(*args)

    proxy = wrapt.FunctionWrapper(function, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))
    for value in (function, decorated, closure, proxy, staticmethod(function), functools.partial(function, 1)):
        assert codeswap.functions_behind(value, module.__file__)[-1] is function
    assert codeswap.functions_behind(len, module.__file__) == []
