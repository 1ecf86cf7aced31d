"""``search``: which experts of a converted model fire most specifically on a token, an example text or a class of texts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxdsurgery.base.decoder import layer_count
from mxdsurgery.base.running import run_base
from mxdsurgery.base.selection import one_layer
from mxdsurgery.catalogue.experts import recorded_coefficients
from mxdsurgery.catalogue.files import Catalogue, catalogue_of
from mxdsurgery.checkpoint.converted import Converted, load_with_recipe
from mxdsurgery.errors import DataError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.layer import Coefficients

# By token, experts that fired on fewer tokens are left out: their firings say nothing yet.
_LEAST_FIRED = 5
# Without a query, experts that fired on fewer are left out: they are many, and say little about the model.
_OFTEN = 50
# How many tokens are shown on each side of a place.
_AROUND = 8


@guarded
def search(
    folder: str | Path,
    query: str | None = None,
    *,
    by: str = "auto",
    layer: int | None = None,
    top: int = 20,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Ranks experts by how specifically they fire on something.

    By text: the model reads the query. An expert's score is how much its firings there tell, in nats per token of the query:
    ``p ln(p/q) + (1-p) ln((1-p)/(1-q))``, where it fires on the share p of the query's tokens and on the share q of the
    catalogue's, with p above q. Half a firing is subtracted for p, so that a single firing, which may be chance, counts less.

    By token: p is the token's share among the places that were drawn at random from an expert's firings, and q its share of
    the text; the score is ``p ln(p/q)``.

    By class: as by text, where the text is all that the catalogue saw of a class.

    Without a query: the experts that a reader understands at once. Each has the score of the token that has the largest, from
    half a firing less; and of the experts of a token, the best is shown.

    Args:
        folder: what ``convert`` or ``edit`` wrote, with the catalogue that `experts` made of it.
        query: an example text, a token, or a class of the labelled text that the catalogue was made from; None: see above.
        by: ``text``, ``token``, ``class``, or ``auto``: by token if the query, alone or after a space, is one token of the
            vocabulary, or else by text.
        layer: search this layer only; default: all.
        top: how many experts to return.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.

    Returns:
        ``by`` (``clearest`` without a query), ``query``, ``tokens`` (of the query) and ``experts``, best first: ``layer``,
        ``expert``, ``score``, ``share``, ``frequency`` (over the catalogue's text), ``example``, where it fired most strongly,
        and, without a query, ``token``.

    Raises:
        NotConvertedError, CatalogueError: the folder or its catalogue is missing, or they do not belong together.
        DataError: the query has no token, or, by token, more than one; or the catalogue has no such class.
    """
    if query == "" or (query is None and by != "auto"):
        raise DataError("the query is empty", expected="a text, a token or a class")
    converted, _ = load_with_recipe(folder, device, compute, trust_remote_code=trust_remote_code)
    catalogue = catalogue_of(converted)
    layers = list(catalogue.layers)
    if layer is not None:
        layers = [one_layer(layer, layers, catalogue.folder, layer_count(converted.model))]
    tokenizer, tokens = converted.tokenizer(), []
    single = _single_tokens(query, tokenizer) if query is not None else []
    if by == "auto":
        by = "clearest" if query is None else "token" if single else "text"
    if by == "clearest":
        found = _clearest(catalogue, layers)
    elif by == "class":
        found = [row for index in layers for row in _by_class(catalogue, index, query)]
    elif by == "token":
        if not single:
            raise DataError(f"{query!r} is more than one token", expected="a token", fix="--by text")
        found, tokens = _by_token(catalogue, layers, single), [single[0]]
    else:
        found, tokens = _read(converted, tokenizer, catalogue, layers, query)
    found = sorted(found, key=lambda row: -row["score"])[:top]
    for row in found:
        row |= {"token": tokenizer.decode([row["token"]])} if by == "clearest" else {}
        row["example"] = _example(catalogue, catalogue.row(row["layer"], row["expert"], ["top"])["top"], tokenizer)
    return {"by": by, "query": query, "tokens": [tokenizer.decode([token]) for token in tokens], "experts": found}


def _read(
    converted: Converted, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, layers: list[int], query: str
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of the experts that fire while the model reads a text, and the text's tokens."""
    ids = tokenizer(query, return_tensors="pt")["input_ids"]
    first = int(ids.shape[1] > 0 and ids[0, 0] == tokenizer.bos_token_id)
    if ids.shape[1] == first:
        raise DataError("the query is empty", expected="a text or a token")
    with torch.no_grad(), recorded_coefficients(converted, layers) as seen:
        run_base(converted.model, ids.to(converted.model.device))
    found, tokens = [], ids[0, first:].tolist()
    for index in layers:
        a = Coefficients(*(part.cpu() for part in seen[index][0]))
        fires = torch.zeros(catalogue.layers[index], dtype=torch.int64)
        mine = a.indices.reshape(ids.shape[1], -1)[first:][a.values.reshape(ids.shape[1], -1)[first:] > 0]
        found += _by_text(catalogue, index, fires.index_add_(0, mine, torch.ones_like(mine)), len(tokens))
    return found, tokens


def _single_tokens(query: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the query where it is a single token: as it is, and with a space before it."""
    spellings = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, f" {query}"))
    return list(dict.fromkeys(ids[0] for ids in spellings if len(ids) == 1))


def _by_text(catalogue: Catalogue, layer: int, fires: Tensor, tokens: int) -> list[dict[str, Any]]:
    table = catalogue.table(layer, ["frequency"])
    frequency = torch.tensor(table["frequency"].to_numpy())
    p = (fires - 0.5).clamp_min(0).double() / tokens
    q = frequency.clamp(0.5 / catalogue.tokens, 1 - 0.5 / catalogue.tokens)
    score = torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
    score[p <= q] = 0
    best = score.topk(min(100, len(score))).indices.tolist()
    return [
        _row(layer, expert, score[expert], fires[expert] / tokens, frequency[expert]) for expert in best if score[expert] > 0
    ]


def _by_class(catalogue: Catalogue, layer: int, name: str) -> list[dict[str, Any]]:
    if name not in catalogue.classes:
        raise DataError(
            f"the catalogue knows no class {name!r}",
            expected=f"one of {', '.join(catalogue.classes)}" if catalogue.classes else "a catalogue of labelled text",
            fix="" if catalogue.classes else "run mxdsurgery experts on a text with --label-column first",
        )
    own = catalogue.classes.index(name)
    fired = np.stack(catalogue.table(layer, ["class_fired"])["class_fired"].to_numpy())[:, own]
    return _by_text(catalogue, layer, torch.tensor(fired), catalogue.class_tokens[own])


def _clearest(catalogue: Catalogue, layers: list[int]) -> list[dict[str, Any]]:
    """For each token, the expert that it tells most about; ``token`` is its id."""
    ids = np.stack(catalogue.input_ids.to_numpy())
    q = np.bincount(ids[:, 1:].ravel()) / ids[:, 1:].size
    found = []
    for layer in layers:
        table = catalogue.table(layer, ["fired", "frequency", "sample"])
        rows, context, position = _sampled(table)
        places = np.bincount(rows, minlength=len(table))
        pairs, count = np.unique(rows * len(q) + ids[context, position], return_counts=True)
        expert, token = np.divmod(pairs, len(q))
        share = (count - 0.5) / places[expert]
        score = share * np.log(share / q[token])
        often = table["fired"].to_numpy()[expert] >= _OFTEN
        order = np.lexsort((-score, expert))
        best = order[np.unique(expert[order], return_index=True)[1]]
        frequency = table["frequency"].to_numpy()
        for pair in best[(often & (score > 0))[best]].tolist():
            row = _row(layer, int(expert[pair]), score[pair], count[pair] / places[expert[pair]], frequency[expert[pair]])
            found.append(row | {"token": int(token[pair])})
    best_of: dict[int, dict[str, Any]] = {}
    for row in sorted(found, key=lambda row: -row["score"]):
        best_of.setdefault(row["token"], row)
    return list(best_of.values())


def _sampled(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each place that was drawn at random: the expert that fired, the context and the position."""
    sample = table["sample"].combine_chunks()
    places = pc.list_flatten(sample)
    return (
        pc.list_parent_indices(sample).to_numpy(),
        *(pc.struct_field(places, name).to_numpy() for name in ("context", "position")),
    )


def _by_token(catalogue: Catalogue, layers: list[int], wanted: list[int]) -> list[dict[str, Any]]:
    ids = np.stack(catalogue.input_ids.to_numpy())
    q = np.isin(ids[:, 1:], wanted).mean()
    if q == 0:
        return []
    found = []
    for layer in layers:
        table = catalogue.table(layer, ["fired", "frequency", "sample"])
        rows, context, position = _sampled(table)
        hits = np.isin(ids[context, position], wanted)
        count = np.bincount(rows, minlength=len(table))
        share = np.bincount(rows[hits], minlength=len(table)) / np.maximum(count, 1)
        fired, frequency = table["fired"].to_numpy(), table["frequency"].to_numpy()
        for expert in np.flatnonzero((share > q) & (fired >= _LEAST_FIRED)).tolist():
            found.append(_row(layer, expert, share[expert] * math.log(share[expert] / q), share[expert], frequency[expert]))
    return found


def _row(layer: int, expert: int, score: float, share: float, frequency: float) -> dict[str, Any]:
    return {
        "layer": layer,
        "expert": expert,
        "score": float(score),
        "share": float(share),
        "frequency": float(frequency),
    }


def _example(catalogue: Catalogue, places: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Where it fired most strongly: the text before the token, the token, the text after it."""
    if not places:
        return ["", "", ""]
    tokens, _, own = catalogue.window(places[0])
    parts = tokens[max(0, own - _AROUND) : own], tokens[own : own + 1], tokens[own + 1 : own + 1 + _AROUND // 2]
    return [tokenizer.decode(part) for part in parts]


def search_table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    by = result["by"]
    what = {"text": "tokens of the query", "class": "tokens of the class"}.get(by, "of its firings")
    sought = result["query"] if by == "class" else " ".join(map(repr, result["tokens"][:12]))
    table = Table(title="Experts that fire on one token" if by == "clearest" else f"By {by}: {sought}")
    if not result["experts"]:
        other = "--by text reads it with the model" if by == "token" else "try another text"
        table.caption = f"No expert fires on it more often than on the catalogue's text at large: {other}."
        if by == "clearest":
            table.caption = f"No expert fired {_OFTEN} times in the catalogue's text: make one of more text."
    for heading in ("layer", "expert", "nats", f"share ({what})", "frequency"):
        table.add_column(heading, justify="right")
    if by == "clearest":
        table.add_column("token")
    table.add_column("fires most strongly on", no_wrap=True, overflow="ellipsis")
    for row in result["experts"]:
        before, token, after = (repr(part)[1:-1] for part in row["example"])
        example = Text.assemble(before, ("[" + token + "]", "bold"), after)
        cells = (
            str(row["layer"]),
            str(row["expert"]),
            f"{row['score']:.3f}",
            f"{row['share']:.2f}",
            f"{row['frequency']:.1e}",
            *([repr(row["token"])] if by == "clearest" else []),
        )
        table.add_row(*cells, example)
    return table
