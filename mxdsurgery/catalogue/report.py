"""``report``: one page on which every expert can be found and looked at, in a browser, from the disk, without a server.

The page is `report.html`, filled. Its data are chunks: JSON, gzipped, in base64, which the page unpacks when it needs them.

    model            what the page says of the model, and where the rest is; always in the page
    vocabulary       the tokens that occur anywhere, ``ids`` and ``strings``; other chunks name tokens by id
    text-<I>         contexts I * `_CONTEXTS` and on: token ids, empty where no expert's place is in the context
    <L>-index        what the list of layer L shows: a list of N values for each column
    <L>-<I>          everything else about experts I * `_EXPERTS` and on

Windows around places are not stored: the page cuts them out of the contexts, as `Catalogue.window` does.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mxdsurgery.aside import file_aside
from mxdsurgery.base.model import read_tokenizer
from mxdsurgery.catalogue.files import Catalogue, open_catalogue
from mxdsurgery.checkpoint.card import FIGURES, before_last_edit, figure_rows
from mxdsurgery.checkpoint.converted import EVALUATION_FILE, converted_classes, read_config
from mxdsurgery.checkpoint.writing import written_whole
from mxdsurgery.errors import CatalogueError, NotConvertedError, OutputError, as_typed, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.terminal.figures import legend
from mxdsurgery.text.fingerprints import tokens_in_words
from mxdsurgery.text.sources import token_strings

REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).with_name(REPORT_FILE)
# In the head of every page, and nowhere else: a file with this mark may be overwritten.
_MARK = b'<meta name="generator" content="mxdsurgery report">'
_MARK_WITHIN = 4096
# How every file beside a page begins.
_CHUNK = b"mxdChunk("

# How many experts, and how many contexts, are in a chunk.
_EXPERTS, _CONTEXTS = 128, 512

# Code to copy that changes an expert: the page fills in LAYER, EXPERT, FOLDER and AMOUNT, the expert's largest coefficient.
_CODE = (
    ("ablate it, in Python", "with model.mxd.ablate({LAYER: [EXPERT]}): ..."),
    ("steer with it, in Python", "with model.mxd.steer({LAYER: {EXPERT: AMOUNT}}): ..."),
    ("ablate it, in a shell", "mxdsurgery edit FOLDER --out edited --ablate LAYER:EXPERT"),
    ("steer with it, in a shell", "mxdsurgery edit FOLDER --out edited --steer LAYER:EXPERT=AMOUNT"),
)


@guarded
def report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    limit_mib: float = 64,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes a page that shows all experts of a converted model, from what ``experts`` found out about them.

    The page needs no server and no network. The weights are not read.

    Args:
        folder: what ``convert`` wrote, with the catalogue of ``experts``.
        out: the page; default: report.html in the folder.
        limit_mib: the page's data are in the page itself if they take no more MiB than this; otherwise in files in a folder
            beside it, named like the page with ``-data`` added.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        ``page``, the path; ``data``, the folder beside it or None; ``bytes`` of both; ``layers`` and ``experts``, how many.

    Raises:
        NotConvertedError: the folder is not one of ours, or its figures cannot be read.
        ModelNotFoundError: its tokenizer cannot be read.
        CatalogueError: ``experts`` was not run on it, or what it wrote cannot be read or is of another model.
        OutputError: the page cannot be written, or would overwrite a file that is no such page. Nothing of it is left then.
    """
    reporter = reporter or Reporter()
    folder = Path(folder)
    config = read_config(folder)
    catalogue = open_catalogue(folder)
    _check_layers(catalogue, config)
    header = _header(folder, config, catalogue)
    tokenizer = _tokenizer(folder, config, trust_remote_code)
    page = _check_page(folder / REPORT_FILE if out is None else Path(out))
    experts, done = sum(catalogue.layers.values()), 0
    try:
        with TemporaryFile(dir=page.parent) as file:
            chunks, text = _Chunks(file), _Text(catalogue)
            with reporter.progress("report", "experts") as line:
                for layer in catalogue.layers:
                    for count in _write_layer(chunks, text, catalogue, layer):
                        done += count
                        line.update(done, experts)
            text.write(chunks, tokenizer)
            beside = None if chunks.size <= limit_mib * 2**20 else _beside(page)
            header["beside"] = beside and beside.name
            size = _write_page(page, beside, chunks, header)
    except OSError as error:
        raise OutputError(
            f"{str(page)!r} cannot be written: {first_line(error)}", fix="free some space, or give another --out"
        ) from None
    named = {"page": str(page), "data": beside and str(beside)}
    return named | {"bytes": size, "layers": len(catalogue.layers), "experts": experts}


class _Chunks:
    """Chunks on their way into a page, in a temporary file.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size = file, 0
        self.places: dict[str, tuple[int, int]] = {}  # each chunk's offset and length

    def add(self, name: str, value: Any) -> None:
        packed = _packed(value)
        self.places[name] = (self.size, len(packed))
        self.size += self.file.write(packed)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for name, (start, length) in self.places.items():
            self.file.seek(start)
            yield name, self.file.read(length)


class _Text:
    """The contexts, and which contexts and tokens the experts' places refer to."""

    def __init__(self, catalogue: Catalogue) -> None:
        contexts = catalogue.input_ids.combine_chunks()
        self.starts = contexts.offsets.to_numpy()
        self.ids = contexts.values.to_numpy()
        self.wanted = np.zeros(len(contexts), dtype=bool)
        self.tokens: set[int] = set()

    def token(self, place: dict[str, Any]) -> int:
        """The token at a place; marks its context as wanted in the page."""
        self.wanted[place["context"]] = True
        return int(self.ids[self.starts[place["context"]] + place["position"]])

    def write(self, chunks: _Chunks, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the contexts that are wanted, and the strings of all tokens that occur."""
        for first in range(0, len(self.wanted), _CONTEXTS):
            contexts = []
            for number in range(first, min(first + _CONTEXTS, len(self.wanted))):
                ids = self.ids[self.starts[number] : self.starts[number + 1]] if self.wanted[number] else []
                contexts.append([int(token) for token in ids])
                self.tokens.update(contexts[-1])
            chunks.add(f"text-{first // _CONTEXTS}", contexts)
        ids = sorted(self.tokens)
        chunks.add("vocabulary", {"ids": ids, "strings": token_strings(tokenizer, ids)})


def _write_layer(chunks: _Chunks, text: _Text, catalogue: Catalogue, layer: int) -> Iterator[int]:
    """Writes a layer's chunks; yields how many experts each one holds."""
    index: dict[str, list] = {name: [] for name in ("fired", "mean", "maximum", "token", "class", "lift")}
    for number, rows in enumerate(catalogue.slices(layer, _EXPERTS)):
        for row in rows:
            class_, lift = _preferred_class(row["class_fired"] or [], catalogue.class_tokens)
            values = row["fired"], _short(row["mean"]), _short(row["maximum"]), _typical_token(row, text), class_, lift
            for column, value in zip(index.values(), values, strict=True):
                column.append(value)
            text.tokens.update(entry["token"] for name in ("promotes", "demotes") for entry in row[name] or [])
        chunks.add(f"{layer}-{number}", [_detail(row) for row in rows])
        yield len(rows)
    chunks.add(f"{layer}-index", index)


def _detail(row: dict[str, Any]) -> dict[str, Any]:
    """An expert's row as the page reads it: lists in place of dicts, numbers to four figures."""
    made: dict[str, Any] = {name: row[name] or [] for name in ("histogram", "class_fired")}
    for name in ("top", "sample"):
        made[name] = [
            [place["context"], place["position"], _short(place["coefficient"]), [_short(value) for value in place["window"]]]
            for place in row[name] or []
        ]
    for name, key, value in (
        ("scales_up", "dimension", "value"),
        ("scales_down", "dimension", "value"),
        ("promotes", "token", "value"),
        ("demotes", "token", "value"),
        ("similar", "expert", "cosine"),
    ):
        made[name] = [[entry[key], _short(entry[value])] for entry in row[name] or []]
    return made


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}") or 0  # most values are zeros: 0 is shorter than 0.0


def _typical_token(row: dict[str, Any], text: _Text) -> int | None:
    """The token with the largest sum of coefficients over an expert's places; None if it never fired."""
    sums: dict[int, float] = defaultdict(float)
    for name in ("top", "sample"):
        for place in row[name] or []:
            sums[text.token(place)] += place["coefficient"]
    return max(sums, key=sums.__getitem__) if sums else None


def _preferred_class(fired: list[int], tokens: list[int]) -> tuple[int, float]:
    """The class that most distinguishes an expert's firings from the text, and its lift.

    Args:
        fired: firings by class.
        tokens: the text's tokens by class.

    Returns:
        The class's index, -1 for none, and its lift: its share of the firings over its share of the tokens. It is the class
        with the largest term in the divergence of firings from tokens, so that a rare class does not win by a single firing.
    """
    if not sum(fired):
        return -1, 0.0
    shares = [count / sum(fired) for count in fired]
    lifts = [share * sum(tokens) / count if count else 0.0 for share, count in zip(shares, tokens, strict=True)]
    terms = [share * math.log(lift) if lift else 0.0 for share, lift in zip(shares, lifts, strict=True)]
    best = max(range(len(terms)), key=terms.__getitem__)
    return best, _short(lifts[best])


def _header(folder: Path, config: dict[str, Any], catalogue: Catalogue) -> dict[str, Any]:
    """The chunk ``model``."""
    mxd = config["mxd"]
    same = ("data", "tokens", "context", "contexts", "classes", "class_tokens", "before", "after", "bins")
    return {
        "name": folder.resolve().name,
        "base": mxd["base_model"],
        **{name: getattr(catalogue, name) for name in same},
        "layers": [[layer, n_experts] for layer, n_experts in catalogue.layers.items()],
        "experts_in_chunk": _EXPERTS,
        "contexts_in_chunk": _CONTEXTS,
        "figures": _figures(folder, mxd.get("edits") or []),
        "edits": [_step(step) for step in mxd.get("edits") or []],
        "code": _CODE,
        "folder": as_typed(folder),
    }


def _figures(folder: Path, edits: list[dict[str, Any]]) -> dict[str, Any]:
    """evaluation.json as a table of strings; ``edits`` are the edit steps that were made to the model."""
    path = folder / EVALUATION_FILE
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        older = "; before the last edit" if before_last_edit(evaluation, edits) else ""
        headings = ["layer", *(heading for _, heading, _ in FIGURES)]
        return {
            "headings": headings,
            "rows": figure_rows(evaluation),
            "rests_on": f"{tokens_in_words(evaluation)}; original cross-entropy "
            f"{evaluation['original']['ce']:.4f} nats per token{older}",
            "legend": legend(headings),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotConvertedError(
            f"{str(path)!r} cannot be read: {first_line(error)}",
            expected="the layers' figures",
            fix=f"run mxdsurgery evaluate {as_typed(folder)}",
        ) from None


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """One step of edits, in words."""
    cost = []
    if step.get("ce_before") is not None and step.get("ce_after") is not None:
        cost.append(f"cross-entropy {step['ce_before']:.4f} before, {step['ce_after']:.4f} after, nats per token")
    if step.get("kl") is not None:
        cost.append(f"KL {step['kl']:.4f}")
    if cost and step.get("tokens") is not None:
        cost.append(f"on {step['tokens']:,} tokens")
    samples = [[sample.get(name, "") for name in ("prompt", "before", "after")] for sample in step.get("samples") or []]
    return {"edits": step.get("edits") or [], "cost": "; ".join(cost), "samples": samples}


def _check_layers(catalogue: Catalogue, config: dict[str, Any]) -> None:
    there = {entry["layer"]: entry["shape"].get("n_experts") for entry in config["mxd"]["layers"]}
    wrong = [layer for layer, n_experts in catalogue.layers.items() if there.get(layer) != n_experts]
    if wrong:
        raise CatalogueError(
            f"{str(catalogue.folder)!r} is of another model: layer {wrong[0]} has {catalogue.layers[wrong[0]]} experts there",
            expected=f"{there.get(wrong[0], 'no experts')}, as config.json says",
            fix="run mxdsurgery experts again",
        )


def _tokenizer(folder: Path, config: dict[str, Any], trusted: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder, without the weights."""
    config_class, _ = converted_classes(folder, config["mxd"], trusted)
    return read_tokenizer(folder, str(folder), config=config_class.from_pretrained(folder), trust_remote_code=trusted)


def _beside(page: Path) -> Path:
    """The folder for data that are too large for the page itself."""
    return page.with_name(page.stem + "-data")


def _check_page(page: Path) -> Path:
    """The path of the page to write, checked: nothing but an older page is there. Creates its folder.

    Raises:
        OutputError: it is not named as a page, there is something else, or the folder cannot be made.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(
            f"{str(page)!r} is no name of a page", expected="a file that ends in .html", fix="give another --out"
        )
    beside = _beside(page)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if page.exists() and not _is_report(page):
            raise OutputError(f"{str(page)!r} exists and is no report", expected="a new file", fix="give another --out")
        if os.path.lexists(beside) and not _is_reports_data(beside):
            raise OutputError(f"{str(beside)!r} exists and is no report's data", fix="give another --out")
    except OSError as error:
        raise OutputError(f"{str(page)!r} cannot be written: {first_line(error)}", fix="give another --out") from None
    return page


def _is_report(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return _MARK in file.read(_MARK_WITHIN)


def _is_reports_data(beside: Path) -> bool:
    """Whether a folder holds what was written beside a page, and nothing else."""
    if beside.is_symlink() or not beside.is_dir():
        return False
    begins = [path.is_file() and path.open("rb").read(len(_CHUNK)) == _CHUNK for path in beside.iterdir()]
    return bool(begins) and all(begins)


def _write_page(page: Path, beside: Path | None, chunks: _Chunks, header: dict[str, Any]) -> int:
    """Writes the page, and the files beside it if there are to be any; returns their bytes."""
    size = 0
    if beside:
        with written_whole(beside) as staging:
            for name, packed in chunks:
                size += (staging / f"{name}.js").write_bytes(_CHUNK + b'"%s","%s");\n' % (name.encode(), packed))
    template = _TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.DOTALL)[1]
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    above, below = template.split("{{chunks}}")
    above = above.replace("{{policy}}", policy).replace("{{title}}", html.escape(f"{header['name']}: experts"))
    with file_aside(page) as new, open(new, "wb") as file:
        file.write(above.encode())
        file.write(_element("model", _packed(header)))
        for name, packed in () if beside else chunks:
            file.write(_element(name, packed))
        file.write(below.encode())
        size += file.tell()
    if not beside:
        if _is_reports_data(_beside(page)):  # an older page's
            shutil.rmtree(_beside(page))
    return size


def _element(name: str, packed: bytes) -> bytes:
    return b'<script type="application/octet-stream" data-chunk="%s">%s</script>\n' % (name.encode(), packed)


def _packed(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0))
