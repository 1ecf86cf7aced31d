"""``probe``: does a single expert stand for a class of texts? Sparse probing, after arXiv 2505.21364, with its floor.

A unit (an expert, a feature or a hidden unit of the original block) is pooled over a text: its mean coefficient over the
text's tokens. For each class, the units whose mean differs most between the class and the rest are each given a logistic
regression on that one feature, fitted on 80 % of the texts; the one that is best there is scored on the other 20 %. The same
with randomly permuted labels is the floor: what choosing the best of many units gives by chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.errors import DataError, MemoryBudgetError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.measuring.expert_layers import HIDDEN_UNITS, block_inputs, keep_beside, open_expert_layers
from mxdsurgery.planning.budget import BUDGET_SHARE
from mxdsurgery.terminal.console import Reporter, size
from mxdsurgery.text.labelled import TokenBatch, read_labelled

# Units per class that get a regression, share of texts that are scored, and shuffles of the labels for the floor.
_CANDIDATES, _TEST_SHARE, _PERMUTATIONS = 100, 0.2, 3
# The least number of texts of a class; with fewer, nothing can be said of it.
_LEAST_TEXTS = 10


@dataclass(frozen=True)
class Pooled:
    """Units pooled over texts: ``features`` (texts, units), each the mean over a text's tokens."""

    name: str
    features: sparse.csc_matrix


@guarded
def probe(
    folder: str | Path,
    *,
    data: str,
    layer: int | None = None,
    text_column: str = "text",
    label_column: str = "label",
    samples: int | None = None,
    context: int | None = None,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Finds, for each class of labelled texts, the expert that tells it best from the others.

    Experts see what the original model's block sees, and so do the hidden units that they are compared with.

    Args:
        folder: what ``convert`` or ``frontier`` wrote; of the latter, every kind and K is probed.
        data: labelled texts: a text with columns, see `mxdsurgery.text.sources`.
        layer: default: the first layer in the folder.
        text_column: column or field that holds the text.
        label_column: column or field that holds the class.
        samples: how many texts, drawn at random; default: all, but 20,000 at most.
        context: each text is cut after so many tokens; default: the recipe's.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        seed: of the sample, the split and the permutations.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object, kept in the folder as ``probing/<data>-layer<layer>.json``: ``texts`` of two tokens or more, of those
        that were drawn from ``drawn_from``, and ``subjects``, each with its ``classes``
        (``unit``, ``f1``, ``balanced_accuracy`` on held-out texts; ``best_f1``, the largest held-out F1 among all candidates,
        as the paper reports it; ``floor_f1`` and ``floor_balanced_accuracy`` with permuted labels) and their means.

    Raises:
        NotConvertedError, OutputError: the folder is not one of ours.
        DataError: the texts cannot be read, or a class has too few.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
    """
    reporter = reporter or Reporter()
    kept = {"data": data, "kept_in": "probing"}
    how = {"base": base, "device": device, "compute": compute, "trust_remote_code": trust_remote_code}
    opened = open_expert_layers(folder, layer, **kept, **how)
    with reporter.progress("draw", "rows") as line:
        labelled = read_labelled(data, text_column, label_column, samples, seed, opened.tokenizer, line.update)
    batches = opened.batches(labelled, context)
    read = torch.cat([batch.rows for batch in batches]) if batches else torch.empty(0, dtype=torch.int64)
    kept = np.sort(read.numpy())
    labels = np.array(labelled.labels)[kept]
    _check_classes(labels, data)
    with reporter.progress("read", "texts") as line:
        pooled = pool(opened.model, opened.block, opened.layers, batches, len(labelled.texts), line.update)
    subjects = []
    with reporter.progress("probe", "subjects") as line:
        for number, subject in enumerate(pooled):
            subjects.append({"name": subject.name} | probe_units(subject.features[kept], labels, seed))
            line.update(number + 1, len(pooled))
    result = {
        "data": data,
        "layer": opened.block.layer,
        "texts": len(kept),
        "drawn_from": labelled.drawn_from,
        "tokens": int(sum(batch.counted.sum() for batch in batches)),
        "classes": {name: int((labels == name).sum()) for name in labelled.classes},
        "subjects": subjects,
    }
    keep_beside(folder, "probing", data, opened.block.layer, result)
    return result


def _check_classes(labels: np.ndarray, data: str) -> None:
    found, counts = np.unique(labels, return_counts=True)
    names = found.tolist()
    if len(names) < 2 or counts.min() < _LEAST_TEXTS:
        found = ", ".join(f"{name!r} {count}" for name, count in zip(names, counts, strict=True))
        raise DataError(
            f"{data!r} has too few texts of a class: {found or 'none of two tokens or more'}",
            expected=f"at least two classes of {_LEAST_TEXTS} texts",
            fix="give more text, or raise or leave out --samples",
        )


@torch.no_grad()
def pool(
    model: PreTrainedModel,
    block: Block,
    layers: dict[str, nn.Module],
    batches: Sequence[TokenBatch],
    texts: int,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Pooled]:
    """Each layer's coefficients, and the block's hidden units, as means over the tokens of each text.

    Args:
        model: the original model.
        block: the block that the layers replace.
        layers: by name.
        batches: all texts.
        texts: how many there are; rows of texts that are in no batch stay zero.
        report: called with the texts done and to do.

    Raises:
        MemoryBudgetError: the hidden units of so many texts do not fit.
    """
    _check_room(texts, block.d_hidden)
    parts: dict[str, list[sparse.coo_matrix]] = {name: [] for name in layers}
    hidden = torch.zeros(texts, block.d_hidden)  # few of them are 0
    for x, owner in block_inputs(model, block, batches, report):
        _, at, counts = owner.unique(return_inverse=True, return_counts=True)
        share = 1.0 / counts[at].float()
        for name, layer in layers.items():
            a = layer.coefficients(x)
            values = (a.values.float().cpu() * share[:, None]).flatten().numpy()
            rows, columns = owner[:, None].expand_as(a.indices).flatten().numpy(), a.indices.cpu().flatten().numpy()
            found = values > 0
            shape = (texts, layer.gate.n_experts)
            summed = sparse.coo_matrix((values[found], (rows[found], columns[found])), shape)
            parts[name].append(summed.tocsr().tocoo())  # adds up a text's tokens
        hidden.index_add_(0, owner, block.hidden(model.base_model, x).float().cpu() * share[:, None])
    pooled = [Pooled(name, _joined(found)) for name, found in parts.items()]
    return [*pooled, Pooled(HIDDEN_UNITS, sparse.csc_matrix(hidden.numpy()))]


def _check_room(texts: int, hidden: int) -> None:
    """Raises MemoryBudgetError if the hidden units of all texts do not fit: once as numbers, once with the text of each."""
    needed, free = texts * hidden * (4 + 8), free_memory("cpu")
    if needed > BUDGET_SHARE * free:
        raise MemoryBudgetError(
            f"the means of {hidden:,} hidden units over each of {texts:,} texts take {size(needed)}; {size(free)} are free",
            expected="room for them in the host's memory",
            fix="look at fewer texts: --samples",
        )


def _joined(parts: list[sparse.coo_matrix]) -> sparse.csc_matrix:
    """The sum of matrices, (texts, units) each, in one step: added one after the other, each sum is written anew."""
    data, rows, columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "row", "col"))
    return sparse.csc_matrix((data, (rows, columns)), parts[0].shape)


def probe_units(features: sparse.csc_matrix, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Each class's best unit with its scores and floors, and their means over classes.

    Args:
        features: (texts, units).
        labels: the classes' names, (texts,).
        seed: of the split and the permutations.
    """
    train, test = train_test_split(np.arange(len(labels)), test_size=_TEST_SHARE, random_state=seed, stratify=labels)
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(labels) for _ in range(_PERMUTATIONS)]
    classes = []
    for name in np.unique(labels):
        best = _best_unit(features, labels == name, train, test)
        floor = [_best_unit(features, other == name, train, test) for other in shuffled]
        floors = {f"floor_{key}": float(np.mean([one[key] for one in floor])) for key in ("f1", "balanced_accuracy")}
        classes.append({"class": str(name)} | best | floors)
    keys = ("f1", "balanced_accuracy", "best_f1", "floor_f1", "floor_balanced_accuracy")
    means = {f"mean_{key}": float(np.mean([entry[key] for entry in classes])) for key in keys}
    return {"units": features.shape[1], "classes": classes} | means


def _best_unit(features: sparse.csc_matrix, positive: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """The unit whose regression has the largest F1 on the training texts, and its scores on the others."""
    known = features[train]
    inside = positive[train]
    difference = np.abs(np.asarray(known[inside].mean(0) - known[~inside].mean(0))).ravel()
    units = np.argsort(-difference)[:_CANDIDATES]
    columns = features[:, units].toarray()
    scale = columns[train].std(0)
    columns = columns / np.where(scale > 0, scale, 1.0)
    said = np.stack([_predictions(columns[:, at : at + 1], positive, train) for at in range(len(units))], axis=1)
    best = int(_f1(said[train], inside).argmax())
    held_out, is_class = said[test], positive[test]
    f1 = _f1(held_out, is_class)
    recalls = held_out[is_class].mean(0), 1 - held_out[~is_class].mean(0)
    return {
        "unit": int(units[best]),
        "f1": float(f1[best]),
        "balanced_accuracy": float((recalls[0][best] + recalls[1][best]) / 2),
        "best_f1": float(f1.max()),
    }


def _predictions(column: np.ndarray, positive: np.ndarray, train: np.ndarray) -> np.ndarray:
    """What one unit's regression, fitted on the training texts, predicts of all: (texts, 1), (texts,) -> (texts,) bool."""
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky").fit(column[train], positive[train])
    return model.predict(column)


def _f1(said: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """F1 of each unit's predictions: (texts, units), (texts,) bool -> (units,)."""
    hits = (said & positive[:, None]).sum(0)
    return 2 * hits / np.maximum(said.sum(0) + positive.sum(), 1)


def probe_tables(result: dict[str, Any]) -> list[Table]:
    """For a terminal: a row per subject, and where there are few of them, a row per class of each."""
    of = f" of {result['drawn_from']:,}" if result["drawn_from"] > result["texts"] else ""
    rests_on = f"{result['texts']:,}{of} texts ({result['tokens']:,} tokens) of {len(result['classes'])} classes"
    title = f"Layer {result['layer']}, {rests_on}"
    summary = Table("what", title=title)
    columns = ("units", "mean F1", "floor", "mean balanced accuracy", "floor")
    for column in columns:
        summary.add_column(column, justify="right")
    for subject in result["subjects"]:
        means = ("mean_f1", "mean_floor_f1", "mean_balanced_accuracy", "mean_floor_balanced_accuracy")
        summary.add_row(subject["name"], f"{subject['units']:,}", *(f"{subject[name]:.3f}" for name in means))
    tables = [summary]
    if len(result["subjects"]) <= 3:
        detail = Table("class", "what")
        for column in ("unit", "F1", "balanced accuracy"):
            detail.add_column(column, justify="right")
        for name in result["classes"]:
            for subject in result["subjects"]:
                entry = next(entry for entry in subject["classes"] if entry["class"] == name)
                scores = f"{entry['f1']:.3f}", f"{entry['balanced_accuracy']:.3f}"
                detail.add_row(name, subject["name"], str(entry["unit"]), *scores)
            detail.add_section()
        tables.append(detail)
    return tables
