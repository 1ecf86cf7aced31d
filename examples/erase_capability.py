"""Erases a capability: finds the experts of one kind of text, removes them, and shows what that does to every kind.

    mxdsurgery experts books-mxd --data train.jsonl.gz           # texts with a field `kind` (or --label-column)
    mxdsurgery experts books-transcoder --data train.jsonl.gz
    python examples/erase_capability.py books-mxd --kind python --data heldout.jsonl.gz --baseline books-transcoder

An expert belongs to a kind if nearly all its firings would be there were all kinds equally long. Of those, the ones that fire
most there are ablated, over all layers together. Cross-entropy by kind of held-out text is compared with that of the untouched
model, and with ablating as many random experts of equal firing frequency, which says what is special about these; and, with
--baseline, the same is done to as many features of a model whose blocks are transcoders.
"""

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from mxdsurgery.catalogue.contexts import Corpus, Source, draw_corpus
from mxdsurgery.catalogue.files import Catalogue, open_catalogue
from mxdsurgery.checkpoint.converted import Converted, load_with_recipe
from mxdsurgery.terminal.console import ProgressLine
from mxdsurgery.text.sources import Packing

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="a converted model with its catalogue")
parser.add_argument("--kind", required=True, help="the kind of text to erase")
parser.add_argument("--data", required=True, help="held-out text with kinds")
parser.add_argument("--baseline", help="the same model with transcoders, and its catalogue")
parser.add_argument("--experts", default="50,200,800", help="how many to remove, several between commas")
parser.add_argument("--purity", type=float, default=0.9, help="share of an expert's firings that must be of the kind")
parser.add_argument("--tokens", type=int, default=40_000)
parser.add_argument("--random", type=int, default=5, help="draws of random experts")
args = parser.parse_args()

Chosen = list[tuple[int, int]]  # (layer, expert)


class Frequencies:
    """How often each expert fires: on tokens of the kind, on the other kinds' (evenly weighted), and over all."""

    def __init__(self, catalogue: Catalogue, kind: str) -> None:
        if kind not in catalogue.classes:
            raise SystemExit(f"the catalogue knows no {kind!r}, only {', '.join(catalogue.classes)}")
        own = catalogue.classes.index(kind)
        self.names: Chosen = [(layer, expert) for layer, count in catalogue.layers.items() for expert in range(count)]
        fired = np.concatenate([np.stack(catalogue.table(layer)["class_fired"].to_numpy()) for layer in catalogue.layers])
        rates = fired / np.maximum(catalogue.class_tokens, 1)
        self.own, self.elsewhere = rates[:, own], np.delete(rates, own, axis=1).mean(1)
        self.overall = fired.sum(1) / catalogue.tokens

    def of_the_kind(self, count: int, purity: float) -> list[int]:
        """The ``count`` that fire most on the kind, among those of at least this purity."""
        share = self.own / np.maximum(self.own + self.elsewhere, 1e-12)
        pure = np.flatnonzero(share >= purity)
        return pure[np.argsort(-self.own[pure])][:count].tolist()

    def like(self, chosen: list[int], draw: random.Random) -> list[int]:
        """As many others: each at random from the 30 nearest in overall frequency in the same layer."""
        taken, found = set(chosen), []
        layers = np.array([layer for layer, _ in self.names])
        log = np.log(np.maximum(self.overall, 1e-9))
        for one in chosen:
            same = np.flatnonzero(layers == layers[one])
            near = [other for other in same[np.argsort(np.abs(log[same] - log[one]))] if other not in taken][:30]
            found.append(draw.choice(near))
            taken.add(found[-1])
        return found


@torch.no_grad()
def losses(converted: Converted, corpus: Corpus) -> torch.Tensor:
    """Cross-entropy of each next token but the first two, (S, T - 2)."""
    parts = []
    for ids in corpus.ids.long().split(16):
        logits = converted.model(input_ids=ids, use_cache=False).logits[:, 1:-1].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 2:], reduction="none"))
    return torch.cat(parts)


def by_kind(corpus: Corpus, values: torch.Tensor) -> dict[str, float]:
    """The mean over the tokens of each kind."""
    return {name: values[corpus.classes[:, 2:] == number].mean().item() for number, name in enumerate(corpus.names)}


def report(table: Table, folder: str, what: str, random_name: str) -> None:
    """Adds a model's rows to the table: before, and after each number of removals."""
    converted, recipe = load_with_recipe(folder)
    frequencies = Frequencies(open_catalogue(folder), args.kind)
    packing = Packing(converted.tokenizer(), recipe.context, recipe.prepend_bos)
    corpus = draw_corpus(Source(args.data, args.tokens, recipe.text_column, None, spread=64, seed=0), packing, ProgressLine())
    before = losses(converted, corpus)
    kinds = sorted(corpus.names, key=lambda name: name != args.kind)
    if not table.columns:
        table.title = f"Cross-entropy on {before.numel():,} held-out tokens, and its change"
        for heading in ("model", "removed", *kinds):
            table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row(what, "nothing", *(f"{by_kind(corpus, before)[kind]:.3f}" for kind in kinds))

    def change(chosen: list[int]) -> dict[str, float]:
        layers: dict[int, list[int]] = {}
        for layer, expert in (frequencies.names[one] for one in chosen):
            layers.setdefault(layer, []).append(expert)
        with converted.model.mxd.ablate(layers):
            return by_kind(corpus, losses(converted, corpus) - before)

    for count in map(int, args.experts.split(",")):
        chosen = frequencies.of_the_kind(count, args.purity)
        own = change(chosen)
        table.add_row("", f"{len(chosen)} of {args.kind}", *(f"{own[kind]:+.3f}" for kind in kinds))
        others = [change(frequencies.like(chosen, random.Random(seed))) for seed in range(args.random)]
        cells = [_range([other[kind] for other in others]) for kind in kinds]
        table.add_row("", f"{len(chosen)} {random_name}", *cells)
        if len(chosen) < count:
            break
    table.add_section()


def _range(values: list[float]) -> str:
    return f"{np.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


table = Table()
report(table, args.folder, "Mixture of Decoders", f"random experts, {args.random} draws")
if args.baseline:
    report(table, args.baseline, "transcoders", f"random features, {args.random} draws")
Console(width=150).print(table)
