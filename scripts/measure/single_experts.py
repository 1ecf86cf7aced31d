"""Measures what a single expert does, by the share that the experts carry, and prints docs/single-experts.md.

    python scripts/measure/single_experts.py measure --shared ../shared --only stories  # 20 minutes on one core
    python scripts/measure/single_experts.py page > docs/single-experts.md

What is measured is kept in docs/single-experts/. Models that are in --runs already are not converted again: delete them to
begin anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import one_expert
import single_experts_page as printed
import torch
from material import BOOKS, STEPS, STORIES, only_option, runs_option, shared_option
from one_expert import Firings, LayerAtWork
from pages import DOCS, machine, read_json, read_lines, write_lines
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import mxdsurgery
from mxdsurgery.catalogue.contexts import Corpus, Source, draw_corpus
from mxdsurgery.checkpoint.converted import load_with_recipe
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.terminal.console import ConsoleReporter, ProgressLine
from mxdsurgery.text.sources import Packing, token_strings

KEPT = DOCS / "single-experts"
# Of each: the layers, single experts, erasing.
LAYERS, EXPERTS, ERASED = (KEPT / f"{name}.jsonl" for name in ("layers", "experts", "erased"))
K, EVAL_TOKENS = 16, 24_576
# Tokens on which experts are known, of the training text; and held-out ones: for ablating, for steering, for erasing.
KNOWN_TOKENS, ABLATE_TOKENS, STEER_TOKENS, ERASE_TOKENS = 131_072, 65_536, 2_048, 24_576
# Experts are compared within these bands of frequency, so many of each; each fires in so many held-out places or more, and is
# ablated in so many contexts at most.
BANDS, IN_BAND, LEAST_FIRED, MOST_CONTEXTS = ((0.002, 0.01), (0.02, 0.06)), 48, 16, 16
KL = (0.1, 0.5)  # how hard is steered, nats per prediction
BUDGETS, DRAWS = (0.1, 0.25), 3  # what erasing is to cost, as a share of what removing the whole layer costs
# Of a text that comes as one file: so many of its first characters are held out, with the held-out file.
SET_ASIDE = 250_000


@dataclass(frozen=True)
class Variant:
    """What stands in the block's place, by recipe keys."""

    name: str
    keys: dict[str, Any]


VARIANTS = (
    *(Variant(f"mxd, share {share:g}", {"expert_share": share}) for share in (0.0, 0.25, 0.5, 0.9)),
    Variant("transcoder", {"kind": "transcoder"}),
    Variant("molt", {"kind": "molt"}),
)


@dataclass(frozen=True)
class Subject:
    """A model, its texts, a middle layer, training tokens, and what is erased: kinds of text, or what `told_apart` knows."""

    model: str
    texts: tuple[str, str]
    layer: int
    tokens: int
    labels: tuple[str, ...]


SUBJECTS = (
    Subject("stories260K", STORIES, 2, 1_000_000, ("speech", "sentence starts")),
    Subject("books-llama-6m", BOOKS, 3, 500_000, ("python", "wiki")),
)


def texts_of(subject: Subject, shared: Path, runs: Path) -> dict[str, str]:
    """Training text and held-out text, as `convert` takes them: of stories, more is held out than comes as held out."""
    data, eval_data = (shared / "text" / name for name in subject.texts)
    if subject.texts != STORIES:
        return {"data": str(data), "eval_data": str(eval_data)}
    whole = data.read_text(encoding="utf-8")
    cut = whole.index("\n\n", SET_ASIDE)
    parts = {"data": whole[cut:], "eval_data": whole[:cut] + "\n\n" + eval_data.read_text(encoding="utf-8")}
    runs.mkdir(parents=True, exist_ok=True)
    for name, text in parts.items():
        (runs / f"{subject.model}-{name}.txt").write_text(text, encoding="utf-8")
    return {name: str(runs / f"{subject.model}-{name}.txt") for name in parts}


def converted(subject: Subject, variant: Variant, shared: Path, runs: Path, texts: dict[str, str]) -> Path:
    """The folder of a converted model, made unless it is there."""
    out = runs / f"{subject.model}-{variant.name}".replace(", ", "-").replace(" ", "-")
    if not (out / "evaluation.json").is_file():
        mxdsurgery.convert(
            str(shared / "models" / subject.model),
            layers=str(subject.layer),
            k=K,
            tokens=subject.tokens,
            eval_tokens=EVAL_TOKENS,
            dtype="float32",
            device="cpu",
            out=str(out),
            reporter=ConsoleReporter(),
            **texts | STEPS | variant.keys,
        )
    return out


def places_of(labels: tuple[str, ...], corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Which places (S, T) of a text are labelled: by the kind of their document, or by what they are about to predict."""
    found = {label: corpus.classes == corpus.names.index(label) for label in labels if label in corpus.names}
    if len(found) == len(labels):
        return found
    ids = sorted(set(corpus.ids.flatten().tolist()))
    text = dict(zip(ids, token_strings(tokenizer, ids), strict=True))
    told = [told_apart([text[token] for token in context]) for context in corpus.ids.tolist()]
    return {label: torch.tensor([of[label] for of in told]) for label in labels}


def told_apart(tokens: list[str]) -> dict[str, list[bool]]:
    """Of a story's tokens, which stand within quotation marks, and which end a sentence (and what comes next begins one)."""
    marks = [
        (number, character == '"' and ("".join(tokens[:number])[-1:] + token[:place])[-1:].strip() == "")
        for number, token in enumerate(tokens)
        for place, character in enumerate(token)
        if character == '"'
    ]
    inside, speech, opens = bool(marks) and not marks[0][1], [], dict(marks)
    for number in range(len(tokens)):
        inside = opens.get(number, inside)
        speech.append(inside)
    return {"speech": speech, "sentence starts": [token.rstrip('"')[-1:] in (".", "!", "?") for token in tokens]}


def examined(subject: Subject, variant: Variant, folder: Path, texts: dict[str, str]) -> None:
    """Measures all of one converted model, and keeps it."""
    converted, recipe = load_with_recipe(folder, "cpu", "float32")
    work = LayerAtWork(converted, subject.layer)
    tokenizer = converted.tokenizer()

    def text(name: str, tokens: int) -> tuple[Corpus, dict[str, Tensor]]:
        source = Source(texts[name], tokens, recipe.text_column, None, spread=8, seed=0)
        corpus = draw_corpus(source, Packing(tokenizer, recipe.context, recipe.prepend_bos), ProgressLine())
        return corpus, places_of(subject.labels, corpus, tokenizer)

    who = {"model": subject.model, "variant": variant.name}
    known = one_expert.firings(work, *text("data", KNOWN_TOKENS))
    heldout, _ = text("eval_data", ABLATE_TOKENS)
    keep(EXPERTS, who, single(work, heldout, known))
    corpus, labelled = text("eval_data", ERASE_TOKENS)
    keep(
        ERASED,
        who,
        (
            row | {"tokens": int(one_expert.scored(corpus.ids).sum()), "labelled": int(which.sum())}
            for label, which in labelled.items()
            for row in one_expert.erasing(work, corpus, which, known, label, BUDGETS, DRAWS)
        ),
    )
    evaluation = read_json(folder / "evaluation.json")
    figures = evaluation["layers"][0]
    row = {"train_tokens": subject.tokens, "n_experts": work.n_experts, "original_ce": evaluation["original"]["ce"], **figures}
    keep(LAYERS, who, [row])
    write_json(KEPT / "settings.json", {"machine": machine()})


def single(work: LayerAtWork, heldout: Corpus, known: Firings) -> Iterator[dict[str, Any]]:
    """A row of each examined expert: what ablating it and steering by it does."""
    there = one_expert.firings(work, heldout, {})
    ids = heldout.ids[: STEER_TOKENS // heldout.ids.shape[1]].long()
    for band in BANDS:
        experts = one_expert.drawn(known, there, band, IN_BAND, LEAST_FIRED)
        draw = torch.Generator().manual_seed(0)
        rows = [{"band": band, "expert": expert, "frequency": known.frequency[expert].item()} for expert in experts]
        for row, expert in zip(rows, experts, strict=True):
            own = known.own_tokens(expert)
            row["ablated"] = one_expert.ablation(work, heldout, there, expert, own, MOST_CONTEXTS, draw)
            row["steered"] = []
        for kl in KL:
            strengths, logs, masses = one_expert.steering(work, ids, known, experts, kl)
            for number, (row, strength) in enumerate(zip(rows, strengths, strict=True)):
                row["steered"].append({"kl": kl, "strength": strength} | beside_others(number, logs, masses))
        yield from rows


def beside_others(number: int, logs: Tensor, masses: Tensor) -> dict[str, float | None]:
    """What steering by an expert does to its own tokens, and what steering by the others (E, E) does to them, on average.

    ``above``: how many of the others do less, as a share of them. Nothing where it or they cannot be steered by as hard.
    """
    others = ~logs[:, number].isnan()
    steered, others[number] = bool(others[number]), False
    if not (steered and others.any()):
        return {}
    log, mass = logs[:, number], masses[:, number]
    return {
        "own": log[number].item(),
        "others": log[others].mean().item(),
        "own_mass": mass[number].item(),
        "others_mass": mass[others].mean().item(),
        "above": (log[others] < log[number]).float().mean().item(),
    }


def keep(path: Path, who: dict[str, str], rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    """Puts a converted model's rows in the place of its earlier ones."""
    others = [row for row in read_lines(path) if {name: row[name] for name in who} != who]
    found = [rounded(who | row) for row in rows]
    KEPT.mkdir(exist_ok=True)
    write_lines(path, others + found)


def rounded(value: Any) -> Any:
    """The same JSON, its numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@runs_option("single-experts")
@only_option
def measure(shared: Path, runs: Path, only: str | None) -> None:
    """Train and measure."""
    for subject in SUBJECTS:
        if only is not None and only not in subject.model:
            continue
        texts = texts_of(subject, shared, runs)
        for variant in VARIANTS:
            folder = converted(subject, variant, shared, runs, texts)
            examined(subject, variant, folder, texts)


@main.command()
def page() -> None:
    """Print docs/single-experts.md."""
    layers, experts, erased = map(read_lines, (LAYERS, EXPERTS, ERASED))
    printed.figure(layers, experts, erased).savefig(KEPT / "share.png", dpi=110)
    said = read_json(KEPT / "settings.json")
    click.echo((KEPT / "introduction.md").read_text(encoding="utf-8").replace("MACHINE", said["machine"]))
    for model in dict.fromkeys(row["model"] for row in layers):
        of_model = [row for row in layers if row["model"] == model]
        first = of_model[0]
        click.echo(f"## {model}, layer {first['layer']}, K = {K}\n")
        click.echo(
            f"{first['tokens']:,} held-out tokens, original cross-entropy {first['original_ce']:.4f}; with the block zeroed "
            f"{first['zero_delta_ce']:+.4f}.\n"
        )
        click.echo(printed.layers_table(of_model))
        groups = [
            (row["variant"], f"{low:.1%} to {high:.1%}", [e for e in experts if is_of(e, row) and e["band"] == [low, high]])
            for low, high in BANDS
            for row in of_model
        ]
        click.echo(f"\n### Ablating one\n\n{printed.ablated_table(groups)}")
        click.echo(f"\n### Steering by one\n\n{printed.steered_table(groups, list(KL))}")
        mine = [row for row in erased if row["model"] == model]
        counts = ", ".join(f"{row['labelled']:,} {label}" for label, row in {row["label"]: row for row in mine}.items())
        click.echo(f"\n### Erasing a capability\n\nOf {mine[0]['tokens']:,} held-out predictions: {counts}.\n")
        click.echo(printed.erased_table(mine) + "\n")


def is_of(row: dict[str, Any], layer: dict[str, Any]) -> bool:
    """Whether a row is of a layer's experts."""
    return all(row[name] == layer[name] for name in ("model", "variant"))


if __name__ == "__main__":
    main()
