"""Installs and removes code objects. No other module assigns to `__code__`.

A function keeps its identity: every holder of it (a class, `from module import f`, another library's wrapper) gets the
new code, pickles and compiled graphs stay valid, and nothing has to be wrapped.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Container, Mapping

from wan_patches.patching.rewrite import Edit, Unknown, fingerprint, names_in, rewritten

#: As the value of a name that edits call: the original function, which runs the code that was installed.
STOCK = object()


class Site:
    """One function and the edits active in it, from any number of patches."""

    def __init__(self, function: types.FunctionType) -> None:
        self.original = function.__code__
        self._function = weakref.ref(function)
        self.stock = with_code(function, self.original)
        _stocks.add(self.stock)
        self._edits: tuple[Edit, ...] = ()
        # a fresh code object for every toggle would run torch.compile into its recompile limit
        self._variants: dict[frozenset[Edit], types.CodeType] = {frozenset(): self.original}

    def add(self, edits: tuple[Edit, ...], names: Mapping[str, object]) -> None:
        """Activates `edits`, and adds those of `names` that they call to the function's globals.

        Raises `Unknown`, and changes nothing, if an edit does not recognise the code.
        """
        function = self._function()
        if function is None:
            return
        wanted = tuple(dict.fromkeys(self._edits + edits))
        called = names_in(self._variant(wanted))
        for name, value in names.items():
            if name not in called:  # used by another target of the same patch
                continue
            value = self.stock if value is STOCK else value
            found = function.__globals__.setdefault(name, value)
            if found is not value and not (value is self.stock and self._precedes(found)):
                raise Unknown(f"the name {name} is taken in {function.__module__}")
            function.__globals__[name] = value
        self._set(wanted)

    def remove(self, edits: tuple[Edit, ...]) -> None:
        """Removes `edits`; leaves code alone that other software has installed in the meantime.

        The names that the edits call stay in the globals, because another thread may be executing the function.
        """
        if self.in_place():
            self._set(tuple(edit for edit in self._edits if edit not in edits))

    def holds(self, edits: tuple[Edit, ...]) -> bool:
        """Whether all of `edits` are active."""
        return self.in_place() and set(edits) <= set(self._edits)

    def in_place(self) -> bool:
        """Whether the function still runs the code installed here."""
        function = self._function()
        return function is not None and function.__code__ is self._variant(self._edits)

    def _precedes(self, stock: object) -> bool:
        """Whether `stock` belongs to the same function before its module was reloaded."""
        return stock in _stocks and getattr(stock, "__qualname__", None) == self.stock.__qualname__

    def _set(self, edits: tuple[Edit, ...]) -> None:
        function = self._function()
        if function is not None:
            function.__code__ = self._variant(edits)
            self._edits = edits

    def _variant(self, edits: tuple[Edit, ...]) -> types.CodeType:
        key = frozenset(edits)
        if key not in self._variants:
            self._variants[key] = rewritten(self.stock, sorted(edits, key=repr))
        return self._variants[key]


_stocks: weakref.WeakSet[object] = weakref.WeakSet()
_sites: weakref.WeakKeyDictionary[types.FunctionType, Site] = weakref.WeakKeyDictionary()


def site(function: types.FunctionType) -> Site:
    """Returns the site of `function`: a new one if there is none, or if other software has replaced the code."""
    found = _sites.get(function)
    if found is None or not found.in_place():
        found = _sites[function] = Site(function)
    return found


def stock(function: types.FunctionType) -> types.FunctionType:
    """Returns the function as it was before any edit of this package."""
    found = _sites.get(function)
    return found.stock if found is not None and found.in_place() else function


def has_fingerprint(function: types.FunctionType, fingerprints: Container[str]) -> bool:
    """Whether a function, as it was before any edit of this package, has one of these fingerprints."""
    try:
        return fingerprint(stock(function)) in fingerprints
    except Unknown:  # without source
        return False


def with_code(function: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    """Returns a copy of `function` that runs `code`."""
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__module__ = function.__module__
    return new


def functions_behind(value: object, filename: str | None) -> list[types.FunctionType]:
    """Returns the plain functions that a class or module attribute leads to, outermost first.

    Follows `__wrapped__` (decorators, wrapt proxies) and, for wrappers without it, closures over functions that are
    defined in `filename`.
    """
    found: list[types.FunctionType] = []
    queue = [value]
    while queue and len(found) < 32:
        item = queue.pop(0)
        if isinstance(item, (staticmethod, classmethod)):
            queue.append(item.__func__)
        elif isinstance(item, property):
            queue.append(item.fget)
        elif type(item) is types.FunctionType:  # isinstance accepts proxies
            if item in found:
                continue
            found.append(item)
            cells = [_contents(cell) for cell in item.__closure__ or ()]
            known = [c for c in cells if type(c) is types.FunctionType and c.__code__.co_filename == filename]
            queue += [item.__wrapped__] if hasattr(item, "__wrapped__") else known
        elif hasattr(item, "__wrapped__"):
            queue.append(item.__wrapped__)
        elif hasattr(item, "func"):  # functools.partial and its method form
            queue.append(item.func)
    return found


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
