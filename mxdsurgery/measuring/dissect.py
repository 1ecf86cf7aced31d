"""``dissect``: what kind of things the experts are. Their rank, how alike they are, how they are used and what for."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from mxdsurgery.hardware.device import widest
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.baselines import Molt, Transforms
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.measuring.alike import Cosines
from mxdsurgery.measuring.expert_layers import HIDDEN_UNITS, ExpertLayers, block_inputs, keep_beside, open_expert_layers
from mxdsurgery.measuring.intervals import frequency_decades
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.terminal.figures import value_of
from mxdsurgery.text.labelled import Labelled, TokenBatch, read_labelled

# Experts whose singular values are computed; all would take minutes.
_RANKED = 256
# Elements of the similarity matrix that are computed at once.
_SIMILARITY_ELEMENTS = 2**24
_QUANTILES = (0.1, 0.5, 0.9)


@guarded
def dissect(
    folder: str | Path,
    *,
    data: str | None = None,
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
    """Says what rank the experts have, how alike they are, and, given labelled text, how they are used and on which classes.

    Args:
        folder: what ``convert`` or ``frontier`` wrote.
        data: labelled texts: a text with columns, see `mxdsurgery.text.sources`; default: none, weights only.
        layer: default: the first layer in the folder.
        text_column: column or field that holds the text.
        label_column: column or field that holds the class.
        samples: how many texts, drawn at random; default: all, but 20,000 at most.
        context: each text is cut after so many tokens; default: the recipe's.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        seed: of the samples and permutations.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object, kept in the folder as ``dissection/layer<layer>.json``: the ``decoder_effective_rank`` of the original
        block, and for each of ``subjects``: ``rank`` (`expert_ranks`), ``similarity`` (`nearest_similarity`) and, with data,
        ``usage`` and ``specialisation`` (`class_information`); this one also for the block's hidden units.

    Raises:
        NotConvertedError, OutputError: the folder is not one of ours.
        DataError: the texts cannot be read.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
    """
    reporter = reporter or Reporter()
    kept = {"data": data, "kept_in": "dissection"}
    how = {"base": base, "device": device, "compute": compute, "trust_remote_code": trust_remote_code}
    opened = open_expert_layers(folder, layer, **kept, **how)
    labelled = None
    if data is not None:
        with reporter.progress("draw", "rows") as line:
            labelled = read_labelled(data, text_column, label_column, samples, seed, opened.tokenizer, line.update)
    decoder = opened.block.decoder.weight(opened.model.base_model)
    result: dict[str, Any] = {"layer": opened.block.layer, "decoder_effective_rank": effective_rank(decoder)}
    result["subjects"] = [
        {"name": name, "rank": expert_ranks(made, seed), "similarity": nearest_similarity(made, seed)}
        for name, made in opened.layers.items()
    ]
    if labelled is not None:
        batches = opened.batches(labelled, context)
        with reporter.progress("read", "texts") as line:
            result |= _used_on(opened, labelled, batches, seed, result["subjects"], line.update)
        result |= {"data": data, "texts": sum(len(batch.rows) for batch in batches), "drawn_from": labelled.drawn_from}
        result["tokens"] = int(sum(batch.counted.sum() for batch in batches))
    keep_beside(folder, "dissection", data, opened.block.layer, result)
    return result


def effective_rank(matrix: Tensor) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007): 1 to min(shape); 0 of zeros."""
    return _entropy_rank(torch.linalg.svdvals(_wide(matrix)))


def _wide(matrix: Tensor) -> Tensor:
    """The matrix in float64; on the CPU if its own device has no float64."""
    return (matrix if widest(matrix.device) == torch.float64 else matrix.cpu()).double()


def _entropy_rank(singular_values: Tensor) -> float:
    if not singular_values.any():
        return 0.0
    shares = singular_values / singular_values.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def expert_ranks(layer: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Effective ranks of the experts' matrices ``W_n = diag(c_n) D``; a transcoder's features are outer products, of rank 1.

    Returns:
        ``experts``: how many were looked at; ``effective``: quantiles by name; ``numerical_median``: of the numerical rank.
    """
    if isinstance(layer, Molt):
        return _transform_ranks(layer.experts, seed)
    if not isinstance(layer, MxDLayer):
        return {"experts": layer.gate.n_experts, "effective": {f"{q:.0%}": 1.0 for q in _QUANTILES}, "numerical_median": 1}
    decoder, c = _wide(layer.decoder.weight), _wide(layer.experts.weight)
    chosen = torch.randperm(len(c), generator=torch.Generator().manual_seed(seed))[:_RANKED].to(c.device)
    effective, numerical = [], []
    for row in c[chosen]:
        values = torch.linalg.svdvals(row[:, None] * decoder)
        effective.append(_entropy_rank(values))
        numerical.append(_numerical_rank(values, max(decoder.shape)))
    return _rank_figures(effective, numerical)


def _transform_ranks(experts: Transforms, seed: int) -> dict[str, Any]:
    """The same of transforms ``U V``, by way of the triangular factors of U and Vᵀ."""
    n_experts = sum(count for _, count in experts.ranks)
    chosen = torch.randperm(n_experts, generator=torch.Generator().manual_seed(seed))[:_RANKED]
    effective, numerical = [], []
    for rows in map(experts.rows, chosen.tolist()):
        write, read = (torch.linalg.qr(_wide(part[rows]).T).R for part in (experts.weight, experts.reads))
        values = torch.linalg.svdvals(write @ read.T)
        effective.append(_entropy_rank(values))
        numerical.append(_numerical_rank(values, experts.weight.shape[1]))
    return _rank_figures(effective, numerical)


def _numerical_rank(singular_values: Tensor, size: int) -> int:
    return int((singular_values > singular_values.max() * size * torch.finfo(torch.float32).eps).sum())


def _rank_figures(effective: list[float], numerical: list[int]) -> dict[str, Any]:
    quantiles = {f"{q:.0%}": float(np.quantile(effective, q)) for q in _QUANTILES}
    return {"experts": len(effective), "effective": quantiles, "numerical_median": int(np.median(numerical))}


@torch.no_grad()
def nearest_similarity(layer: nn.Module, seed: int = 0) -> dict[str, dict[str, float]]:
    """The |cosine| of each expert's matrix with that of the expert most like it; and the same of random rows, as chance.

    ``<W_n, W_m> = Σ_d c_nd c_md ‖D_d‖²`` with D_d the decoder's row d; of a transcoder, the cosine of the rows of C; of a
    MOLT, that of the matrices ``U_n V_n``, and chance is that of random ones.

    Returns:
        ``experts`` and ``chance`` (as many random rows): quantiles of the nearest |cosine| over the experts.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, Molt):
        random = copy.deepcopy(layer.experts)
        for part in random.parameters():
            part.copy_(torch.randn(part.shape, generator=generator))
        return {"experts": _nearest(layer.experts), "chance": _nearest(random)}
    c = layer.experts.weight.float()
    if isinstance(layer, MxDLayer):
        c = c * layer.decoder.weight.float().norm(dim=1)
    random = torch.randn(c.shape, generator=generator).to(c.device)
    return {"experts": _nearest(c), "chance": _nearest(random * c.std(0))}


def _nearest(experts: Transforms | Tensor) -> dict[str, float]:
    nearest, cosines = [], Cosines(experts)
    n_experts = cosines.n_experts
    for some in torch.arange(n_experts, device=cosines.device).split(max(1, _SIMILARITY_ELEMENTS // n_experts)):
        near = cosines.of(some).abs()
        near[torch.arange(len(some), device=some.device), some] = 0.0  # itself
        nearest.append(near.amax(1))
    every = torch.cat(nearest).cpu().numpy()
    return {f"{q:.0%}": float(np.quantile(every, q)) for q in _QUANTILES}


@torch.no_grad()
def _used_on(
    opened: ExpertLayers,
    labelled: Labelled,
    batches: list[TokenBatch],
    seed: int,
    subjects: list[dict[str, Any]],
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Adds to each subject its usage and specialisation; returns the hidden units' specialisation."""
    classes = labelled.classes
    true = torch.tensor([classes.index(label) for label in labelled.labels])
    shuffled = true[torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))]
    of_text = torch.stack([true, shuffled])  # (2, texts)
    units = {name: layer.gate.n_experts for name, layer in opened.layers.items()} | {HIDDEN_UNITS: opened.block.d_hidden}
    # By unit and class: summed coefficients (of hidden units, absolute values), with the true labels and with shuffled ones.
    mass = {name: torch.zeros(2, count, len(classes), dtype=torch.float64) for name, count in units.items()}
    fired = {name: torch.zeros(layer.gate.n_experts) for name, layer in opened.layers.items()}
    tokens = torch.zeros(2, len(classes), dtype=torch.float64)
    for x, owner in block_inputs(opened.model, opened.block, batches, report):
        coefficients = {name: layer.coefficients(x) for name, layer in opened.layers.items()}
        z = opened.block.hidden(opened.model.base_model, x).abs().cpu().double()
        for name, a in coefficients.items():
            fired[name] += torch.bincount(a.indices[a.values > 0].cpu(), minlength=len(fired[name]))
        for at, labels in enumerate(of_text[:, owner]):  # (n,), the class of each token
            tokens[at] += torch.bincount(labels, minlength=len(classes))
            mass[HIDDEN_UNITS][at].T.index_add_(0, labels, z)
            for name, a in coefficients.items():
                places = a.indices.cpu() * len(classes) + labels[:, None]
                mass[name][at].view(-1).index_add_(0, places.flatten(), a.values.cpu().double().flatten())
    for subject in subjects:
        frequency = fired[subject["name"]] / tokens[0].sum()
        subject["usage"] = {
            "l0": frequency.sum().item(),
            "dead_share": (frequency == 0).double().mean().item(),
            "firing_frequency": frequency_decades(frequency),
            # So many experts, used evenly, would have the same entropy.
            "effective_experts": _entropy_rank(frequency.double()),
        }
        subject["specialisation"] = class_information(mass[subject["name"]], tokens)
    return {"classes": classes, "hidden_units": class_information(mass[HIDDEN_UNITS], tokens)}


def class_information(mass: Tensor, tokens: Tensor) -> dict[str, float | None]:
    """How much the unit tells about the class of the text, where all classes are equally likely.

    Args:
        mass: (2, units, classes), coefficients summed over tokens; at index 1 with labels shuffled among texts.
        tokens: (2, classes), tokens of each class.

    Returns:
        ``information``: the mutual information of unit and class, over the classes' entropy, 0 to 1; ``classes_per_unit``:
        ``exp`` of a unit's entropy over classes, averaged over the mass, 1 to the number of classes; and both with the
        labels shuffled, ``chance_information`` and ``chance_classes_per_unit``. None where no unit ever fires; information
        also where there is one class.
    """
    found: dict[str, float | None] = {}
    for prefix, sums, counts in zip(("", "chance_"), mass, tokens, strict=True):
        joint = sums / counts.clamp_min(1)  # each class as likely as any other
        if not joint.any():
            found |= {f"{prefix}information": None, f"{prefix}classes_per_unit": None}
            continue
        joint = joint / joint.sum()
        of_unit = joint.sum(1)
        entropies = torch.special.entr(joint / of_unit[:, None].clamp_min(1e-30)).sum(1)
        of_class = torch.special.entr(joint.sum(0)).sum().item()
        left = (of_unit * entropies).sum().item()
        found[f"{prefix}information"] = (of_class - left) / math.log(joint.shape[1]) if joint.shape[1] > 1 else None
        found[f"{prefix}classes_per_unit"] = (of_unit * entropies.exp()).sum().item()
    return found


def dissection_table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    rank = f"original decoder's effective rank {result['decoder_effective_rank']:.0f}"
    on = f"; on {result['tokens']:,} tokens of {len(result['classes'])} classes" if "tokens" in result else ""
    table = Table("what", title=f"Layer {result['layer']}: {rank}{on}")
    headings = ["effective rank", "nearest |cos|", "by chance"]
    if "tokens" in result:
        headings += ["unused", "effective experts", "class information", "by chance", "classes per unit", "by chance"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for subject in result["subjects"]:
        near = subject["similarity"]
        cells = [f"{subject['rank']['effective']['50%']:.0f}", f"{near['experts']['50%']:.2f}", f"{near['chance']['50%']:.2f}"]
        if "tokens" in result:
            usage = subject["usage"]
            cells += [
                f"{usage['dead_share']:.1%}",
                f"{usage['effective_experts']:,.0f}",
                *_information(subject["specialisation"]),
            ]
        table.add_row(subject["name"], *cells)
    if "tokens" in result:
        table.add_row(HIDDEN_UNITS, *["-"] * 5, *_information(result["hidden_units"]))
    return table


def _information(found: dict[str, float | None]) -> list[str]:
    forms = {"information": ".3f", "chance_information": ".3f", "classes_per_unit": ".2f", "chance_classes_per_unit": ".2f"}
    return [value_of(found, name, form) for name, form in forms.items()]
