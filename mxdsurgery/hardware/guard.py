"""The state of the process that torch computes by: each public function has the one that it needs, its caller's is put back.

A notebook may have turned gradients off, set another default dtype or device, or be inside autocast. None of that reaches the
work of a public function that is `guarded`, and nothing that it sets for itself outlives it.
"""

import contextlib
import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from mxdsurgery.arguments import given_number
from mxdsurgery.errors import MxDError
from mxdsurgery.once import one_call
from mxdsurgery.paths import check_working_folder, given_path

Given = ParamSpec("Given")
Made = TypeVar("Made")

# Types of device whose autocast may be on.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def guarded_with(*more: str) -> Callable[[Callable[Given, Made]], Callable[Given, Made]]:
    """As `guarded`, for a function that also takes keywords of these names, as ``**options``."""

    def guard(function: Callable[Given, Made]) -> Callable[Given, Made]:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def run(*args: Given.args, **options: Given.kwargs) -> Made:
            try:
                check_working_folder()
                placed = [*map(given_path, names, args), *args[len(names) :]]
                named = {name: given_path(name, value) for name, value in options.items()}
                placed[: len(names)] = map(given_number, names, placed)
                named = {name: given_number(name, value) if name in names else value for name, value in named.items()}
                with one_call, _plain_torch():
                    return function(*placed, **named)
            except MxDError as error:
                error.in_python({*names, *more})
                raise

        return run

    return guard


def guarded(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The function, run in the state of torch that it needs, its paths with ``~`` expanded and its numbers checked.

    It may run in several threads at once. Its random numbers are its own; the process's are put back when the last call ends,
    also for threads that drew from them meanwhile, which should have generators of their own.

    What its errors say is to be done names only arguments that it has.

    Raises:
        RecipeError: as `given_number`.
        PathError: as `given_path` and `check_working_folder`.
    """
    return guarded_with()(function)


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """While open, torch is in the state that a new process has; afterwards, in the one that it was in."""
    if "torch" not in sys.modules:  # what loads it now finds it in that state
        yield
        return
    with _of_all_threads, _of_this_thread():
        yield


@contextlib.contextmanager
def _of_this_thread() -> Iterator[None]:
    import torch

    with contextlib.ExitStack() as opened:
        if torch.is_inference_mode_enabled():
            opened.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            opened.enter_context(torch.enable_grad())
        if not _makes_on_cpu():
            opened.enter_context(torch.device("cpu"))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                opened.enter_context(torch.autocast(device, enabled=False))
        yield


def _makes_on_cpu() -> bool:
    """Whether new tensors are on the CPU."""
    import torch

    try:
        return torch.get_default_device().type == "cpu"
    except (RuntimeError, AssertionError):  # the default is a device that is not there
        return False


class _OfAllThreads:
    """Default dtype, precision of products, deterministic mode and random numbers: the last call to end puts them back."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.put_back: list[Callable[[], Any]] = []

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.put_back = _set_plain()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for undo in self.put_back:
                    undo()


_of_all_threads = _OfAllThreads()


def _set_plain() -> list[Callable[[], Any]]:
    """Sets what all threads share to what a new process has; the result puts it back, call by call."""
    import torch

    dtype = torch.get_default_dtype()
    undo = _random_states()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
        undo.append(functools.partial(torch.set_default_dtype, dtype))
    undo += _set_whole_precision()
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        # Deterministic where torch can be: it would stop where it cannot.
        torch.use_deterministic_algorithms(True, warn_only=True)
        undo.append(functools.partial(torch.use_deterministic_algorithms, True))
    return undo


def _random_states() -> list[Callable[[], Any]]:
    """What puts the random numbers of Python, numpy and torch back to where they are now.

    All of ours come from generators of our own (`OwnNumbers`); other libraries, and code that came with a model, may draw from
    the process's, or seed them. Those belong to no thread: what another one draws from them during a call, it draws again
    afterwards.
    """
    import numpy
    import torch

    back = [functools.partial(random.setstate, random.getstate())]
    back.append(functools.partial(numpy.random.set_state, numpy.random.get_state()))
    back.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
    for device in (torch.cuda, torch.xpu):
        if device.is_available() and device.is_initialized():
            back.append(functools.partial(device.set_rng_state_all, device.get_rng_state_all()))
    if torch.backends.mps.is_available():
        back.append(functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return back


def _set_whole_precision() -> list[Callable[[], Any]]:
    """Lets products of float32 be computed in float32: exported models are compared with what a new process computes."""
    import torch

    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for one kind of device alone, which has no name for all
        named = None
    if named == "highest" and set(before) <= {"none", "ieee"}:
        return []
    torch.set_float32_matmul_precision("highest")
    undo = [] if named is None else [functools.partial(torch.set_float32_matmul_precision, named)]
    return undo + [functools.partial(setattr, *there) for there in zip(places, ["fp32_precision"] * 2, before, strict=True)]
