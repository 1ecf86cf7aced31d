"""An adapter: of a converted model's folder only what differs from the base model; and the whole folder again, from both.

A tensor that is bit for bit the base model's is left out, and its SHA-256 is noted, so that no other model can pass for the
base model. Other files are kept as they are, except the Python code: it is written anew with the rebuilt checkpoint, so that
no code of an adapter's author runs.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from mxdsurgery.base.config import model_name
from mxdsurgery.base.digest import file_digest, tensor_bytes, tensor_digest
from mxdsurgery.base.model import open_model
from mxdsurgery.checkpoint.readme import CARD, read_card, section_start, write_card
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import BaseModelError, MxDError, NotConvertedError, UnknownFamilyError, WeightsError, first_line
from mxdsurgery.outside import check_folder, check_types, fix_of, inside, read_json, shown
from mxdsurgery.runs.journal import METRICS_FILE
from mxdsurgery.terminal.console import size

ADAPTER_FILE = "mxd_adapter.json"
ADAPTER_VERSION = 1
# What other commands found out about a model and left in its folder: not part of the model.
ABOUT = (METRICS_FILE, "experts", "experts.run", "experts.old", "probing", "dissection", "effects", "report.html")
ABOUT += ("report-data", "metrics.png", "metrics.svg")

# In the metadata of an adapter's safetensors file: the header of the checkpoint's file that it is a part of.
_HEADER = "header"
_DTYPES = ("float32", "bfloat16", "float16")
_NOTE, _NOTE_END = "<!-- adapter -->\n", "<!-- /adapter -->\n\n"


@dataclass(frozen=True)
class Adapter:
    """What mxd_adapter.json says.

    Attributes:
        base_model: hub id or demo name of the base model; or the name of its folder, if it was a local one.
        revision: the commit on the hub, if it came from there.
        model_type: transformers' name of its architecture.
        dtype: of the checkpoint; the base model's tensors are cast to it.
        from_base: SHA-256 of each of the base model's tensors that were left out, in that dtype, by name.
        kept: SHA-256 of each other tensor, by name.
        files: SHA-256 of every file of the whole checkpoint, by name.
        checkpoint_bytes: size of all these files.
    """

    base_model: str
    revision: str | None
    model_type: str
    dtype: str
    from_base: dict[str, str]
    kept: dict[str, str]
    files: dict[str, str]
    checkpoint_bytes: int

    def weights(self) -> list[str]:
        """The checkpoint's files of weights."""
        return [name for name in self.files if _is_weights(name)]

    def origin(self) -> str:
        """The base model and its revision, in words."""
        return f"{self.base_model!r}" + (f" at revision {self.revision}" if self.revision else "")

    def base_flag(self) -> str:
        """What to give for ``--base``: the model's name, or a description where the name is no place to load it from."""
        on_hub = self.revision is not None or "/" in self.base_model
        return self.base_model if on_hub or self.base_model in DEMO_MODELS else f"folder of {self.base_model}"


class BaseWeights:
    """A base model's tensors by name, each read from its files on demand."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model_type = name, model.config.model_type
        self.model, self._state = model, model.state_dict()

    def shape(self, name: str) -> list[int] | None:
        """Shape of the tensor of this name; None where there is none."""
        return list(self._state[name].shape) if name in self._state else None

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name; it must exist."""
        held = self._state[name]
        return load_offloaded_parameter(self.model, name) if held.is_meta else held


@contextmanager
def base_weights(
    name: str, revision: str | None, dtype: str, expected: str, trust_remote_code: bool = False
) -> Iterator[BaseWeights]:
    """The base model's tensors in a dtype, while open; the model is not loaded into memory as a whole.

    Args:
        name: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        expected: which model it should be, in words.
        trust_remote_code: whether code of its own may be run.

    Raises:
        BaseModelError: the base model is not there, cannot be reached, is no causal language model or has no safetensors.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = open_model(name, revision, trust_remote_code).load(dtype=dtype, offload=Path(scratch), check=False)
        except MxDError as error:
            raise _base_needed(error, expected) from None
        yield BaseWeights(name, model)


def check_base(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises BaseModelError if the base model is not there; only its config is read. Arguments as of `base_weights`."""
    try:
        open_model(name, revision, trust_remote_code)
    except MxDError as error:
        raise _base_needed(error, repr(name)) from None


def _base_needed(error: MxDError, expected: str) -> BaseModelError:
    fix = error.fix if isinstance(error, UnknownFamilyError) else "say where it is now with --base"
    return BaseModelError(f"the base model is needed: {error.found}", expected=expected, fix=fix)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter's mxd_adapter.json, and checks it.

    Raises:
        NotConvertedError: the folder is not there, holds no adapter, or one of a newer version.
    """
    path = Path(folder) / ADAPTER_FILE
    expected = "an adapter that mxdsurgery wrote"
    if not path.is_file():
        there = "is a whole model: there is nothing to apply" if (Path(folder) / "plan.json").is_file() else None
        raise NotConvertedError(f"{str(folder)!r} {there or f'is not a folder with a {ADAPTER_FILE}'}", expected=expected)
    try:
        check_folder(Path(folder), deep=True)
        values = read_json(path)
        version = values.pop("format_version")
        if version != ADAPTER_VERSION:
            raise NotConvertedError(
                f"{str(folder)!r} is an adapter of format version {shown(version)}",
                expected=f"version {ADAPTER_VERSION}",
                fix="upgrade mxdsurgery",
            )
        adapter = Adapter(**values)
        check_types(adapter, Adapter)
        if adapter.dtype not in _DTYPES:
            raise ValueError(f"dtype is {shown(adapter.dtype)}")
        outside = [name for name in adapter.files if not inside(Path(folder), name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotConvertedError(f"{path} cannot be read: {first_line(error)}", expected=expected, fix=fix_of(error)) from None
    if outside:
        raise NotConvertedError(f"{path} names a file outside the folder: {shown(outside[0])}", expected=expected)
    return adapter


def write_adapter(
    checkpoint: Path,
    out: Path,
    model: str,
    revision: str | None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Adapter:
    """Writes what in a converted model's folder differs from the base model.

    Args:
        checkpoint: the converted model's folder, whole; it is left as it is. One file of its weights is in memory at a time.
        out: an existing folder.
        model: the base model, as it was named when it was converted.
        revision: its commit on the hub.
        base: where the base model is now, if not under that name.
        trust_remote_code: whether the base model's own code may be run.

    Raises:
        BaseModelError: the base model is not there, has no safetensors, or no tensor of it is in the checkpoint.
        OSError, SafetensorError: ``out`` cannot be written.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and _belongs(path.relative_to(checkpoint)))
    names = {path: path.relative_to(checkpoint).as_posix() for path in files}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    from_base: dict[str, str] = {}
    kept: dict[str, str] = {}
    with base_weights(base or model, None if base else revision, config["dtype"], repr(model), trust_remote_code) as weights:
        for path in files:
            if _is_weights(names[path]):
                _write_part(path, out / part_of(names[path]), weights, from_base, kept)
            elif not is_code(names[path]):
                (out / names[path]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / names[path])
    if not from_base or weights.model_type != config["mxd"]["family"]:
        raise BaseModelError(
            f"{weights.name!r} is not the model that {str(checkpoint)!r} was made from: they have no tensor in common",
            expected=repr(model),
            fix="name the right one with --base",
        )
    adapter = Adapter(
        base_model=model_name(model),
        revision=revision,
        model_type=weights.model_type,
        dtype=config["dtype"],
        from_base=from_base,
        kept=kept,
        files={name: file_digest(path) for path, name in names.items()},
        checkpoint_bytes=sum(path.stat().st_size for path in files),
    )
    described = json.dumps({"format_version": ADAPTER_VERSION} | asdict(adapter), indent=1)
    (out / ADAPTER_FILE).write_text(described + "\n", encoding="utf-8")
    if CARD in adapter.files:
        write_card(out / CARD, _with_note(read_card(out / CARD), adapter, folder_bytes(out, checkpoint)))
    return adapter


def _belongs(path: Path) -> bool:
    """Whether a file is part of the converted model: neither hidden nor what a command found out about the model."""
    return path.parts[0] not in ABOUT and not any(part.startswith((".", "__")) for part in path.parts)


def _is_weights(name: str) -> bool:
    return "/" not in name and name.startswith("model") and name.endswith(".safetensors")


def is_code(name: str) -> bool:
    """Whether a file of a checkpoint is code that travels with it."""
    return "/" not in name and name.endswith(".py")


def part_of(name: str) -> str:
    """The adapter's file for a file of weights: adapter.safetensors for model.safetensors, and so for shards."""
    return "adapter" + name.removeprefix("model")


def _write_part(path: Path, part: Path, weights: BaseWeights, from_base: dict[str, str], kept: dict[str, str]) -> None:
    """Writes the tensors of one file that differ from the base model's; adds all digests to ``from_base`` and ``kept``."""
    held = {}
    with safe_open(path, "pt") as opened:
        for name in opened.keys():
            tensor = opened.get_tensor(name)
            same = weights.shape(name) == list(tensor.shape)
            if same and torch.equal(tensor_bytes(weights.tensor(name)), tensor_bytes(tensor)):
                from_base[name] = tensor_digest(tensor)
            else:
                kept[name], held[name] = tensor_digest(tensor), tensor
    save_file(held, part, metadata={_HEADER: _header(path)})


def _header(path: Path) -> str:
    """The JSON text that a safetensors file begins with, after its length in eight bytes."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


def folder_bytes(folder: Path, *without: Path) -> int:
    """Size of all files in a folder, without the folders ``without`` in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and not any(one in path.parents for one in without))
    return sum(path.stat().st_size for path in files)


def _with_note(card: str, adapter: Adapter, count: int) -> str:
    """The card with a note under its title that it is an adapter's; `rebuild` takes it out again."""
    origin, sizes = adapter.origin().replace("'", "`"), f"{size(count)} instead of {size(adapter.checkpoint_bytes)}"
    note = f"""{_NOTE}\
**This is an adapter.** It holds only what differs from {origin}: {sizes}. {len(adapter.from_base)} tensors are the
base model's, unchanged, and not in here. With that model,

```bash
mxdsurgery apply "this folder" --base "{adapter.base_flag()}" --out "a new folder"
```

writes the whole checkpoint, bit for bit; `mxdsurgery.load("this folder", base="{adapter.base_flag()}")` has it in memory.
The rest of this card is about that checkpoint: there, "this folder" is the new one.
{_NOTE_END}"""
    title = re.compile(r"^# .*\n\n", re.MULTILINE).search(card, section_start(card))
    place = title.end() if title else 0
    return card[:place] + note + card[place:]


def _without_note(card: str) -> str:
    before, _, rest = card.partition(_NOTE)
    _, ended, after = rest.partition(_NOTE_END)
    return before + after if ended else card


@contextmanager
def right_base(folder: Path, adapter: Adapter, base: str, trust_remote_code: bool = False) -> Iterator[BaseWeights]:
    """The base model of an adapter, checked by names and shapes; `merged` and `rebuild` compare every weight.

    Args:
        folder: the adapter's.
        adapter: what its mxd_adapter.json says.
        base: hub id, local folder or demo model.
        trust_remote_code: whether its own code may be run.

    Raises:
        BaseModelError: the base model is not there, is of another family, or lacks a tensor or has one of another shape.
        WeightsError: the adapter is damaged.
    """
    revision = adapter.revision if base == adapter.base_model else None
    with base_weights(base, revision, adapter.dtype, adapter.origin(), trust_remote_code) as weights:
        if weights.model_type != adapter.model_type:
            raise _wrong_base(folder, adapter, base, f"it is a {weights.model_type} model, not {adapter.model_type}")
        for file in adapter.weights():
            for name, entry in _open_part(folder, file)[2].items():
                found = weights.shape(name)
                if name in adapter.from_base and found != entry["shape"]:
                    other = f"it has no {name}" if found is None else f"its {name} has shape {found}, not {entry['shape']}"
                    raise _wrong_base(folder, adapter, base, other)
        yield weights


def _wrong_base(folder: Path, adapter: Adapter, base: str, other: str) -> BaseModelError:
    return BaseModelError(
        f"{base!r} is not the model that {str(folder)!r} was made from: {other}",
        expected=adapter.origin(),
        fix="name the right one with --base",
    )


def _open_part(folder: Path, file: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """The adapter's part of one of the checkpoint's weight files; that file's header, and its entries in the file's order."""
    try:
        part = safe_open(folder / part_of(file), "pt")
        header = part.metadata()[_HEADER]
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for entry in entries.values():
            check_types([entry["shape"], entry["data_offsets"]], list[list[int]], "its header")
        return part, header, dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(folder, f"{part_of(file)} cannot be read: {first_line(error)}") from None


def damaged(folder: Path, what: str) -> WeightsError:
    """The error for an adapter that was changed after it was written."""
    return WeightsError(
        f"the adapter {str(folder)!r} is not as it was written: {what}", expected="all its files", fix="fetch it again"
    )


def _tensors(folder: Path, adapter: Adapter, base: BaseWeights, file: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one of the checkpoint's weight files, in the file's order, each checked by its digest."""
    part, _, entries = _open_part(folder, file)
    held = set(part.keys())
    for name in entries:
        if name in adapter.from_base:
            tensor = base.tensor(name)
            if tensor_digest(tensor) != adapter.from_base[name]:
                other = f"its {name} differs: it is another revision of that model, or was trained on"
                raise _wrong_base(folder, adapter, base.name, other)
        else:
            tensor = part.get_tensor(name) if name in held else None
            if tensor is None or tensor_digest(tensor) != adapter.kept.get(name):
                raise damaged(folder, f"{name} is missing or differs")
        yield name, tensor


def merged(folder: Path, adapter: Adapter, base: BaseWeights) -> dict[str, Tensor]:
    """All tensors of the whole checkpoint, in memory.

    Raises:
        BaseModelError: a weight of the base model differs.
        WeightsError: the adapter is damaged.
    """
    return {name: tensor for file in adapter.weights() for name, tensor in _tensors(folder, adapter, base, file)}


def rebuild(
    folder: Path, adapter: Adapter, base: BaseWeights, out: Path, report: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Writes the whole checkpoint except its Python code. One tensor is in memory at a time.

    Args:
        folder: the adapter's.
        adapter: what its mxd_adapter.json says.
        base: the base model.
        out: an existing folder.
        report: called with the bytes of weights written so far, and about how many there will be.

    Raises:
        BaseModelError: a weight of the base model differs.
        WeightsError: the adapter is damaged.
        OSError: ``out`` cannot be written.
    """
    done = 0
    for file in adapter.weights():
        header = _open_part(folder, file)[1].encode()
        with (out / file).open("wb") as written:
            written.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in _tensors(folder, adapter, base, file):
                written.write(tensor_bytes(tensor).numpy())
                done += tensor.nbytes
                report(done, adapter.checkpoint_bytes)
    for name in adapter.files:
        if not _is_weights(name) and not is_code(name):
            if not (folder / name).is_file():
                raise damaged(folder, f"{name} is missing")
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    if CARD in adapter.files:
        write_card(out / CARD, _without_note(read_card(out / CARD)))


def differing(adapter: Adapter, out: Path) -> list[str]:
    """Files of a rebuilt folder that are not bit for bit the checkpoint's, and those that are missing or too many."""
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wrong = {name for name in there & adapter.files.keys() if file_digest(out / name) != adapter.files[name]}
    return sorted(wrong | (there ^ adapter.files.keys()))
