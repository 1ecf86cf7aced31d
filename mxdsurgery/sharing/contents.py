"""What of a model's folder is published: the files that belong to the model, complete, and without secrets or local paths.

A small file is held as the bytes that were searched, so that exactly these are sent; weights and tables stay on the disk.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.base.terms import is_terms
from mxdsurgery.checkpoint.adapter import ADAPTER_FILE, Adapter, is_adapter, is_code, part_of, read_adapter
from mxdsurgery.checkpoint.converted import EVALUATION_FILE, PLAN_FILE, RECIPE_FILE, read_config
from mxdsurgery.checkpoint.export import TRAVELLING
from mxdsurgery.checkpoint.readme import CARD
from mxdsurgery.checkpoint.trained_on import TRAINED_ON_FILE
from mxdsurgery.disclosure import Finding, disclosures, redacted
from mxdsurgery.errors import DataError, PushError, WeightsError, first_line

if TYPE_CHECKING:  # only the catalogue of experts needs it
    import pyarrow.parquet as parquet

_MODELING = "modeling_mxd.py"
_CODE = (*TRAVELLING, "configuration_mxd.py", _MODELING)
_NEEDED = (CARD, "config.json", PLAN_FILE, RECIPE_FILE, EVALUATION_FILE, "tokenizer_config.json")
_KEPT_BY_EDIT = (CARD, "config.json", EVALUATION_FILE, "before.safetensors", "digests.json", "edits.yaml", "*.py")
# Files that belong to a model, as patterns for `fnmatch`. All else in the folder stays here.
_KNOWN = (
    *_NEEDED,
    ADAPTER_FILE,
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter*.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model*.safetensors",
    f"lora/{CARD}",
    *(f"edits/*/{name}" for name in _KEPT_BY_EDIT),
    TRAINED_ON_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*",
)
_EXPERTS = "experts/*"
_CONTEXTS = "experts/contexts.parquet"
# These list pieces of words: what looks like a path or "token: ..." in them is nobody's.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "vocab.*", "merges.txt", "spiece.model")
_ON_DISK = (".safetensors", ".parquet")

_AS_WRITTEN = "the folder as mxdsurgery wrote it"
_MOST_SHOWN = 12


@dataclass
class Upload:
    """The part of a folder that is sent.

    Attributes:
        folder: where it is.
        contents: by name in the folder, each file's bytes, or its path if it is sent from the disk.
        redacted: names of the files in which local paths were shortened.
        left_out: what stays here: files, and folders (with a slash) of which nothing is sent.
    """

    folder: Path
    contents: dict[str, bytes | Path]
    redacted: list[str]
    left_out: list[str]


def pack(folder: str | Path, *, redact: bool = False, include_experts: bool = False) -> Upload:
    """Chooses what to send of a folder.

    Args:
        folder: what ``convert``, ``edit`` or ``heal`` wrote, a checkpoint or an adapter; it is left as it is.
        redact: cut local paths in text files, but not in code, down to their last component.
        include_experts: the catalogue of ``experts`` too.

    Raises:
        NotConvertedError: the folder is not one of ours.
        WeightsError: its weights are incomplete or cannot be read.
        PushError: other files are missing.
    """
    folder = Path(folder)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    _check_complete(folder, adapter)
    known = (*_KNOWN, *(_code(folder) if adapter is None else ()), *((_EXPERTS,) if include_experts else ()))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    chosen = {file.as_posix() for file in files if _among(file.as_posix(), known) or is_terms(file.as_posix())}
    if include_experts and _CONTEXTS not in chosen:
        raise PushError(f"{str(folder)!r} holds no catalogue of experts", fix="mxdsurgery experts writes it")
    upload = Upload(folder, {}, [], _others(files, chosen))
    for name in sorted(chosen):
        upload.contents[name] = folder / name if name.endswith(_ON_DISK) else (folder / name).read_bytes()
        if redact and not name.endswith((*_ON_DISK, ".py")) and not _among(name, _VOCABULARIES):
            _redact(upload, name)
    if adapter is not None:
        _note_changes(upload, adapter)
    return upload


def belongs(name: str) -> bool:
    """Whether a push writes a file of this name into a repository, and people do not write such a file themselves."""
    return _among(name, (*_KNOWN, *_CODE, _EXPERTS)) and not written_by_people(name)


def written_by_people(name: str) -> bool:
    """Whether a new repository may well have a file of this name before anything was pushed to it."""
    return is_terms(name) or _among(name, (CARD, ".gitattributes"))


def _among(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name matches one of the patterns; a star matches no slash."""
    return any(fnmatchcase(name, pattern) and pattern.count("/") == name.count("/") for pattern in patterns)


def _others(files: list[Path], chosen: set[str]) -> list[str]:
    sent = {name.split("/")[0] for name in chosen}
    left = (file for file in files if file.as_posix() not in chosen)
    return sorted({file.as_posix() if len(file.parts) == 1 or file.parts[0] in sent else f"{file.parts[0]}/" for file in left})


def _check_complete(folder: Path, adapter: Adapter | None) -> None:
    """Raises `pack`'s errors unless the folder is one of ours, with every file that loading it needs."""
    if adapter is None:
        read_config(folder)
        missing = [name for name in (*_NEEDED, *_CODE[-2:]) if not (folder / name).is_file()] or _missing_code(folder)
    else:
        missing = [name for name in {*_NEEDED, *_beside(adapter)} if not (folder / name).is_file()]
    if missing:
        raise PushError(
            f"{str(folder)!r} is not complete: there is no {', '.join(sorted(missing)[:3])}",
            expected=_AS_WRITTEN,
            fix="mxdsurgery evaluate writes evaluation.json and the card anew; else write the folder again",
        )
    held = {path.relative_to(folder).as_posix(): _names(path) for path in sorted(folder.rglob("*.safetensors"))}
    absent = _missing_weights(folder, held) if adapter is None else _missing_parts(adapter, held)
    if absent:
        raise WeightsError(f"{str(folder)!r} holds no {', '.join(absent[:3])}", expected=_AS_WRITTEN)


def _code(folder: Path) -> list[str]:
    """A checkpoint's files of code: ours, and those of the base model's own that ours imports."""
    imported = {path for file in _CODE[-2:] for path in get_relative_import_files(folder / file)}
    return [*_CODE, *sorted(Path(path).name for path in imported)]


def _missing_code(folder: Path) -> list[str]:
    """Missing files of the checkpoint's code, which its other files import."""
    try:
        get_relative_import_files(folder / _MODELING)
    except FileNotFoundError as error:
        return [Path(error.filename).name]
    return []


def _missing_weights(folder: Path, held: dict[str, list[str]]) -> list[str]:
    """What is missing of a checkpoint: its weight file, or tensors that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [] if "model.safetensors" in held else ["model.safetensors"]
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} cannot be read: {first_line(error)}", expected=_AS_WRITTEN) from None
    return sorted({file for _, file in named} - held.keys()) or [n for n, file in named if n not in held[file]]


def _missing_parts(adapter: Adapter, held: dict[str, list[str]]) -> list[str]:
    """What is missing of an adapter: its parts of the checkpoint's weight files, or tensors that it keeps."""
    parts = [part_of(name) for name in adapter.weights()]
    tensors = {name for part in parts for name in held.get(part, ())}
    return [part for part in parts if part not in held] or sorted(adapter.kept.keys() - tensors)


def _names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, after a check that it can be read."""
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {first_line(error)}", expected=_AS_WRITTEN) from None


def _beside(adapter: Adapter) -> list[str]:
    """The checkpoint's files that an adapter holds as they are: all but weights and code."""
    weights = adapter.weights()
    return [name for name in adapter.files if name not in weights and not is_code(name)]


def _redact(upload: Upload, name: str) -> None:
    given = upload.contents[name]
    assert isinstance(given, bytes)
    text = given.decode("utf-8", "surrogateescape")
    if name.endswith(CARD):
        # The hub reads `base_model` as the name of a model there: a local folder's name would point to another model.
        text = re.sub(r"\A(---\n(?:.*\n)*?)base_model: *[\"']?(?:/|[A-Za-z]:\\).*\n", r"\1", text)
    sent = redacted(text).encode("utf-8", "surrogateescape")
    if sent != given:
        upload.contents[name] = sent
        upload.redacted.append(name)


def _note_changes(upload: Upload, adapter: Adapter) -> None:
    """Updates the adapter's list of files to those that are sent, because `apply` compares them."""
    given = upload.contents[ADAPTER_FILE]
    assert isinstance(given, bytes)
    values = json.loads(given)
    for name in _beside(adapter):
        content = upload.contents.get(name)
        if content is None:
            del values["files"][name]
        elif name in upload.redacted and name != CARD:  # a card may be edited: `apply` says so, and goes on
            values["files"][name] = hashlib.sha256(content).hexdigest()
    if values != json.loads(given):
        upload.contents[ADAPTER_FILE] = (json.dumps(values, indent=1) + "\n").encode()


def check_disclosures(upload: Upload, known: set[str], redact: bool) -> None:
    """Searches all that would be sent for secrets and local paths.

    Args:
        upload: what would be sent.
        known: secrets to search for literally.
        redact: whether paths were shortened already; for the advice only.

    Raises:
        PushError: something was found; it names file and line, and shows only the beginning of a secret.
    """
    found: list[tuple[str, Finding]] = []
    for name, text, vocabulary in _texts(upload):
        found += [(name, finding) for finding in disclosures(text, known, vocabulary)]
    if not found:
        return
    lines = [f"{name}, line {finding.line}: {finding.what}: {finding.shown}" for name, finding in found[:_MOST_SHOWN]]
    lines += [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
    fixes = []
    if any(finding.secret for _, finding in found):
        fixes.append("take the secrets out, and revoke them if others have seen this folder")
    if any(not finding.secret for _, finding in found):
        fixes.append("take the paths out by hand" if redact else "--redact sends copies with only the last part of each path")
    raise PushError(
        f"nothing of {str(upload.folder)!r} was sent: it would publish\n  " + "\n  ".join(lines),
        expected="no secret and no path of this machine in any file that is sent",
        fix="; ".join(fixes),
    )


def _texts(upload: Upload) -> Iterator[tuple[str, str, bool]]:
    """All readable text in what is sent: its place, the text, and whether it lists or quotes the words of others."""
    for name, content in upload.contents.items():
        if isinstance(content, bytes):
            yield name, content.decode("utf-8", "replace"), _among(name, _VOCABULARIES)
        elif name.endswith(".safetensors"):
            with safe_open(content, "pt") as opened:
                yield f"{name} (header)", json.dumps(opened.metadata() or {}, indent=1, ensure_ascii=False), False
        else:
            yield f"{name} (schema)", str(_table(content).schema_arrow), False
        if name == _CONTEXTS:
            for number, text in enumerate(_contexts(upload.folder)):
                yield f"{name} (context {number})", text, True


def _table(path: Path) -> "parquet.ParquetFile":
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # Arrow's own errors are among these
        raise DataError(f"{path} cannot be read: {first_line(error)}", fix="write it anew: mxdsurgery experts") from None


def _contexts(folder: Path) -> Iterator[str]:
    """The text that a catalogue keeps, one context at a time."""
    tokenizer = load_tokenizer(str(folder))
    for batch in _table(folder / _CONTEXTS).iter_batches(256, columns=["input_ids"]):
        yield from tokenizer.batch_decode(batch.column(0).to_pylist())
