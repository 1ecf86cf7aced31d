"""A device that is not there: its tensors lie in host memory, and torch, Accelerate and we take them for an accelerator's.

``install()`` makes it this process's accelerator, for good. It computes with the CPU's kernels, and refuses what a real one
refuses: tensors of two devices in one operation, float64, sparse layouts, and every operation for which torch has no kernel on
Apple's devices, the poorest that it knows, by torch's own table of operations.
"""

import functools
import importlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torchgen
import yaml
from accelerate import PartialState
from accelerate.utils import offload
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
CPU = torch.device("cpu")
# Operations whose purpose is to go from one device to another.
_BETWEEN_DEVICES = {"aten::_to_copy", "aten::copy_"}
# Operations that it has been given, and those that it refuses beside what Apple's devices do.
OPERATIONS: set[str] = set()
REFUSED: set[str] = set()
# What ``torch.pretend`` is.
_MODULE = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "_is_in_bad_fork": lambda: False,
    "manual_seed_all": lambda _seed: None,
    "synchronize": lambda: None,
    "get_amp_supported_dtype": lambda: [torch.bfloat16],
}
_EVERYTHING, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")


class Tensor(torch.Tensor):
    """A tensor on the device; ``held`` is what it holds, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool | None = None) -> torch.Tensor:
        if requires_grad is not None:  # Accelerate lets a weight's class make the one, wherever, that takes its place
            return torch.nn.Parameter(held, requires_grad)
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a {NAME} Tensor to {held.dtype}: the device does not support it")
        if held.layout != torch.strided:
            raise NotImplementedError(f"{held.layout} tensors on {NAME}")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=f"{NAME}:0"
        )
        made.held = held
        return made

    def __repr__(self):
        return f"{self.held} on {NAME}"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):  # torch's own knows no subclasses
        return self.held.tolist()

    def __deepcopy__(self, memo):
        made = self.detach().clone().requires_grad_(self.requires_grad)
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, on whichever device it is for."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    held = {id(one.held): one for one in given if isinstance(one, Tensor)}
    named, name = kwargs.get("device"), func._schema.name
    here = bool(held) if named is None else torch.device(named).type == NAME
    if func.namespace == "aten" and (held or here):
        OPERATIONS.add(name)
        if held and name not in _BETWEEN_DEVICES and any(one.dim() for one in given if not isinstance(one, Tensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got cpu and {NAME}")
        if name in REFUSED or not _on_apple(name, func._schema.overload_name):
            raise NotImplementedError(f"The operator '{name}' is not implemented for {NAME}")
    args, kwargs = tree_map_only(Tensor, lambda one: one.held, (args, kwargs))
    out = func(*args, **kwargs | ({"device": CPU} if named is not None and here else {}))
    if name == "aten::copy_":
        here = isinstance(given[0], Tensor)
    return tree_map_only(torch.Tensor, lambda one: held[id(one)] if id(one) in held else Tensor(one), out) if here else out


@functools.cache
def _on_apple(name: str, overload: str) -> bool:
    """Whether torch has a kernel of an operation on Apple's devices, or makes it of others."""
    table, name = _table(), name.removeprefix("aten::")
    entry = table.get(f"{name}.{overload}" if overload else name, {})  # not there: made by torchgen of one that is
    entry = table.get(entry.get("structured_delegate"), entry)
    keys = [key.strip() for keys in entry.get("dispatch") or {"Composite": ""} for key in keys.split(",")]
    return any(key == "MPS" or key.startswith("Composite") for key in keys)


@functools.cache
def _table() -> dict[str, dict]:
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def _run(func, *args, **kwargs):
    return run(func, args, kwargs)


def _copy_from(source, to, non_blocking=False):
    """How ``torch.tensor(..., device=...)`` fills it, past `Tensor.__torch_dispatch__`."""
    (to.held if isinstance(to, Tensor) else to).copy_(source.held if isinstance(source, Tensor) else source)
    return to


def install() -> None:
    """From here on this process has the device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=SimpleNamespace(**_MODULE))
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied, as on a real device
    _EVERYTHING.fallback(_run, "PrivateUse1")
    _ATEN.impl("_copy_from", _copy_from, "PrivateUse1")
    # Accelerate and safetensors know devices by name.
    PartialState.default_device = property(lambda _: torch.device(NAME, 0))
    offload.safe_open = functools.partial(lambda real, *args, device, **kwargs: real(*args, **kwargs), offload.safe_open)


def refusals() -> dict[str, str]:
    """What the device says to what a real one cannot do, so that its silence means something."""
    here, there = torch.randn(3, 3), torch.randn(3, 3, device=NAME)
    wrong = {
        "two devices": lambda: here + there,
        "an index from elsewhere": lambda: there[torch.tensor([1])],
        "float64": lambda: there.double(),
        "float64 from nothing": lambda: torch.zeros(2, dtype=torch.float64, device=NAME),
        "no kernel": lambda: torch.linalg.svdvals(there),
        "sparse": lambda: there.to_sparse_csr(),
    }
    said = {}
    for name, attempt in wrong.items():
        try:
            said[name] = f"gave {attempt()}"
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def without_sums_of_rows() -> dict[str, list[float]]:
    """A layer's output and gradients where the device has no `F.embedding_bag`, and on the CPU."""
    from mxdsurgery.layers.layer import MxDLayer
    from mxdsurgery.layers.sparse import _tried_to_sum_rows

    REFUSED.add("aten::_embedding_bag")  # an error in a thread of the backward pass would end the process
    torch.manual_seed(0)
    layer = MxDLayer(n_experts=40, k=4, d_model=8, d_hidden=16, kind="mlp", activation="silu", encoder_bias=True)
    torch.nn.init.normal_(layer.decoder.weight)
    x, found = torch.randn(64, 8), {}
    for device in ("cpu", NAME):
        layer.to(device).zero_grad()
        output = layer(x.to(device))
        output.square().sum().backward()
        tensors = (output.detach(), *(weight.grad for weight in layer.parameters()))
        found[device] = torch.cat([tensor.cpu().flatten() for tensor in tensors]).tolist()
    REFUSED.clear()
    _tried_to_sum_rows.cache_clear()
    return found


def main() -> None:
    """Every check of scripts/check_device.py there and on the CPU, a line of JSON each, and what else the tests ask."""
    install()
    print(json.dumps({"refusals": refusals(), "without sums of rows": without_sums_of_rows()}))
    import check_device

    for module in ("checkpoint.export", "editing.edit", "conversion.heal"):  # no fresh process has the device
        importlib.import_module(f"mxdsurgery.{module}").check_reload = lambda *_, **__: {"logits": 0.0, "hidden": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for row in check_device.compared(Path(folder), "auto", 2_048):
            print(json.dumps(row), flush=True)
    print(json.dumps({"operations": sorted(OPERATIONS)}))


if __name__ == "__main__":
    main()
