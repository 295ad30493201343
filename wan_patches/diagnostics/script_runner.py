"""Runs a script in this process as Python itself would; implements `wan-patches run`.

The script is `__main__`. It sees the same arguments, first entry of `sys.path`, exit status and tracebacks as without
this package, and its child processes find it at the expected place.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.machinery
import io
import logging
import multiprocessing
import os
import pkgutil
import runpy
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import wan_patches
from wan_patches.patching import tally
from wan_patches.patching.registry import Choice
from wan_patches.patching.status import counted

logger = logging.getLogger("wan_patches")


def run(target: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
    """Runs a script like `python TARGET ARGUMENTS`, or with `module` like `python -m TARGET ARGUMENTS`.

    Call `wan_patches.enable()` first. Nothing else should run in the process afterwards: `__main__`, `sys.argv` and
    `sys.path[0]` stay those of the script. Processes that the script starts through multiprocessing are patched too,
    with any start method. At process exit, a line on stderr summarises the active patches; with several ranks (`RANK`,
    `LOCAL_RANK`) only the first prints it.

    Args:
        target: a file, a folder or zip file with a `__main__.py`, or the name of a module.
        arguments: `sys.argv[1:]` of the script.
        module: `target` is the name of a module.

    Raises:
        SystemExit: the script's own, or status 2 (with a line on stderr) if the file cannot be read.
        BaseException: any exception of the script; Python prints its traceback from the script's first frame on.
    """
    start = _as_module(target, arguments) if module else _as_file(target, arguments)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    # in child processes multiprocessing looks the script up under the second name
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    _tell_at_exit()
    _reach_children()
    try:
        start(main)
    except BaseException as error:
        _hide_frames(error)
        raise


def summary() -> str:
    """Returns a one-line summary of this process: for each patch, the fast calls of all, or its patched functions."""
    if wan_patches._registry.chosen() is None:
        return "wan-patches: no patch is active: the script called wan_patches.disable()"
    status, places = wan_patches.status(), wan_patches._registry.places()
    parts = ["no patch is active: the script imported none of the modules that patches apply to"]
    if counts := wan_patches._registry.calls({}):
        fast, calls = tally.total(counts.values())
        names = ", ".join(f"{name} {taken} of {every}" for name, (taken, every) in sorted(counts.items()))
        parts = [f"fast in {fast} of {counted(calls, 'call')}: {names}"]
    elif places:
        functions = len({id(place.function) for place in places})
        count = Counter(place.patch.name for place in places)
        names = ", ".join(f"{name} ({n})" for name, n in sorted(count.items()))
        parts = [f"active in {counted(functions, 'function')}: {names}"]
    if skipped := status.skipped():
        more = f" (and {len(skipped) - 1} more; see `wan-patches status --import`)" if len(skipped) > 1 else ""
        parts.append(f"skipped: {skipped[0].name} in {skipped[0].module}: {skipped[0].reason}{more}")
    if inexact := sorted({verdict.op for verdict in status.verdicts if not verdict.exact}):
        parts.append(f"not exact on this device, so stock was used for: {', '.join(inexact)}")
    return "wan-patches: " + "; ".join(parts)


# Starting the script


def _as_module(name: str, arguments: Sequence[str]) -> Callable[[types.ModuleType], None]:
    sys.argv = ["-m", *arguments]  # runpy replaces "-m" by the file once it is found
    _set_first_path(os.getcwd())
    # the function that the interpreter itself calls for "-m"; runpy's public functions remove `__main__` at the end,
    # while threads and exit handlers of the script may still be running
    return lambda _: runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _as_file(path: str, arguments: Sequence[str]) -> Callable[[types.ModuleType], None]:
    sys.argv = [path, *arguments]
    file = os.path.join(os.getcwd(), path)  # not normalised, as in Python itself
    if pkgutil.get_importer(path) is not None:  # a folder or zip file
        _set_first_path(file, always=True)
        return lambda _: runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    try:
        with io.open_code(file) as stream:
            compiled = pkgutil.read_code(stream)
            stream.seek(0)
            source = stream.read()
    except OSError as error:
        print(f"wan-patches: can't open file {file!r}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(path)))

    def start(main: types.ModuleType) -> None:
        main.__file__ = file
        main.__dict__["__cached__"] = None
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
        exec(compiled or compile(source, file, "exec", dont_inherit=True), main.__dict__)

    return start


def _set_first_path(folder: str, always: bool = False) -> None:
    if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        sys.path[0] = folder  # replaces the folder of this command
    elif always:
        sys.path.insert(0, folder)


# Child processes


class _Inherited:
    """Part of the data that multiprocessing sends to each new process; unpickling it enables the same patches there."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Choice | None]]:
        return _enable_in_child, (wan_patches._registry.chosen(),)


def _reach_children() -> None:
    # every child process gets this dictionary from its parent; forked ones are patched already
    with contextlib.suppress(AttributeError):  # a long-standing implementation detail
        multiprocessing.current_process()._config["wan_patches"] = _Inherited()  # type: ignore[attr-defined]


def _enable_in_child(choice: Choice | None) -> _Inherited:
    if choice is not None:
        try:
            wan_patches.enable(choice.names, fidelity=choice.fidelity, gate=choice.gate)
        except Exception as error:  # must not prevent the child from starting
            logger.warning("patches could not be enabled in this child process: %s: %s", type(error).__name__, error)
    return _Inherited()


# At the end


def _hide_frames(error: BaseException) -> None:
    """Makes Python print the traceback of `error` without the frames of this module and its callers."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_globals is globals():
        own = own.tb_next
    hook = sys.excepthook  # the script may have set one

    def tell(kind: Any, value: Any, traceback: Any) -> None:
        if value is error:
            traceback = own
            value = value.with_traceback(own)
        hook(kind, value, traceback)

    sys.excepthook = tell


def _tell_at_exit() -> None:
    """Prints the summary last: after the script's threads, its traceback and its own exit handlers."""
    process = os.getpid()

    def tell() -> None:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
        if os.getpid() == process and rank == "0" and sys.stderr is not None:  # not in a forked child
            with contextlib.suppress(OSError, ValueError):  # closed
                print(summary(), file=sys.stderr, flush=True)

    atexit.register(tell)
