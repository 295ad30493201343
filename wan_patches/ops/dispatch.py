"""An op is a pure function with stock's operations as its reference, and faster forms of the same computation.

    @op("gated residual")
    def gated_residual(x, y, gate):  # the reference
        ...

    @gated_residual.form("a few tokens at a time", device="cpu", smallest=1 << 21)
    def in_chunks(x, y, gate): ...

    @in_chunks.refuses  # returns a reason, or None
    def _(x, y, gate): ...

The first call with new shapes, strides, dtypes and so on (`key_of`) makes a decision that all later ones follow. It
selects the first form, in order of declaration, that does not refuse, does not raise and passes the first-sight gate,
or else the reference. A refusal may depend only on what is in the key. Observers of the operations (a compiler,
autograd, a transform, a tracer) see the op's traced form, which is the reference unless another is declared.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from wan_patches.ops import proof
from wan_patches.ops.tracing import is_transformed
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity, Verdict, gate

P = ParamSpec("P")
R = TypeVar("R")
Key = tuple[Hashable, ...]

ACCELERATOR = "accelerator"  # any device that computes, except the CPU

CAPACITY = 4096  # decisions per op; beyond it the oldest is forgotten
AGAIN = 4096  # calls after which a verification is repeated; then after twice as many, and so on

SMALL = "stock's operations are the fastest for so few elements"
OBSERVED = "autograd, autocast, a transform or a tracer looks on"
CAPTURED = "a graph is being captured, and nothing has proved itself for such input"
BLIND = "nothing can be told from values that are all alike"
NO_FORM = "there is no other form for this device"


class Limits(NamedTuple):
    """Numbers of elements below which forms are slower than stock's operations."""

    usual: int = 0
    in_fp32: int = 0

    def least(self, x: torch.Tensor) -> int:
        """Returns the limit for tensors like `x`."""
        return 0 if _any_size else self.in_fp32 if x.dtype is torch.float32 else self.usual

    @classmethod
    def lowest(cls, forms: Sequence[Form[Any, Any]]) -> Limits:
        return cls(*map(min, zip(*(form.limits for form in forms)))) if forms else cls()


class Form(Generic[P, R]):
    """One implementation of an op."""

    def __init__(
        self, name: str, function: Callable[P, R], device: str | None, smallest: int, smallest_in_fp32: int
    ) -> None:
        self.name, self.device, self.limits = name, device, Limits(smallest, smallest_in_fp32)
        self.refusal: Callable[..., str | None] = lambda *args: None
        self.confirmation: Callable[..., bool] = lambda *args: True
        self.function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def refuses(self, refusal: Callable[..., str | None]) -> Callable[..., str | None]:
        """Decorates a function that returns why the form cannot be used for its arguments, or None."""
        self.refusal = refusal
        return refusal

    def confirms(self, confirmation: Callable[..., bool]) -> Callable[..., bool]:
        """Decorates a function that the gate also asks whether the form is exact for such arguments.

        For forms whose differences are rarely seen in a result, such as those that rounding to a half dtype hides.
        """
        self.confirmation = confirmation
        return confirmation

    def why_not(self, *args: Any) -> str | None:
        """Returns why the form is not used for these arguments, as far as is known without a trial, or None."""
        if any(self.limits) and args[0].numel() < self.limits.least(args[0]):
            return SMALL
        try:
            return self.refusal(*args)
        except Exception as error:
            return f"{self.name}: whether it can be used raised {type(error).__name__}: {error}"


@dataclass
class Decision:
    """The implementation for all calls with one key.

    form: None for the reference; `reason` gives the reason.
    proved: whether the form was compared with the reference, or needs no comparison.
    again: the number of calls after which it is compared again.
    tried: the forms that were compared, each with its failure, or an empty string.
    """

    form: Form[Any, Any] | None
    reason: str = ""
    proved: bool = True
    again: float = math.inf
    tried: tuple[tuple[str, str], ...] = ()
    calls: int = 0


class Op(Generic[P, R]):
    """A callable with the signature of its reference. Created by `op`."""

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        *,
        fidelity: Fidelity,
        agree: proof.Agree | None,
        key: Callable[..., Key | None],
        tells_nothing: Callable[..., bool] | None,
        autocasts: bool,
    ) -> None:
        self.name, self.reference, self.fidelity = name, reference, fidelity
        self.traced: Callable[P, R] = reference
        self.forms: list[Form[P, R]] = []
        self._agree, self._key, self._tells_nothing, self._autocasts = agree, key, tells_nothing, autocasts
        self._limits = Limits(), Limits()  # below which no form is tried: on other devices, and on CPUs
        self._has_limits = False
        self._decisions: dict[Key, Decision] = {}
        self._lock = threading.Lock()
        functools.update_wrapper(self, reference, updated=())
        gate.watch(self)
        _ops.append(self)
        tally.paths[name] = f"{reference.__module__}:{reference.__qualname__}"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self.traced(*args, **kwargs)
        if kwargs:
            return self(*inspect.signature(self.reference).bind(*args, **kwargs).args)  # type: ignore[call-arg]
        if self._has_limits and self.why_small(args[0]) is not None:
            tally.count(self.name, "", SMALL)
            return self.reference(*args)  # type: ignore[call-arg]
        is_seen = is_transformed() or (self._autocasts and torch._C._is_any_autocast_enabled())
        key = None if is_seen else self._key(*args)
        if key is None:
            tally.count(self.name, "", OBSERVED)
            return self.traced(*args)  # type: ignore[call-arg]
        decision = self._decisions.get(key)
        if decision is None:
            return self._first(key, args)  # type: ignore[no-any-return]
        decision.calls += 1
        if decision.calls >= decision.again or _rechecking:
            return self._again(key, decision, args)  # type: ignore[no-any-return]
        form = decision.form
        if form is None:
            tally.count(self.name, "", decision.reason)
            return self.reference(*args)  # type: ignore[call-arg]
        tally.count(self.name, form.name)
        return form.function(*args)  # type: ignore[no-any-return]

    def form(
        self, name: str, device: str | None = None, smallest: int = 0, smallest_in_fp32: int | None = None
    ) -> Callable[[Callable[P, R]], Form[P, R]]:
        """Decorates a form. Forms are tried in order of declaration.

        Args:
            name: what it does, in a few words, for `status()`.
            device: the device type it supports, or `ACCELERATOR` for all but the CPU; None for any.
            smallest: elements of the first argument below which the form takes more than 0.9 of the reference's time.
            smallest_in_fp32: the same if the first argument is fp32, so that stock casts nothing.
        """
        in_fp32 = smallest if smallest_in_fp32 is None else smallest_in_fp32

        def declare(function: Callable[P, R]) -> Form[P, R]:
            form = Form(name, function, device, smallest, in_fp32)
            self._add(form)
            return form

        return declare

    def forms_of(self, other: Op[P, R]) -> None:
        """Adds the forms of an op with the same meaning after its own."""
        self._add(*other.forms)

    def _add(self, *forms: Form[P, R]) -> None:
        self.forms += forms
        elsewhere = [form for form in self.forms if form.device != "cpu"]
        self._limits = Limits.lowest(elsewhere), Limits.lowest(self._forms_on("cpu"))
        self._has_limits = any(map(any, self._limits))

    def trace(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorates the form that compilers, autograd, transforms and tracers see instead of the reference."""
        self.traced = function
        return function

    def why_small(self, x: Any) -> str | None:
        """Returns `SMALL` if the first argument is too small for any form; callers can then skip their own checks."""
        return SMALL if x.numel() < self._limits[x.is_cpu].least(x) else None

    def least_for(self, x: torch.Tensor) -> int:
        """Returns the number of elements below which no form is tried for tensors like `x`."""
        return self._limits[x.is_cpu].least(x)

    def stock(self, reason: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the reference, for a reason known to the caller."""
        if not torch.compiler.is_compiling():
            tally.count(self.name, "", reason)
        return self.reference(*args, **kwargs)

    def decisions(self) -> dict[Key, Decision]:
        """Returns the decisions, oldest first."""
        with self._lock:
            return dict(self._decisions)

    def verdicts(self) -> Iterator[Verdict]:
        """Yields the verdicts of the first-sight gate."""
        for key, decision in self.decisions().items():
            for form, failure in decision.tried:
                yield Verdict(self.name, form, key, not failure, failure, self.fidelity)

    def forget(self, proved: bool = True) -> None:
        """Forgets decisions; with `proved=False` only those without a verification."""
        with self._lock:
            self._decisions = {} if proved else {k: d for k, d in self._decisions.items() if d.proved}

    # Deciding

    def _forms_on(self, device: str) -> list[Form[P, R]]:
        kinds = (None, device, None if device in _WITHOUT_PROOF else ACCELERATOR)
        return [form for form in self.forms if form.device in kinds]

    def _first(self, key: Key, args: tuple[Any, ...]) -> Any:
        device = _device(args)
        needs_proof = device.type not in _WITHOUT_PROOF
        if needs_proof and gate.enabled and proof.is_capturing():
            return self.stock(CAPTURED, *args)  # type: ignore[call-arg]
        trial: proof.Trial | None = None
        reasons: list[str] = []
        tried: list[tuple[str, str]] = []
        for form in self._forms_on(device.type):
            if (refusal := form.why_not(*args)) is not None:
                reasons.append(refusal)
                continue
            if not (needs_proof and gate.enabled):
                result, failure = proof.attempt(form, args)
                if not failure:
                    self._decide(key, Decision(form, proved=not needs_proof))
                    tally.count(self.name, form.name)
                    return result
            trial = trial or self._trial(args)
            if needs_proof and gate.enabled:
                if trial.is_blind:
                    return self.stock(BLIND, *args)  # type: ignore[call-arg]
                failure = self._failure(trial, form)
            tried.append((form.name, failure))
            if not failure:
                self._decide(key, Decision(form, again=AGAIN, tried=tuple(tried)))
                tally.count(self.name, "", tally.FIRST_SIGHT)
                return trial.result()
            reasons.append(f"{form.name} {failure}")
            if failure == proof.NO_MEMORY:
                break
        # raises if the arguments are invalid
        result = self.reference(*args) if trial is None else trial.result()  # type: ignore[call-arg]
        reason = "; ".join(dict.fromkeys(reasons)) or NO_FORM
        self._decide(key, Decision(None, reason, tried=tuple(tried)))
        tally.count(self.name, "", reason)
        return result

    def _again(self, key: Key, decision: Decision, args: tuple[Any, ...]) -> Any:
        """Follows a decision, and verifies it again when due."""
        form = decision.form
        if _rechecking:
            self._check(decision, args)
        if form is None or decision.calls < decision.again or proof.is_capturing():
            return self._follow(decision, args)
        trial = self._trial(args)
        if trial.is_blind:
            return self._follow(decision, args)
        decision.again *= 2
        failure = self._failure(trial, form)
        if failure == proof.NO_MEMORY:  # says nothing about the form
            del trial
            return self._follow(decision, args)
        if failure:
            tried = (*decision.tried, (form.name, failure))
            self._decide(key, Decision(None, f"{form.name} {failure}", tried=tried))
        tally.count(self.name, "", tally.FIRST_SIGHT)
        return trial.result()

    def _trial(self, args: tuple[Any, ...]) -> proof.Trial:
        return proof.Trial(self.reference, args, self.fidelity, self._tells_nothing)

    def _failure(self, trial: proof.Trial, form: Form[Any, Any]) -> str:
        return trial.failure(form, self._agree) or trial.why_unconfirmed(form.confirmation)

    def _check(self, decision: Decision, args: tuple[Any, ...]) -> None:
        """Raises `AssertionError` if the decision would be different now."""
        failed = {name for name, failure in decision.tried if failure}
        for form in self._forms_on(_device(args).type):
            reason = form.why_not(*args)
            if form is decision.form:
                assert reason is None, f"{self.name}: {form.name} refuses what its key allows: {reason}"
                trial = self._trial(args)
                failure = "" if trial.is_blind else self._failure(trial, form)
                assert not failure, f"{self.name}: {form.name} {failure}, for a key that it has proved itself for"
                return
            assert reason is not None or form.name in failed, f"{self.name}: {form.name} takes what its key refuses"

    def _follow(self, decision: Decision, args: tuple[Any, ...]) -> Any:
        form = decision.form
        tally.count(self.name, form.name if form else "", decision.reason)
        return (form or self.reference)(*args)  # type: ignore[call-arg]

    def _decide(self, key: Key, decision: Decision) -> None:
        for name, failure in decision.tried:
            if failure:
                gate.warn(f"{self.name}: {name}", failure)
        with self._lock:
            while len(self._decisions) >= CAPACITY:
                del self._decisions[next(iter(self._decisions))]
            self._decisions[key] = decision


def key_of(*args: Any) -> Key | None:
    """Returns everything that arithmetic and refusals may depend on except tensor values, or None if autograd records.

    Tensors: shape, strides, dtype and device; on accelerators, where kernels read raw memory, also alignment and
    whether they are negated views. Norms: type, parameters and `eps`. Other values, such as numbers, themselves. Global
    state: torch's number of threads on CPUs, its determinism flags on accelerators.
    """
    found: list[Any] = []
    try:
        on_cpu = _describe(args, found, torch.is_grad_enabled())
    except (RuntimeError, AttributeError):  # a tensor without strides, or an object that is not a norm
        return None
    if on_cpu is _OBSERVED:
        return None
    found += (torch.get_num_threads(),) if on_cpu else _flags()
    return tuple(found)


def _describe(values: Iterable[Any], found: list[Any], gradients: bool, on_cpu: Any = None) -> Any:
    """Extends `found`; returns whether the first tensor is on a CPU, or `_OBSERVED`.

    on_cpu: the answer from values described before.
    """
    for value in values:
        kind = type(value)
        if kind is _Tensor or kind is _Parameter:
            if gradients and value.requires_grad:
                return _OBSERVED
            if on_cpu is None:
                on_cpu = value.is_cpu
                found.append(value.device)
            found += (value.shape, value.stride(), value.dtype, value.get_device())
            if not on_cpu:
                found += (value.data_ptr() & 15, value.is_neg())
        elif kind in _VALUES:
            found += (kind, value)
        elif isinstance(value, _Tensor):
            return _OBSERVED
        elif isinstance(value, tuple):
            found.append(kind)
            on_cpu = _describe(value, found, gradients, on_cpu)
        else:  # a norm
            found += (kind, value.eps)
            on_cpu = _describe((value.weight, value.bias), found, gradients, on_cpu)
        if on_cpu is _OBSERVED:
            return on_cpu
    return on_cpu


_OBSERVED = object()
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_WITHOUT_PROOF = ("cpu", "meta")  # devices; CPU forms are tested before release, meta tensors have no values
_VALUES = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size))


def _flags() -> tuple[Hashable, ...]:
    return torch._C._get_deterministic_algorithms(), torch._C._get_cudnn_deterministic(), torch._C._get_cudnn_enabled()


def _device(args: Iterable[Any]) -> torch.device:
    """Returns the device of a call: that of the first tensor, or else the first `torch.device` argument."""
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, torch.device):
            return value
    return torch.device("cpu")


def op(
    name: str,
    *,
    fidelity: Fidelity = Fidelity.EXACT,
    agree: proof.Agree | None = None,
    key: Callable[..., Key | None] = key_of,
    tells_nothing: Callable[..., bool] | None = None,
    autocasts: bool = True,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Creates an op from its reference: the function in stock's operations, in stock's order of arithmetic.

    Args:
        name: a readable name.
        fidelity: the guarantee of its forms.
        agree: for a CLOSE op, takes the results of a form and of the reference, then the arguments, and returns whether
            the form is close enough.
        key: maps the arguments to the key of a decision, or None if stock's operations must be seen.
        tells_nothing: whether arguments that are not tensors would let any result pass.
        autocasts: whether autocast, which must then be seen, changes the reference's computation.
    """
    return lambda reference: Op(
        name, reference, fidelity=fidelity, agree=agree, key=key, tells_nothing=tells_nothing, autocasts=autocasts
    )


def is_below(least: int, elements: int) -> bool:
    """Whether `elements` is below the limit `least`, for forms whose first argument is not a tensor."""
    return not _any_size and elements < least


def ops() -> list[Op[Any, Any]]:
    """Returns all ops."""
    return list(_ops)


_ops: list[Op[Any, Any]] = []
_rechecking = _any_size = False


@contextlib.contextmanager
def rechecking() -> Iterator[None]:
    """For tests: every call that follows a decision queries the forms again, and compares with the reference.

    Raises `AssertionError` if the decision would be different.
    """
    global _rechecking
    before, _rechecking = _rechecking, True
    try:
        yield
    finally:
        _rechecking = before


@contextlib.contextmanager
def at_any_size() -> Iterator[None]:
    """For tests: forms are tried for inputs of any size."""
    global _any_size
    before = _any_size
    try:
        _any_size = True
        _forget_all()
        yield
    finally:
        _any_size = before
        _forget_all()


def _forget_all() -> None:
    for op in _ops:
        op.forget()
