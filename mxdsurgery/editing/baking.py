"""Edits in the weights: of a model in memory for a while, and of the files in a folder: only what changes is held."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mxdsurgery.base.digest import tensor_bytes
from mxdsurgery.base.dtypes import stored_in
from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.editing.edits import Edits
from mxdsurgery.editing.transforms import baked_transforms, check_transforms
from mxdsurgery.layers.baselines import Molt
from mxdsurgery.outside import INDEX_FILE, weight_files

_TENSORS = ("experts.weight", "gate.bias", "experts.bias", "experts.reads")


class Rows(NamedTuple):
    """Some rows of a tensor: their ``numbers`` (R,) int64, and their ``values`` (R, ...)."""

    numbers: Tensor
    values: Tensor


@dataclass(frozen=True)
class Change:
    """What edits make of one tensor, as it is stored and in host memory.

    Attributes:
        layer: the layer that it belongs to.
        owner: the module whose parameter it is.
        attribute: its name there.
        name: its name in the model.
        old: the rows that change, as they were; None: there was no such tensor.
        new: the same rows, as they become; or all of a tensor that there was not.
    """

    layer: int
    owner: nn.Module
    attribute: str
    name: str
    old: Rows | None
    new: Rows | Tensor

    def put(self) -> None:
        """Puts the change in the weights in memory, in the dtype and on the device that they have there."""
        if self.old is None:
            beside = self.owner.weight  # the bias of experts has the dtype and the device of their C
            setattr(self.owner, self.attribute, nn.Parameter(self.new.to(beside), requires_grad=False))
        else:
            _put_rows(getattr(self.owner, self.attribute), self.new)

    def take_back(self) -> None:
        """Undoes `put`, bit for bit."""
        if self.old is None:
            setattr(self.owner, self.attribute, None)
        else:
            _put_rows(getattr(self.owner, self.attribute), self.old)


@torch.no_grad()
def _put_rows(tensor: Tensor, rows: Rows) -> None:
    tensor[rows.numbers.to(tensor.device)] = rows.values.to(tensor)


def baked(edits: Edits, layer: int, c: Tensor, gate_bias: Tensor, expert_bias: Tensor | None) -> dict[str, Tensor]:
    """A layer's tensors with the edits in them.

    Args:
        edits: what to do; all kinds but ``clamp``.
        layer: its index.
        c: C (N, D).
        gate_bias: b_g (N,).
        expert_bias: the constant that is added to ``Cᵀ a``, (D,), where there is one.

    Returns:
        Only the tensors that changed, new, by their names in the layer: ``experts.weight``, ``gate.bias``, ``experts.bias``.
    """
    original, c, changed = c, c.clone(), {}
    for expert, row in edits.replace.get(layer, {}).items():
        c[expert] = torch.tensor(row, dtype=torch.float32).to(c.dtype)
    source = c.clone()
    if layer in edits.drop:
        changed["gate.bias"] = gate_bias.index_fill(
            0, torch.tensor(edits.drop[layer], device=gate_bias.device), torch.finfo(gate_bias.dtype).min
        )
    c[edits.ablate.get(layer, [])] = 0
    for expert, factor in edits.scale.get(layer, {}).items():
        c[expert] = (c[expert].float() * factor).to(c.dtype)
    for expert, other in edits.copy.get(layer, {}).items():
        c[expert] = source[other]
    for group in edits.merge.get(layer, []):
        c[group] = source[group].float().mean(0).to(c.dtype)
    if layer in edits.steer:
        before = torch.zeros_like(c[0]) if expert_bias is None else expert_bias
        steps = (amount * source[expert].float() for expert, amount in edits.steer[layer].items())
        changed["experts.bias"] = (before.float() + sum(steps)).to(c.dtype)
    return changed if torch.equal(c, original) else changed | {"experts.weight": c}


@torch.no_grad()
def changes(converted: Converted, edits: Edits) -> list[Change]:
    """What edits make of a model's weights, in the dtype that these are stored in. The model is left as it is.

    Raises:
        EditError: an edit of a MOLT cannot stand in its weights.
    """
    check_transforms(edits, converted)
    stored = stored_in(converted.model)
    paths = {module: path for path, module in converted.model.named_modules()}
    made = []
    for layer in edits.layers:
        module = converted.layers[layer]
        held = {name: tensor.to(stored) for name, tensor in module.named_parameters() if name in _TENSORS}
        if isinstance(module, Molt):
            edited = baked_transforms(edits, layer, held, module.experts)
        else:
            edited = baked(edits, layer, *map(held.get, _TENSORS[:3]))
        for name, tensor in edited.items():
            part, _, attribute = name.rpartition(".")
            where = (layer, module.get_submodule(part), attribute, f"{paths[module]}.{name}")
            if name not in held:
                made.append(Change(*where, None, tensor.cpu()))
                continue
            rows = (held[name] != tensor).reshape(len(tensor), -1).any(1).nonzero()[:, 0]
            made.append(Change(*where, *(Rows(rows.cpu(), each[rows].cpu()) for each in (held[name], tensor))))
    return made


@contextmanager
def in_weights(made: Sequence[Change]) -> Iterator[None]:
    """While open, a model in memory has the changes in its weights; then it is again what it was, bit for bit."""
    try:
        for change in made:
            change.put()
        yield
    finally:
        for change in made:
            change.take_back()


def put_in_files(folder: Path, tensors: Mapping[str, Rows | Tensor | None]) -> None:
    """Changes the weights' files of a folder: rows of a tensor, a tensor that was not there, or (None) one that goes.

    Rows are written in their place. A new tensor goes into the file with its layer's C.

    Raises:
        ValueError: the files are damaged, or have no such tensor or rows.
        SafetensorError, OSError: they cannot be read or written.
    """
    files, index_path = weight_files(folder), folder / INDEX_FILE
    index = None if files[0].name == "model.safetensors" else json.loads(index_path.read_text(encoding="utf-8"))
    again: dict[Path, dict[str, Tensor | None]] = {}
    for name, what in tensors.items():
        beside = name.removesuffix("bias") + "weight" if isinstance(what, Tensor) else name
        if index is not None and beside not in index["weight_map"]:
            raise ValueError(f"there is no {beside}")
        path = files[0] if index is None else folder / index["weight_map"][beside]
        if isinstance(what, Rows):
            _write_rows(path, name, what)
        else:
            again.setdefault(path, {})[name] = what
    for path, others in again.items():
        _write_again(path, others, index)
    if again and index is not None:
        index["weight_map"] = dict(sorted(index["weight_map"].items()))
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_rows(path: Path, name: str, rows: Rows) -> None:
    """Writes rows of a tensor into a file of weights, where they are."""
    numbers = rows.numbers.tolist()
    with safe_open(path, "pt") as opened:  # checks the header
        held = opened.get_slice(name) if name in opened.keys() else None
        shape = [0] if held is None else held.get_shape()
        fitting = rows.numbers.dtype == torch.int64 and list(rows.values.shape) == [len(numbers), *shape[1:]]
        if not fitting or any(not 0 <= number < shape[0] for number in numbers):
            raise ValueError(f"{name} has no such rows")
        like = held[:0]
    values = tensor_bytes(rows.values.to(like.dtype)).reshape(len(numbers), -1).numpy()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        for number, row in zip(numbers, values, strict=True):
            file.seek(begin + number * row.nbytes)
            file.write(row)


def _write_again(path: Path, others: Mapping[str, Tensor | None], index: dict[str, Any] | None) -> None:
    """Writes a file of weights again, with tensors more or (None) fewer, which are entered in the index of sharded weights."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    held = load_file(path)  # mapped, not read: it is copied from file to file
    for name, tensor in others.items():
        gone = held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
        if index is not None:
            _count(index, name, None if tensor is None else path.name, gone if tensor is None else tensor)
    new = path.with_name(path.name + ".new")
    save_file(held, new, metadata=metadata)
    new.replace(path)


def _count(index: dict[str, Any], name: str, file: str | None, tensor: Tensor) -> None:
    """Enters a tensor in the index of sharded weights, or (file None) removes it."""
    sign = -1 if file is None else 1
    for key, count in (("total_size", tensor.nbytes), ("total_parameters", tensor.numel())):
        if key in index["metadata"]:
            index["metadata"][key] += sign * count
    index["weight_map"].pop(name, None)
    if file is not None:
        index["weight_map"][name] = file
