"""Small rewrites of installed source code, which reject code they do not recognise.

A rewrite never contains upstream's text. It either names a small expression that must occur an exact number of times,
or recognises a function or block by a fingerprint of its syntax tree, and gives its replacement. Code that does not
match raises `Unknown` and is left unchanged.
"""

from __future__ import annotations
import __future__ as futures

import ast
import functools
import hashlib
import inspect
import linecache
import re
import types
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(futures, name).compiler_flag, futures.all_feature_names, 0
)
_TYPE_PARAMS: dict[str, Any] = {"type_params": []} if hasattr(ast, "TypeAlias") else {}
_NOT_SEMANTIC = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns", "decorator_list", "simple"}
_NOT_NODES = {"arg", "attr", "ctx", "id", "kind", "name", "op", "ops", "type_comment"}


class Unknown(Exception):
    """The installed code is not one that a rewrite was written for; the message gives the reason."""


class Edit(Protocol):
    """One rewrite: changes the syntax tree of a function in place, or raises `Unknown`."""

    def apply(self, function: ast.FunctionDef) -> None: ...


@dataclass(frozen=True)
class Replace:
    """Replaces an expression that occurs exactly `count` times.

    In `pattern`, names in capitals match any expression, and `*ARGS` matches all arguments of a call; `replacement` may
    use them.
    """

    pattern: str
    replacement: str
    count: int = 1

    def apply(self, function: ast.FunctionDef) -> None:
        pattern, replacement = _expression(self.pattern), _expression(self.replacement)
        found = 0
        for place, key, node in _places(function, type(pattern)):
            bindings: dict[str, Any] = {}
            if _matches(pattern, node, bindings):
                found += 1
                place[key] = _fill(replacement, bindings, node)
        if found != self.count:
            raise Unknown(f"`{self.pattern}` occurs {found} times, expected {self.count}")


@dataclass(frozen=True)
class Block:
    """Replaces the statements from the one that matches `first` to the one that matches `last`.

    They must have a known fingerprint. Names in capitals in `last` can be used in `replacement`. `declined`: as in
    `Body`.
    """

    first: str
    last: str
    replacement: str
    fingerprints: frozenset[str]
    declined: tuple[tuple[str, str], ...] = ()

    def apply(self, function: ast.FunctionDef) -> None:
        first, last, replacement = map(_statement, (self.first, self.last, self.replacement))
        for body in bodies(function):
            start = next((i for i, statement in enumerate(body) if _matches(first, statement, {})), None)
            if start is None:
                continue
            for end in range(start + 1, len(body)):
                bindings: dict[str, Any] = {}
                if _matches(last, body[end], bindings):
                    found = fingerprint(body[start : end + 1])
                    if found in dict(self.declined):
                        raise Unknown(dict(self.declined)[found])
                    _require(found, self.fingerprints, f"the block `{self.first}` ...")
                    body[start : end + 1] = [_fill(replacement, bindings, body[start])]
                    return
        raise Unknown(f"no block from `{self.first}` to `{self.last}`")


@dataclass(frozen=True)
class Body:
    """Replaces the whole body of a function; `nested` names a function inside the target.

    `replacements` pairs fingerprints with statements, for equivalent texts; `declined` pairs fingerprints that are
    known, but not rewritten, with the reason.
    """

    replacements: tuple[tuple[str, str], ...]
    nested: str | None = None
    declined: tuple[tuple[str, str], ...] = ()

    def apply(self, function: ast.FunctionDef) -> None:
        if self.nested is not None:
            function = _nested(function, self.nested)
        found = fingerprint(function)
        if found in dict(self.declined):
            raise Unknown(dict(self.declined)[found])
        _require(found, frozenset(dict(self.replacements)), f"the text of {function.name}")
        at = function.body[0]
        function.body = [_fill(statement, {}, at) for statement in ast.parse(dict(self.replacements)[found]).body]


@dataclass(frozen=True)
class Nested:
    """Requires that a function inside the target has a known text, and leaves it unchanged."""

    name: str
    fingerprints: frozenset[str]

    def apply(self, function: ast.FunctionDef) -> None:
        _require(fingerprint(_nested(function, self.name)), self.fingerprints, f"the text of {self.name}")


def fingerprint(code: ast.AST | Sequence[ast.AST] | types.FunctionType) -> str:
    """Returns a hash of code, independent of Python version, formatting, annotations and docstrings."""
    if isinstance(code, types.FunctionType):
        text = _unplaced(code.__code__)
        if text not in _fingerprints:
            _fingerprints[text] = fingerprint(parse(code))
        return _fingerprints[text]
    return hashlib.sha256(_normal_form(code).encode()).hexdigest()[:16]


#: Fingerprints of functions, and rewritten code, by the code that was found: many models have functions in common.
_fingerprints: dict[types.CodeType, str] = {}
_rewrites: dict[tuple[types.CodeType, tuple[Edit, ...]], types.CodeType] = {}


def parse(function: types.FunctionType) -> ast.FunctionDef:
    """Returns the syntax tree of an installed function, after verifying that it is the code that runs.

    Raises `Unknown` if there is no source, or if the source compiles to something else.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise Unknown("its source is not available")
    node = _parse_block(lines, code)
    if node is None or node.name != code.co_name:
        raise Unknown("its source could not be read")
    if _proved.get(code) is not lines:
        if not _same(compile_function(node, function), code):
            raise Unknown("its source is not what runs (changed on disk, or replaced in memory)")
        _proved[code] = lines
    return node


#: Code verified against its source, and that source, a list of linecache's; cached because several patches query one
#: function.
_proved: weakref.WeakKeyDictionary[types.CodeType, list[str]] = weakref.WeakKeyDictionary()


def compile_function(node: ast.FunctionDef, function: types.FunctionType) -> types.CodeType:
    """Compiles a syntax tree into a code object that can replace `function.__code__`."""
    code = function.__code__
    tree: ast.stmt = node  # decorators are kept but do not run: code begins at the line of the first
    path = [name for name in function.__qualname__.split(".")[:-1] if name != "<locals>"]
    for name in reversed(path):  # name mangling and `super()` depend on the class
        tree = ast.ClassDef(name=name, bases=[], keywords=[], body=[tree], decorator_list=[], **_TYPE_PARAMS)
        ast.copy_location(tree, node)
    free = [name for name in code.co_freevars if name != "__class__"]
    if free:
        outer = ast.parse(f"def _({', '.join(free)}): pass").body[0]
        assert isinstance(outer, ast.FunctionDef)
        outer.body = [tree]
        tree = outer
        path.insert(0, outer.name)
    module = ast.Module(body=[*_imports_of(code), tree], type_ignores=[])
    flags = code.co_flags & _FUTURE_FLAGS
    compiled = _find(compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True), [*path, node.name])
    if compiled.co_freevars != code.co_freevars:
        raise Unknown("its closure changed")
    return _placed(compiled, code.co_filename, code.co_firstlineno, _qualname(code))


def _placed(code: types.CodeType, filename: str, line: int, qualname: str) -> types.CodeType:
    """Returns code as if it had been compiled from this line of a file, with the functions in it."""
    moved = line - code.co_firstlineno
    inner = f"{qualname}.<locals>." if code.co_flags & inspect.CO_OPTIMIZED else f"{qualname}."  # of a class
    consts = tuple(
        _placed(c, filename, c.co_firstlineno + moved, inner + c.co_name) if isinstance(c, types.CodeType) else c
        for c in code.co_consts
    )
    named: dict[str, Any] = {"co_qualname": qualname} if hasattr(code, "co_qualname") else {}
    return code.replace(co_filename=filename, co_firstlineno=line, co_consts=consts, **named)


def _qualname(code: types.CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))  # since Python 3.11


def _unplaced(code: types.CodeType) -> types.CodeType:
    """Returns code as if it came from nowhere: equal for functions of the same text in several modules."""
    return _placed(code, "", 0, code.co_name)


def rewritten(function: types.FunctionType, edits: Sequence[Edit]) -> types.CodeType:
    """Returns the code of `function` with every edit applied. Raises `Unknown` if one does not recognise it."""
    code = function.__code__
    key = _unplaced(code), tuple(edits)
    if key not in _rewrites:
        node = parse(function)
        for edit in edits:
            edit.apply(node)
        _rewrites[key] = _unplaced(compile_function(node, function))
    return _placed(_rewrites[key], code.co_filename, code.co_firstlineno, _qualname(code))


def _parse_block(lines: list[str], code: types.CodeType) -> ast.FunctionDef | None:
    start = code.co_firstlineno - 1
    if start >= len(lines):
        return None
    indent = len(lines[start]) - len(lines[start].lstrip())
    end, inside = start, False
    for end in range(start, len(lines) + 1):
        if end == len(lines):
            break
        text = lines[end].strip()
        if text and len(lines[end]) - len(lines[end].lstrip()) <= indent and inside and text[0] not in ")]}#":
            break
        inside = inside or text.startswith(("def ", "async def "))
    # the fast cut by indentation fails on text at the left margin (of a string, say); the tokenizer does not
    for block in (lambda: lines[start:end], lambda: inspect.getblock(lines[start:])):
        try:
            tree = ast.parse("if True:\n" * bool(indent) + "".join(block()))
        except (SyntaxError, IndentationError):
            continue
        statement = tree.body[0]
        node = statement.body[0] if isinstance(statement, ast.If) else statement
        return node if isinstance(node, ast.FunctionDef) else None
    return None


@functools.lru_cache(maxsize=128)
def _imports(filename: str) -> tuple[tuple[frozenset[str], str], ...]:
    """Returns the text of each module-level import, after all names in it.

    The compiler treats `name.method()` differently if the module imports `name`. Parsing whole modules for that would
    cost more than the rest of a rewrite.
    """
    found: list[tuple[frozenset[str], str]] = []
    lines = linecache.getlines(filename)
    for i, line in enumerate(lines):
        if "import " not in line or not (text := line.lstrip()).startswith(("import ", "from ")):
            continue
        if line is not text and _in_definition(lines, i):
            continue
        end = i + 1
        while end < len(lines) and text.count("(") > text.count(")"):
            text, end = text + lines[end], end + 1
        found.append((frozenset(_WORD.findall(text)), text))
    return tuple(found)


_WORD = re.compile(r"\w+")


def _in_definition(lines: Sequence[str], index: int) -> bool:
    """Whether an indented line belongs to a function or a class."""
    outer = next((line for line in reversed(lines[:index]) if not line[:1].isspace() and line[0] not in "#)]}"), "")
    return outer.startswith(("def ", "class ", "async def ", "@"))


@functools.lru_cache(maxsize=512)
def _import(text: str) -> tuple[frozenset[str], ast.stmt | None]:
    """Returns the names that an import binds, and the statement; none for a line of some docstring."""
    try:
        statement = ast.parse(text.strip()).body[0]
    except SyntaxError:
        return frozenset(), None
    assert isinstance(statement, (ast.Import, ast.ImportFrom))
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return frozenset(), None
    return frozenset(alias.asname or alias.name.partition(".")[0] for alias in statement.names), statement


def _imports_of(code: types.CodeType) -> list[ast.stmt]:
    """Returns the module-level imports of names that code uses."""
    used = names_in(code)
    candidates = (_import(text) for words, text in _imports(code.co_filename) if not used.isdisjoint(words))
    return [statement for names, statement in candidates if statement is not None and not used.isdisjoint(names)]


def names_in(code: types.CodeType) -> set[str]:
    """Returns the names of globals and attributes used in code and in its nested functions."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def _find(code: types.CodeType, names: Sequence[str]) -> types.CodeType:
    for name in names:
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    def consts(code: types.CodeType) -> list[Any]:
        return [c if isinstance(c, types.CodeType) else (type(c), repr(c)) for c in code.co_consts]

    def equal(x: Any, y: Any) -> bool:
        return _same(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else x == y

    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    return (
        all(getattr(a, name) == getattr(b, name) for name in names)
        and len(a.co_consts) == len(b.co_consts)
        and all(equal(x, y) for x, y in zip(consts(a), consts(b)))
    )


def _normal_form(node: Any) -> str:
    if type(node) is list:
        return "[" + ",".join(map(_normal_form, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:  # `x: T = v` means `x = v`
        return _normal_form(ast.Assign(targets=[node.target], value=node.value))
    fields = []
    for name in _meant(node._fields):
        value = getattr(node, name, None)
        if value is None or value == []:
            continue
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        fields.append(f"{name}={_normal_form(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


@functools.cache
def _meant(fields: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the fields of a node that affect its meaning."""
    return tuple(name for name in fields if name not in _NOT_SEMANTIC)


def _matches(pattern: Any, node: Any, bindings: dict[str, Any]) -> bool:
    if type(pattern) is ast.Name and pattern.id.isupper():
        if pattern.id in bindings:
            return _normal_form(bindings[pattern.id]) == _normal_form(node)
        bindings[pattern.id] = node
        return isinstance(node, ast.expr)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Call) and _star(pattern) is not None:
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            return False
        bindings[_star(pattern)] = [node.args, node.keywords]  # type: ignore[index]
        return _matches(pattern.func, node.func, bindings)
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(_matches(p, n, bindings) for p, n in zip(pattern, node))
    if isinstance(pattern, ast.AST):
        for name in _meant(pattern._fields):  # a loop, since most nodes differ in the first field
            if not _matches(getattr(pattern, name, None), getattr(node, name, None), bindings):
                return False
        return True
    return bool(pattern == node)


def _fill(template: Any, bindings: dict[str, Any], at: ast.AST) -> Any:
    """Copies `template` with its capitals bound, every node at the line of `at` (for tracebacks)."""
    location = {name: getattr(at, name) for name in at._attributes if hasattr(at, name)}

    def copied(node: Any, bindings: dict[str, Any]) -> Any:
        if isinstance(node, list):
            return [copied(item, bindings) for item in node]
        if not isinstance(node, ast.AST):
            return node
        if isinstance(node, ast.Name) and node.id in bindings:
            return copied(bindings[node.id], {})
        new = type(node).__new__(type(node))
        fields = vars(new)
        for name, value in vars(node).items():
            fields[name] = copied(value, bindings) if isinstance(value, (ast.AST, list)) else value
        if "lineno" in node._attributes:
            fields.update(location)
        if bindings and isinstance(node, ast.Call) and (star := _star(node)) in bindings:
            args, keywords = copied(bindings[star], {})
            fields["args"] = [arg for arg in fields["args"] if not isinstance(arg, ast.Starred)] + args
            fields["keywords"] = fields["keywords"] + keywords
        return new

    return copied(template, bindings)


def _places(root: ast.AST, kind: type) -> list[tuple[Any, Any, ast.AST]]:
    """Returns the nodes of one kind below `root`, each with the place to exchange it: `place[key] is node`."""
    found: list[tuple[Any, Any, ast.AST]] = []
    stack = [root]
    while stack:
        node = stack.pop()
        fields = vars(node)
        for name in _inner(node._fields):
            value = fields.get(name)
            if type(value) is list:
                for key, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        stack.append(child)
                        if type(child) is kind:
                            found.append((value, key, child))
            elif isinstance(value, ast.AST):
                stack.append(value)
                if type(value) is kind:
                    found.append((fields, name, value))
    return found


@functools.cache
def _inner(fields: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the fields of a node that can hold expressions and statements."""
    return tuple(name for name in fields if name not in _NOT_NODES)


def _star(call: ast.Call) -> str | None:
    """Returns `ARGS` of a call pattern `f(*ARGS)`."""
    for arg in call.args:
        if isinstance(arg, ast.Starred) and isinstance(arg.value, ast.Name) and arg.value.id.isupper():
            return arg.value.id
    return None


def _nested(function: ast.FunctionDef, name: str) -> ast.FunctionDef:
    inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(inner) != 1:
        raise Unknown(f"holds {len(inner)} functions named {name}, expected 1")
    return inner[0]


def bodies(function: ast.FunctionDef) -> Iterable[list[ast.stmt]]:
    """Yields the statement lists of a function, including nested ones."""
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                yield body


@functools.lru_cache(maxsize=512)
def _expression(text: str) -> ast.expr:
    """Parses an expression. The result is cached and must not be modified."""
    return ast.parse(text, mode="eval").body


@functools.lru_cache(maxsize=512)
def _statement(text: str) -> ast.stmt:
    """Parses a statement. The result is cached and must not be modified."""
    return ast.parse(text).body[0]


def _require(found: str, known: frozenset[str], what: str) -> None:
    if found not in known:
        raise Unknown(f"{what} is not known (fingerprint {found})")
