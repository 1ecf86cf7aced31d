"""Random numbers from a generator of one's own, for operations that take none: of this thread alone, whatever others draw."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Of operations that are given no generator, the overloads that take one.
_OVERLOADS = {"default": "generator", "low": "low_generator"}


class OwnNumbers(TorchDispatchMode):
    """While open, random numbers of this thread come from a generator with this seed, not from the process's.

    They are the ones that ``torch.manual_seed(seed)`` would have given. The process's generator is neither drawn from nor set:
    other threads draw from it at the same time, and what is made here does not depend on them. A mode of torch holds for the
    thread that entered it. Random numbers of Python and of numpy are not meant.

    Args:
        seed: of the generator, one for each device.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def on(cls, device: str) -> AbstractContextManager[Any]:
        """The same for what is made on a device; nothing where torch makes no generators for it."""
        try:
            torch.Generator(device)
        except NotImplementedError:
            return nullcontext()
        return cls()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation, given the generator if it draws and has none."""
        kwargs = dict(kwargs or {})
        overload = getattr(func.overloadpacket, _OVERLOADS.get(func._overloadname, ""), None) or func
        if any(argument.name == "generator" for argument in overload._schema.arguments) and kwargs.get("generator") is None:
            held = next((value.device for value in args if isinstance(value, torch.Tensor)), None)
            device = held or torch.device(kwargs.get("device") or "cpu")
            if device.type != "meta":
                kwargs["generator"], func = self._on(device), overload
        return func(*args, **kwargs)

    def _on(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def generator_on(device: torch.device) -> torch.Generator:
    """One on the device, where torch has one for it; elsewhere the random numbers are made on the CPU."""
    try:
        return torch.Generator(device)
    except (RuntimeError, NotImplementedError):
        return torch.Generator()
