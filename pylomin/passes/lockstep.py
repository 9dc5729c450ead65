"""``lockstep``: many forwards of one model, with each group of weights loaded once for all of them."""

from __future__ import annotations

import contextvars
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from pylomin.errors import PassError
from pylomin.lazy.offload import residencies_of
from pylomin.passes.selection import check_model
from pylomin.residency.lane import Lane
from pylomin.residency.prefetcher import Prefetcher
from pylomin.residency.residency import Residency
from pylomin.residency.turns import Ended, StepReader, Turns, Worker
from pylomin.store.progress import Progress, progress_of

IN_FLIGHT = 32


def lockstep(
    model: nn.Module,
    inputs: Iterable[Any],
    fn: Callable[[Any], Any] | None = None,
    *,
    max_in_flight: int = IN_FLIGHT,
    return_exceptions: bool = False,
    progress: Progress = None,
) -> list[Any]:
    """Run ``fn`` on every input, and load each group of weights once for all that need it next.

    Each input has a thread of its own; one runs at a time, until it needs weights that are not in memory. Those that
    can use what is there run first; then the group is loaded that most wait for. What they do may differ: lengths,
    branches, numbers of tokens. Where reading limits a model, n inputs take little longer than one. With
    :func:`pylomin.prefetch`, what is needed next is read while they compute.

    The results have the same bits as those of ``[fn(input) for input in inputs]``; what draws random numbers of torch
    gets, for each input, those that it would get were it the only one. Grad mode, inference mode, autocast, torch's
    modes and context variables are those of the caller.

    Args:
        model: offloaded. It may be used elsewhere at the same time, but not by another ``lockstep``. A model that keeps
            the state of a running forward in its modules cannot be run so.
        inputs: for ``fn``.
        fn: what to do with one, such as ``lambda prompt: model.generate(**prompt)``. Default: call the model, with a
            mapping as keywords, a tuple as positions, anything else as its one argument.
        max_in_flight: inputs that have begun and not finished, at one time. It bounds the memory of hidden states:
            those of so many inputs between two groups of weights, and of one inside.
        return_exceptions: put what an input raised in the place of its result. Default: the first exception ends all
            others and is raised.
        progress: True for a progress bar (needs rich), False for none, or a function that is called with inputs done
            and inputs in all. Default: a bar if standard error is a terminal and rich is installed.

    Returns:
        The results, in the order of the inputs.

    Raises:
        PassError: an argument is out of range, the model runs in lockstep already, or its weights stream to a device.
        TypeError: ``inputs`` is one input, not several.
    """
    check_model(model)
    if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int) or max_in_flight < 1:
        raise PassError(f"max_in_flight is {max_in_flight!r}; expected an int of at least 1.")
    if isinstance(inputs, (torch.Tensor, Mapping, str, bytes)) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; expected an iterable of inputs, one for each call. Of a batch: "
            "lockstep(model, list(batch.split(1)))."
        )
    given = list(inputs)
    turns = Turns(max_in_flight)
    residencies = residencies_of(model)
    calls = _Calls(fn or partial(_call, model), given, turns, residencies, return_exceptions)
    with progress_of(progress, "Running", unit="inputs") as report, _in_turns(residencies, turns):
        calls.run(report)
    return calls.results


def _call(model: nn.Module, given: Any) -> Any:
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


@contextmanager
def _in_turns(residencies: list[Residency], turns: Turns) -> Iterator[None]:
    with ExitStack() as stack:
        for residency in residencies:
            with residency.lock:
                if residency.turns is not None:
                    raise PassError("this model runs in lockstep already. Give all inputs to one call of lockstep.")
                if residency.carriers:
                    devices = ", ".join(map(str, residency.carriers))
                    raise PassError(
                        f"lockstep runs models whose weights are used on the CPU; those of this one stream to "
                        f"{devices}. Run the inputs as one batch there."
                    )
                residency.turns = turns
            stack.callback(_leave, residency)
            reader = residency.prefetcher
            if reader is not None:
                stack.callback(residency.exchange_prefetcher, Prefetcher(reader.fixed_depth))
                residency.exchange_prefetcher(StepReader(reader.fixed_depth))
        yield


def _leave(residency: Residency) -> None:
    with residency.lock:
        residency.turns = None
        residency.drop_ahead(())  # what waited for its next use


class _Calls:
    """The calls of one lockstep, and what came of them."""

    def __init__(
        self,
        fn: Callable[[Any], Any],
        given: list[Any],
        turns: Turns,
        residencies: Sequence[Residency],
        return_exceptions: bool,
    ) -> None:
        self.results: list[Any] = [None] * len(given)
        self._fn, self._given, self._turns = fn, given, turns
        self._return_exceptions = return_exceptions
        self._error: BaseException | None = None  # that ends all
        self._surroundings = _Surroundings()
        self._begin = _random_state()
        self._end = self._begin  # of the last input
        self._report: Callable[[int, int], None] | None = None
        self._done = 0
        self._lanes = [residency.retention.lanes for residency in residencies]
        self._free = [[lanes.here for lanes in self._lanes]]  # for the next input to begin

    def run(self, report: Callable[[int, int], None] | None) -> None:
        self._report = report
        try:
            self._turns.run(self._worker(index) for index in range(len(self._given)))
        finally:
            _set_random_state(self._end)
        if self._error is not None:
            raise self._error

    def _worker(self, index: int) -> Worker:
        state = self._begin

        def switched_in() -> None:
            _set_random_state(state)

        def switched_out() -> None:
            nonlocal state
            state = _random_state()
            if index == len(self._given) - 1:
                self._end = state

        return Worker(partial(self._work, index), switched_in=switched_in, switched_out=switched_out)

    def _work(self, index: int) -> None:
        # An input goes on where one before it ended: so the order is learnt as if one came after the other.
        lanes = self._free.pop() if self._free else [Lane() for _ in self._lanes]
        for of_residency, lane in zip(self._lanes, lanes, strict=True):
            of_residency.here = lane
        try:
            try:
                with self._surroundings.entered() as context:
                    self.results[index] = context.run(self._fn, self._given[index])
            except Exception as error:
                if not self._return_exceptions:
                    raise
                traceback.clear_frames(error.__traceback__)  # they have values that others wait for the memory of
                self.results[index] = error
            self._done += 1
            if self._report is not None:
                self._report(self._done, len(self._given))
        except Ended:
            pass
        except BaseException as error:
            if self._error is None:
                self._error = error
                if hasattr(error, "add_note"):  # since Python 3.11
                    error.add_note(f"in lockstep, input {index} of {len(self._given)}")
            self._turns.end()
        finally:
            self._free.append(lanes)


class _Surroundings:
    """What torch and Python keep for each thread, of the caller."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        self._autocast = [(device, torch.get_autocast_dtype(device)) for device in devices]
        self._cache = torch.is_autocast_cache_enabled()
        self._dispatch_modes = _get_current_dispatch_mode_stack()
        self._function_modes = _get_current_function_mode_stack()

    @contextmanager
    def entered(self) -> Iterator[contextvars.Context]:
        """For one thread; the context variables are a copy of its own."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=self._cache))
            for mode in self._function_modes:
                _push_function_mode(mode)
                stack.callback(_pop_function_mode)
            for mode in self._dispatch_modes:
                _push_mode(mode)
                stack.callback(_pop_mode)
            yield self._context.copy()


def _random_state() -> list[torch.Tensor]:
    """Of torch's generators: the CPU's, and those of CUDA devices where they are in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)
