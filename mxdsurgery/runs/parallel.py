"""Several processes at one run (``accelerate launch``), by the recipe key ``parallel``.

``data``: each process sees its share of every batch, and gradients are averaged, so that all hold the same layers and what is
learned is, to rounding, what one process learns. ``layers``: each process trains its share of the layers on the whole text;
there is no traffic until the first process collects them, and what is learned is bit for bit what one process learns.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from mxdsurgery.base.digest import tensor_bytes
from mxdsurgery.errors import DeviceError, RecipeError, first_line
from mxdsurgery.recipe import Recipe

Item = TypeVar("Item")


def processes() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the first is 0, and it alone writes the result."""
    return dist.get_rank() if processes() > 1 else 0


def text_shares(recipe: Recipe) -> int:
    """Into how many parts each batch is split."""
    return processes() if recipe.parallel == "data" else 1


def check_parallel(recipe: Recipe, count: int | None = None) -> None:
    """Raises RecipeError for a recipe that so many processes cannot work on together; default: as many as there are."""
    count = count or processes()
    if count == 1:
        return
    if recipe.cache_activations is not None:
        raise RecipeError(
            f"recipe key 'cache_activations' is {recipe.cache_activations!r}, with {count} processes",
            expected="one process: only then all of a batch is in one place",
            fix="leave out --cache-activations, or launch one process",
        )
    contexts = recipe.batch // recipe.context
    together = [("inputs", recipe.inputs, "original")] if recipe.parallel == "layers" else []
    if recipe.parallel == "data":
        together = [("activation_buffer", recipe.activation_buffer, 0), ("sparsity", recipe.sparsity, "topk")]
        if contexts % count:
            raise RecipeError(
                f"a batch has {contexts} contexts, which {count} processes cannot share evenly",
                expected=f"a multiple of {count} contexts of {recipe.context} tokens",
                fix=f"--batch {max(1, contexts // count) * count * recipe.context}",
            )
    for name, value, needed in together:
        if value != needed:
            other = "data" if recipe.parallel == "layers" else "layers"
            raise RecipeError(
                f"recipe keys {name!r} and 'parallel' are {value!r} and {recipe.parallel!r}, with {count} processes",
                expected=f"{name}: {needed}",
                fix=f"--{name.replace('_', '-')} {needed}, or --parallel {other}",
            )


def my_contexts(batch: Tensor, recipe: Recipe) -> Tensor:
    """This process's share of a batch of contexts (B, T)."""
    shares = text_shares(recipe)
    return batch[rank() :: shares] if shares > 1 else batch


def layer_shares(layers: Sequence[Item], recipe: Recipe, count: int | None = None) -> list[list[Item]]:
    """Each process's share of the layers: consecutive ones, as evenly as possible; all of them where layers are not shared.

    ``count`` processes share them; default: as many as there are.
    """
    count = count or processes()
    if count == 1 or recipe.parallel != "layers":
        return [list(layers)] * count
    bounds = [len(layers) * number // count for number in range(count + 1)]
    return [list(layers[first:last]) for first, last in zip(bounds, bounds[1:], strict=False)]


@contextmanager
def _together() -> Iterator[None]:
    """Turns errors of communication between processes into a named error.

    Raises:
        DeviceError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            f"another process of this run ended, or cannot be reached: {first_line(error)}",
            fix="see what it said; the same command with --resume goes on from the last checkpoint",
        ) from None


def sum_of_all(tensor: Tensor, shares: int) -> Tensor:
    """The sum over the processes that share the text; gradients flow through it into each."""
    if shares == 1:
        return tensor
    with _together():
        return all_reduce(tensor)


def average_gradients(parameters: Iterable[nn.Parameter], shares: int) -> None:
    """Replaces gradients by their mean over the processes that share the text."""
    if shares > 1:
        with _together():
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(shares)


def agree(values: Tensor, shares: int, *, mean: bool = False) -> None:
    """Replaces values by their largest over the processes that share the text, or by their mean."""
    if shares > 1:
        with _together():
            dist.all_reduce(values, dist.ReduceOp.SUM if mean else dist.ReduceOp.MAX)
        if mean:
            values.div_(shares)


def any_of(flags: Sequence[bool], shares: int) -> list[bool]:
    """For each flag, whether it is set in any of the processes that share the text."""
    if shares == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=_between())
    agree(values, shares)
    return [bool(value) for value in values.tolist()]


def first_ones(values: Any) -> Any:
    """The first process's plain data, in all processes."""
    if processes() == 1:
        return values
    written = _as_bytes(values).to(_between())
    length = torch.tensor([len(written)], device=written.device)
    with _together():
        dist.broadcast(length, 0)
        here = written if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=written.device)
        dist.broadcast(here, 0)
    return _from_bytes(here)


def _between() -> str:
    """The type of device on which tensors go from process to process: the CPU, where the back end can."""
    works_on = dist.Backend.backend_capability.get(dist.get_backend(), ["cpu"])  # nccl on cuda alone, gloo also on the CPU
    return "cpu" if "cpu" in works_on else works_on[0]


def _as_bytes(values: Any) -> Tensor:
    """Plain data as a tensor, uint8."""
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def _from_bytes(written: Tensor) -> Any:
    return json.loads(bytes(written.cpu().numpy()))


def wait() -> None:
    """Waits until all processes are here."""
    if processes() > 1:
        with _together():
            dist.barrier()


def send(tensor: Tensor, device: torch.device) -> None:
    """Sends a tensor to the first process."""
    with _together():
        dist.send(tensor_bytes(tensor).to(device), 0)


def receive(like: Tensor, source: int, device: torch.device) -> Tensor:
    """Receives a tensor of the shape and dtype of ``like`` from a process; it is on the CPU."""
    here = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device=device)
    with _together():
        dist.recv(here, source)
    return here.cpu().view(like.dtype).view(like.shape)


def send_values(values: Any, device: torch.device) -> None:
    """Sends plain data to the first process."""
    written = _as_bytes(values)
    send(torch.tensor([len(written)]), device)
    send(written, device)


def receive_values(source: int, device: torch.device) -> Any:
    """Receives plain data from a process."""
    length = int(receive(torch.zeros(1, dtype=torch.int64), source, device))
    return _from_bytes(receive(torch.zeros(length, dtype=torch.uint8), source, device))
