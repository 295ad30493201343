"""Finds where two runs of a pipeline diverge, and which patches cause it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wan_patches.diagnostics.verification.trials import Choice, Op, Subject, Trial, message
from wan_patches.patching.registry import Patch
from wan_patches.patching.renames import renamed

__all__ = [
    "Compared",
    "Culprit",
    "Divergence",
    "Suspect",
    "compare_calls",
    "find_culprits",
    "find_first_divergence",
    "smallest",
]

#: The reason for not comparing calls that return no tensors, arrays or images.
NOTHING = "it returns nothing to compare"


@dataclass(frozen=True)
class Divergence:
    """The point where two runs diverge: the first call, in order of completion, whose results differ.

    kind: `"op"` (a patched function), `"block"` (of a denoiser), `"stage"`, `"result"` or `"error"`.
    name: name of the function, block or stage; the message of an error.
    call: number of the call, from 1.
    """

    kind: str
    name: str
    call: int = 1

    def __str__(self) -> str:
        if self.kind == "error":
            return self.name
        return "the result" if self.kind == "result" else f"{self.kind} {self.name}, call {self.call}"


@dataclass(frozen=True)
class Suspect:
    """A patch: its name, the module that it changes, and its targets there."""

    name: str
    module: str
    targets: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name!r} in {self.module} ({', '.join(self.targets)})"


@dataclass(frozen=True)
class Culprit:
    """Patches that by themselves cause a difference, and where it first appears.

    Contains several patches if none of them causes it alone.
    """

    parting = renamed("parting", "first_divergence")

    patches: tuple[Suspect, ...]
    first_divergence: Divergence

    def __str__(self) -> str:
        several = "patches" if len(self.patches) > 1 else "patch"
        return f"{several} {' together with '.join(map(str, self.patches))}: first differs at {self.first_divergence}"


@dataclass(frozen=True)
class Compared:
    """Comparison of the calls of one op or block, in order, stock with patched.

    patches: names of the patches in the op; empty for a block.
    differing: number of calls with different bits.
    reason: why calls were not compared; empty if they were.
    """

    name: str
    stock_calls: int
    patched_calls: int
    differing: int = 0
    reason: str = ""
    patches: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """`"same"`, `"differs"` or `"not compared"`."""
        return "not compared" if self.reason else "differs" if self.differing else "same"


def compare_calls(stock: Trial, patched: Trial, ops: Sequence[Op]) -> dict[tuple[str, str], Compared]:
    """Compares calls by kind and name of the called object, in the order in which stock first completed them."""
    ours, theirs = _by_name(patched), _by_name(stock)
    owners = {op.name: tuple(dict.fromkeys(patch.name for patch in op.patches)) for op in ops}
    found = {}
    for key in dict.fromkeys((*theirs, *ours)):
        before, after = theirs.get(key, []), ours.get(key, [])
        both = [(a, b) for a, b in zip(before, after) if a is not None and b is not None]
        reason = ""
        differing = sum(a != b for a, b in both)
        if len(before) != len(after) and patched.error is None:
            if key[0] == "op":  # an op may divide its work differently
                reason, differing = "stock and patched call it a different number of times", 0
            else:
                differing += abs(len(before) - len(after))
        elif not both:
            reason = NOTHING if before and after else "it was not reached"
        elif not differing and any((a is None) != (b is None) for a, b in zip(before, after)):
            reason = "stock and patched return different types"
        found[key] = Compared(key[1], len(before), len(after), differing, reason, owners.get(key[1], ()))
    return found


def _by_name(run: Trial) -> dict[tuple[str, str], list[str | None]]:
    found = defaultdict(list)
    for event in run.events:
        found[event.kind, event.name].append(event.digest)
    return dict(found)


def find_first_divergence(
    stock: Trial, patched: Trial, compared: Mapping[tuple[str, str], Compared]
) -> Divergence | None:
    """Returns the first call with different bits, otherwise the error or the missing calls, or None."""
    theirs, seen = _by_name(stock), Counter[tuple[str, str]]()
    for event in patched.events:
        key = event.kind, event.name
        nth, seen[key] = seen[key], seen[key] + 1
        if compared[key].reason:
            continue
        before = theirs.get(key, [])
        if nth >= len(before):
            return Divergence(*key, nth + 1)
        if None not in (before[nth], event.digest) and before[nth] != event.digest:
            return Divergence(*key, nth + 1)
    if patched.error is not None:
        return Divergence("error", message(patched.error))
    missing = next((key for key, one in compared.items() if one.state == "differs"), None)  # missing calls
    return None if missing is None else Divergence(*missing, seen[missing] + 1)


def find_culprits(
    subject: Subject, choice: Choice, ops: Sequence[Op], stock: Trial, patched: Trial, first_divergence: Divergence
) -> list[Culprit]:
    """Returns the smallest sets of patches that cause a difference by themselves."""
    called = {event.name for event in patched.events if event.kind == "op"}
    by_suspicion = sorted(ops, key=lambda op: (op.name != first_divergence.name, op.name not in called))
    suspects = {id(patch): patch for op in by_suspicion for patch in op.patches}
    used = {id(patch) for op in ops if op.name in called for patch in op.patches}
    known: dict[frozenset[int], Divergence | None] = {frozenset(suspects): first_divergence}

    def parts(patches: Sequence[Patch]) -> Divergence | None:
        key = frozenset(map(id, patches))
        if key not in known:
            names = ", ".join(dict.fromkeys(patch.name for patch in patches))
            with choice.only(patches):
                run = subject.observe(ops, f"only {names}, to find the patch")
            known[key] = find_first_divergence(stock, run, compare_calls(stock, run, ops))
        return known[key]

    rest = [patch for key, patch in suspects.items() if key in used]
    if not rest or parts(rest) is None:  # compiled calls are not seen
        rest = list(suspects.values())
    found = []
    while rest and (where := parts(rest)) is not None:
        blamed = smallest(rest, lambda patches: parts(patches) is not None)
        where = parts(blamed) or where
        names = (Suspect(p.name, p.module, tuple(target.qualname for target in p.targets)) for p in blamed)
        found.append(Culprit(tuple(names), where))
        rest = [patch for patch in rest if all(patch is not one for one in blamed)]
    return found


def smallest(patches: Sequence[Patch], differs: Callable[[Sequence[Patch]], bool]) -> Sequence[Patch]:
    """Returns a minimal set that causes a difference: a single patch, or else one found by delta debugging."""
    for patch in patches if len(patches) > 1 else ():
        if differs([patch]):
            return [patch]
    pieces = 2
    while len(patches) > 2:
        size = math.ceil(len(patches) / pieces)
        fewer = ([*patches[:start], *patches[start + size :]] for start in range(0, len(patches), size))
        if (found := next(filter(differs, fewer), None)) is not None:
            patches, pieces = found, max(2, pieces - 1)
        elif size == 1:
            break
        else:
            pieces = min(len(patches), 2 * pieces)
    return patches
