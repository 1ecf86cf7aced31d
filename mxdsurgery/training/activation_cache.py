"""Recorded activations kept on disk: further trainings on them need no pass of the base model (``cache_activations``).

``cache.json`` in the folder says what they belong to. ``layer_<index>/<first>-<end>.safetensors`` holds batches ``first`` to
``end`` (without it) of a training: ``ids`` (R, B, T) int64, and what went into and came out of the block, ``x`` and ``y``
(R, B T, D) in the dtype that the model computed in. A file is written aside and gets its name when it is whole. Nothing is
ever removed or written over, so several runs may use a folder at once.

Nothing is believed: the ids of every batch are compared with those of the text, and of the first batch that is read the base
model computes all anew, which has to give the same bits.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.aside import aside, file_aside, sync
from mxdsurgery.base.activations import Activations, stream_activations
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.examination import weights_digest
from mxdsurgery.base.model import check_fits
from mxdsurgery.errors import CacheError, OutputError, first_line
from mxdsurgery.outside import read_json
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.ahead import run_ahead

CACHE_FILE = "cache.json"
_LAYER = "layer_"  # begins the name of each layer's folder
# Of what is in the folder; another version's is refused.
CACHE_VERSION = 1
# A file holds as many batches as fit in so many bytes, or one.
_SHARD_BYTES = 16 * 2**20
# Batches that are in memory at a time where they are read ahead: one waits, one is being read, one is trained on.
_READ_AHEAD = 3
# Said where the text is another one than it was: one of these is why, or the file's content.
_TEXT_KEYS = ("data", "eval_data", "eval_tokens", "text_column", "prepend_bos", "shuffle", "seed")
_ANOTHER = "give another folder with --cache-activations, or leave out --cache-activations"


class Kept(NamedTuple):
    """One batch of a layer as it was kept: its ids (B, T), and its activations (B T, D)."""

    ids: Tensor
    pair: Activations


@dataclass
class _Shard:
    """A file that is being filled, with consecutive batches."""

    first: int
    ids: Tensor  # (R, B, T)
    x: Tensor  # (R, B T, D)
    y: Tensor
    count: int = 0

    def takes(self, number: int) -> bool:
        """Whether the batch is the next one and there is room for it."""
        return number == self.first + self.count and self.count < len(self.ids)

    def tensors(self) -> dict[str, Tensor]:
        """What was filled in so far."""
        return {name: getattr(self, name)[: self.count] for name in ("ids", "x", "y")}


def batch_bytes(blocks: Iterable[Block], recipe: Recipe, element_bytes: int) -> int:
    """Bytes on disk of one batch of some blocks: x, y and ids; ``element_bytes`` of the dtype that is computed in."""
    return shape_of(recipe)["batch"] * sum(8 + 2 * block.d_model * element_bytes for block in blocks)


def caching_bytes(blocks: Collection[Block], recipe: Recipe, element_bytes: int) -> int:
    """Bytes of host memory for what is read ahead, and for the files that are being filled; 0 where nothing is kept."""
    if recipe.cache_activations is None:
        return 0
    batch = batch_bytes(blocks, recipe, element_bytes)
    return _READ_AHEAD * batch + max(batch, len(blocks) * _SHARD_BYTES)


class ActivationCache:
    """The kept activations of some blocks in a folder, which a training reads and adds to.

    Args:
        folder: made if it is not there.
        base: the unmodified model, on the device of the training.
        recipe: batch, context; and what the text is, for people.

    Raises:
        CacheError: the folder holds activations of another model, dtype or batch.
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, base: PreTrainedModel, recipe: Recipe) -> None:
        self.folder, self.base, self.device = folder, base, base.device
        identity = {"weights": weights_digest(base), "compute": str(base.dtype).removeprefix("torch.")} | shape_of(recipe)
        check_cache_folder(folder, identity)
        self.circumstances = {"device": str(base.device.type), "threads": torch.get_num_threads(), "torch": torch.__version__}
        self.text = {name: getattr(recipe, name) for name in _TEXT_KEYS}
        if not (folder / CACHE_FILE).is_file():
            self._begin(identity | {"text": self.text, "circumstances": self.circumstances})
            check_cache_folder(folder, identity)  # another process may have begun at the same time
        self.written = read_cache(folder)
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.places: dict[int, dict[int, tuple[Path, int]]] = {}  # by layer and batch: the file and the row in it
        self.filling: dict[int, _Shard] = {}
        self.proven = False

    def _begin(self, content: Mapping[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_aside(self.folder / CACHE_FILE) as path:
                path.write_text(json.dumps({"format_version": CACHE_VERSION} | content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def holds(self, layer: int) -> dict[int, tuple[Path, int]]:
        """The batches of a layer that are there, by number: the file and the row in it."""
        if layer not in self.places:
            found: dict[int, tuple[Path, int]] = {}
            for path in sorted(_folder_of(self.folder, layer).glob("*.safetensors")):
                first, _, end = path.stem.partition("-")
                if first.isdigit() and end.isdigit():
                    found |= {number: (path, row) for row, number in enumerate(range(int(first), int(end)))}
            self.places[layer] = found
        return self.places[layer]

    def _layers(self) -> list[int]:
        """The layers of which something is kept."""
        names = (path.name.removeprefix(_LAYER) for path in self.folder.glob(f"{_LAYER}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def read(self, layer: int, number: int) -> Kept | None:
        """A batch of a layer, in host memory; None where it is not kept. CacheError if the file is damaged or of others."""
        place = self.holds(layer).get(number)
        if place is None:
            return None
        path, row = place
        try:
            with safe_open(path, "pt") as opened:
                if (opened.metadata() or {}).get("identity") != self.digest:
                    raise CacheError(
                        f"{str(path)!r} is not of the model that {str(self.folder / CACHE_FILE)!r} says",
                        expected="activations of one model, dtype and batch in a folder",
                        fix="delete that file, or " + _ANOTHER,
                    )
                # Cloned: a file's tensors lie where they happen to, and products may round by that.
                ids, x, y = (opened.get_slice(name)[row : row + 1][0].clone() for name in ("ids", "x", "y"))
        except (OSError, SafetensorError, IndexError) as error:
            raise CacheError(
                f"the kept activations {str(path)!r} are damaged: {first_line(error)}",
                expected="the file as it was written",
                fix="delete that file: what it held is computed again",
            ) from None
        return Kept(ids, Activations(x, y))

    def sample(self, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Iterator[dict[int, Activations]]:
        """The blocks' activations on the first batches (B, T) of the text, by layer, each (B, T, D); nothing is kept.

        Raises:
            DataError, RecipeError: the model cannot read the batches; see `mxdsurgery.base.model.check_fits`.
            CacheError: as `stream`.
        """
        for number, ids in enumerate(batches):
            check_fits(self.base, ids)
            for layer in self._layers():
                self._check_ids(layer, number, ids, self.read(layer, number))
            kept = self._all(blocks, number)
            found = self._checked(blocks, number, ids, kept) | self._fresh(blocks, ids, kept)
            yield {layer: Activations(*(part.view(*ids.shape, -1) for part in pair)) for layer, pair in found.items()}

    def stream(self, blocks: Sequence[Block], batches: Iterator[Tensor], first: int) -> Iterator[dict[int, Activations]]:
        """As `stream_activations`; what is kept is read, ahead of its use, and what is not is computed and kept.

        Args:
            blocks: whose activations are wanted.
            batches: ids (B, T), from the number ``first`` on.
            first: how many batches of the text are left out.

        Raises:
            CacheError: the text is not the one that activations were kept of, the model does not give the same here, or a
                file is damaged.
            OutputError: a file cannot be written.
        """
        ahead = run_ahead((self._all(blocks, number) for number in itertools.count(first)), depth=1)
        try:
            with closing(ahead):
                for number, (ids, kept) in enumerate(zip(batches, ahead, strict=False), first):
                    found = self._checked(blocks, number, ids, kept)
                    fresh = self._fresh(blocks, ids, kept)
                    for layer, pair in fresh.items():
                        self._keep(layer, number, ids, pair)
                    found |= fresh
                    yield {block.layer: found[block.layer] for block in blocks}
        finally:
            for layer in list(self.filling):
                self._write(layer)

    def _all(self, blocks: Sequence[Block], number: int) -> dict[int, Kept]:
        """What is kept of a batch, by layer."""
        read = {block.layer: self.read(block.layer, number) for block in blocks}
        return {layer: kept for layer, kept in read.items() if kept is not None}

    def _fresh(self, blocks: Sequence[Block], ids: Tensor, kept: Mapping[int, Kept]) -> dict[int, Activations]:
        """The activations of the blocks that nothing is kept of, from a pass of the model that ends with the last of them."""
        missing = [block for block in blocks if block.layer not in kept]
        return next(stream_activations(self.base, missing, iter([ids]), self.device)) if missing else {}

    def _checked(self, blocks: Sequence[Block], number: int, ids: Tensor, kept: Mapping[int, Kept]) -> dict[int, Activations]:
        """What was kept of a batch, on the device, after a check that it is of these ids and, once, of this model."""
        for layer, found in kept.items():
            self._check_ids(layer, number, ids, found)
        if kept and not self.proven:
            self._prove([block for block in blocks if block.layer in kept], number, ids, kept)
        return {layer: Activations(*(part.to(self.device) for part in found.pair)) for layer, found in kept.items()}

    def _prove(self, blocks: Sequence[Block], number: int, ids: Tensor, kept: Mapping[int, Kept]) -> None:
        """Raises CacheError unless the model gives, here and now, the bits that were kept."""
        for layer, pair in next(stream_activations(self.base, blocks, iter([ids]), self.device)).items():
            for computed, held in zip(pair, kept[layer].pair, strict=True):
                if not torch.equal(computed.cpu(), held):
                    off = (computed.cpu().double() - held.double()).norm() / held.double().norm().clamp_min(1e-30)
                    raise CacheError(
                        f"the activations of layer {layer} in {str(self.folder)!r} are not what the model computes here: on "
                        f"batch {number} they are {off:.0e} of their size off ({_words(self.circumstances)})",
                        expected=f"the same bits, as they were written with {_words(self.written['circumstances'])}",
                        fix=f"compute as then (--threads {self.written['circumstances']['threads']}), or {_ANOTHER}",
                    )
        self.proven = True

    def _check_ids(self, layer: int, number: int, ids: Tensor, kept: Kept | None) -> None:
        """Raises CacheError if a batch was kept of other ids."""
        if kept is None or torch.equal(kept.ids, ids):
            return
        was = self.written["text"]
        other = [name for name, value in self.text.items() if was.get(name) != value]
        listed = ", ".join(f"{name} {was.get(name)!r}, now {self.text[name]!r}" for name in other)
        raise CacheError(
            f"batch {number} of the training text is not the one that {str(self.folder)!r} holds activations of, for layer "
            f"{layer}: {listed or 'the keys are the same, the text itself has changed'}",
            expected="the same text in the same order",
            fix=f"repeat the earlier keys, or {_ANOTHER}",
        )

    def _keep(self, layer: int, number: int, ids: Tensor, pair: Activations) -> None:
        """Adds a batch of a layer to the file that is being filled, or begins another one."""
        if layer in self.filling and not self.filling[layer].takes(number):
            self._write(layer)
        if layer not in self.filling:
            rows = max(1, _SHARD_BYTES // sum(part.nbytes for part in (ids, *pair)))
            self.filling[layer] = _Shard(number, *(torch.empty(rows, *part.shape, dtype=part.dtype) for part in (ids, *pair)))
        shard = self.filling[layer]
        for held, part in zip((shard.ids, shard.x, shard.y), (ids, *pair), strict=True):
            held[shard.count] = part
        shard.count += 1

    def _write(self, layer: int) -> None:
        """Writes the file that is being filled; it is there whole or not at all."""
        shard, folder = self.filling.pop(layer), _folder_of(self.folder, layer)
        path = folder / f"{shard.first:08}-{shard.first + shard.count:08}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            with aside(folder / "batches") as beside:  # one name for all: what a killed run left goes with the next file
                save_file(shard.tensors(), beside / path.name, metadata={"identity": self.digest})
                sync(beside / path.name)
                os.replace(beside / path.name, path)
            sync(folder)
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.folder, error) from None
        self.holds(layer).update({shard.first + row: (path, row) for row in range(shard.count)})


def shape_of(recipe: Recipe) -> dict[str, int]:
    """What of a recipe activations depend on beside the text: tokens of a context, and of all contexts of a batch."""
    return {"context": recipe.context, "batch": recipe.batch // recipe.context * recipe.context}


def check_cache_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Checks that a folder is not there yet or holds activations of this identity, or of as much as is known of it.

    Raises:
        CacheError: it holds activations of another model, dtype or batch, or of an unknown version.
        OutputError: it is a file, or holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not ((folder / CACHE_FILE).is_file() or all(path.name[0] == "." for path in folder.iterdir())):
        raise OutputError(
            f"{str(folder)!r} is {'not a folder' if not folder.is_dir() else 'a folder of something else'}",
            expected="a new folder, or one in which activations are kept",
            fix="give another one with --cache-activations",
        )
    if not (folder / CACHE_FILE).is_file():
        return  # another process has just begun
    written = read_cache(folder)
    other = [name for name, value in identity.items() if written.get(name) != value]
    if other:
        differs = ", ".join(f"{name} {_short(written.get(name))}, now {_short(identity[name])}" for name in other)
        flags = [f"--{name} {written.get(name)}" for name in other if name != "weights"]
        again = f"compute as then ({', '.join(flags)}), or " if flags else ""
        raise CacheError(
            f"{str(folder)!r} holds activations of something else: {differs}",
            expected="the same model, dtype, context and batch",
            fix=again + _ANOTHER,
        )


def read_cache(folder: Path) -> dict[str, Any]:
    """What cache.json says; CacheError if it cannot be read, or is of another version."""
    try:
        written = read_json(folder / CACHE_FILE)
        if written["format_version"] != CACHE_VERSION:
            raise ValueError(f"its format_version is {written['format_version']!r}, and {CACHE_VERSION} is known")
        written["circumstances"]["threads"], written["text"].items()
        return written
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(
            f"{str(folder / CACHE_FILE)!r} cannot be read: {first_line(error)}",
            expected="the file as it was written",
            fix=f"delete {str(folder)!r} to begin anew, or {_ANOTHER}",
        ) from None


def kept_bytes(folder: Path, layers: Sequence[int]) -> int:
    """How many bytes the kept activations of some layers take on disk."""
    return sum(path.stat().st_size for layer in layers for path in _folder_of(folder, layer).glob("*.safetensors"))


def _folder_of(folder: Path, layer: int) -> Path:
    return folder / f"{_LAYER}{layer}"


def _words(circumstances: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in circumstances.items())


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _unwritable(folder: Path, error: Exception) -> OutputError:
    return OutputError(
        f"activations cannot be kept in {str(folder)!r}: {first_line(error)}",
        fix="free some space, or " + _ANOTHER,
    )
