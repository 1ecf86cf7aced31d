"""``steering``: whether making an expert stronger moves a model's text towards the expert's concept, and what that costs.

As in the paper (arXiv 2505.21364), a constant is added to one expert's coefficient on every token while the model continues
"Let's talk about ". The paper asks judges how much of the expert's concept the texts show and how fluent they are; here both
are measured, and a judge may be asked as well:

- The concept is defined by the expert's top contexts in the catalogue: the tokens around the places where it fired most
  strongly. A text's similarity to it is the cosine of the two in TF-IDF space over token ids, with document frequencies from
  the catalogue's contexts, and the *strength* of steering is how much the mean similarity of the texts grows, sample by sample
  with the same random numbers.
- Any change of a model changes its text. So other experts of the layer that fire about as often are steered as strongly, in
  units of their own maximum, and their texts are compared with the same concept.
- Fluency is the perplexity of the texts, without the prompt, under the original model.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxdsurgery.base.running import logits_of
from mxdsurgery.catalogue.files import Catalogue, catalogue_of
from mxdsurgery.checkpoint.converted import Converted, load_with_recipe
from mxdsurgery.editing.edits import KINDS, Edits
from mxdsurgery.editing.effect import draw_control
from mxdsurgery.editing.generate import in_coefficients, maximum_of
from mxdsurgery.editing.judge import RATINGS, Judge
from mxdsurgery.editing.sampling import Sampling, prompt_ids, sample
from mxdsurgery.errors import EditError, JudgeError, MxDWarning
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.evaluate import check_before_loading, load_original
from mxdsurgery.measuring.intervals import with_interval
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.terminal.figures import legend, with_range

# Tokens on each side of a place that belong to the concept. With so few, held-out contexts of an expert are distinguished from
# those of others much better (standardised difference 8.9 and 4.2 in two small models) than with the catalogue's whole windows
# of 24 (5.4, 3.1), or by the original model's last hidden states, centred (3.3, 2.8).
_BESIDE = 3
# At most so many contexts, spread over the catalogue's, are used to count document frequencies.
_MOST_CONTEXTS = 10_000
# How many texts the original model reads at once.
_AT_ONCE = 8
# Characters of a text in the table.
_SHOWN = 70

# What the columns say.
WORDS = {
    "similarity": "cosine of the texts and the expert's top contexts, in TF-IDF space",
    "strength": "how much steering adds to it",
    "perplexity": "of the texts, under the original model",
    "others": "the same with other experts, steered as strongly in units of their own maximum; in brackets, least and most",
} | {f"{name}, judged": "a language model's mean rating of the texts, from 0 to 1" for name in RATINGS}
_RANGES = "In square brackets: 95 % intervals over texts."


@guarded
def steering(
    folder: str | Path,
    *,
    edits: Edits,
    unit: str = "coefficient",
    factors: Sequence[float] = (1.0,),
    prompt: str = "Let's talk about ",
    samples: int = 10,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    controls: int = 4,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    judge: Judge | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Steers one expert and measures how the text changes; the module's docstring says how.

    Args:
        folder: what ``convert`` or ``edit`` wrote, with the catalogue that `experts` made of it.
        edits: one expert and how strongly it is steered, or what it is clamped to; nothing else.
        unit: of that number: ``coefficient``, or ``maximum``, the expert's largest coefficient in the catalogue.
        factors: the number is tried times each of these.
        prompt: how the texts begin.
        samples: S, texts of each model.
        max_new_tokens: M, tokens of each text; none ends sooner.
        temperature: of the sampling, above 0.
        top_k: how many of the likeliest tokens are sampled from; default: all.
        top_p: the likeliest tokens that are sampled from have this share of the probability; default: all of it.
        controls: how many other experts, drawn at random among the 20 that fire about as often, are steered to compare.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        seed: of the sampling and of the controls.
        judge: a model that also rates the texts; its 1 + (1 + factors) * samples answers may cost money.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object. ``unsteered``: ``similarity``, ``perplexity`` with its 95 % interval over texts, ``texts``.
        ``steered``, for each factor: ``in_maximum`` and ``amount`` (a coefficient), the same figures, ``strength`` with its
        interval, and ``controls``: for each ``expert`` its ``amount``, ``strength`` and ``perplexity``. ``own_contexts``: the
        mean similarity of a top context with the concept of the others. Figures of texts rest on ``tokens`` tokens each. With
        a judge also its mean ratings, ``judged_concept`` and ``judged_fluency``, and ``judge_failed``: why it stopped.

    Raises:
        NotConvertedError, CatalogueError: the folder or its catalogue is missing, or they do not belong together.
        EditError: not one expert is steered, it does not exist, or it never fired.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
        RecipeError: the texts would be longer than the model can read, or would not be drawn at random.
        JudgeError: the judge does not answer; it is tried before any weights are read.
    """
    reporter = reporter or Reporter()
    kind, layer, expert = _checked(edits, folder, base, trust_remote_code, judge)
    sampling = Sampling(max_new_tokens, temperature, samples, top_k, top_p, seed)
    converted, recipe = load_with_recipe(folder, device, compute, rows=samples, trust_remote_code=trust_remote_code)
    amount, catalogue = getattr(in_coefficients(edits, converted, unit), kind)[layer][expert], catalogue_of(converted)
    in_maximum = amount / maximum_of(converted, layer, expert)
    original = load_original(converted, base or recipe.model, recipe).to(converted.model.device)
    concept, tokenizer = _Concept(converted, catalogue, layer, expert), converted.tokenizer()
    writer = _Writer(converted.model, original, tokenizer, concept, prompt_ids(tokenizer, prompt), sampling)
    maxima = {n: maximum_of(converted, layer, n) for n in (expert, *_others(edits, catalogue, layer, controls, seed))}
    with reporter.progress("steer", "runs") as line:
        unsteered, rows = writer.write(), []
        for factor in factors:
            runs = []
            for number, maximum in maxima.items():
                steered = in_maximum * factor * maximum
                runs.append((number, steered, writer.write(Edits(**{kind: {layer: {number: steered}}}))))
                line.update(len(rows) * len(maxima) + len(runs), len(factors) * len(maxima))
            rows.append({"in_maximum": in_maximum * factor} | _steered(unsteered, runs))
    result = {"layer": layer, "expert": expert, "kind": kind, "prompt": prompt, **dataclasses.asdict(sampling)}
    result |= {"tokens": samples * max_new_tokens, "catalogue": {"data": catalogue.data, "tokens": catalogue.tokens}}
    result |= {"own_contexts": concept.own_contexts(), "unsteered": unsteered.figures(), "steered": rows}
    return result if judge is None else result | _judged(judge, result, concept.passages(tokenizer.decode), reporter)


def _checked(
    edits: Edits, folder: str | Path, base: str | None, trust_remote_code: bool, judge: Judge | None
) -> tuple[str, int, int]:
    """As `_one_expert`, after all that can be known to be wrong before any weights are read."""
    named = _one_expert(edits)
    check_before_loading(folder, None, base, trust_remote_code)
    if judge is not None:
        judge.check()
    return named


def _one_expert(edits: Edits) -> tuple[str, int, int]:
    """``steer`` or ``clamp``, and the layer and the expert it applies to."""
    named = [(kind, layer, expert) for kind in KINDS for layer, given in getattr(edits, kind).items() for expert in given]
    if len(named) != 1 or named[0][0] not in ("steer", "clamp"):
        raise EditError(
            f"steering is measured of one expert alone; the edits are: {'; '.join(edits.words()) or 'none'}",
            expected="one expert to steer or clamp, and no other edit",
        )
    return named[0]


def _others(edits: Edits, catalogue: Catalogue, layer: int, count: int, seed: int) -> list[int]:
    """Other experts that fire about as often, at most ``count``: fewer where the layer has no more."""
    if count == 0:
        return []
    fired = {layer: torch.tensor(catalogue.table(layer, ["fired"])["fired"].to_numpy())}
    draw = torch.Generator().manual_seed(seed)
    drawn = (draw_control(edits, fired, draw).experts(layer)[0] for _ in range(10 * count))
    return list(dict.fromkeys(drawn))[:count]


class _Concept:
    """What an expert stands for: the tokens around the places where it fired most strongly.

    Args:
        converted: the model.
        catalogue: what `experts` found in it.
        layer: of the expert.
        expert: its number.
    """

    def __init__(self, converted: Converted, catalogue: Catalogue, layer: int, expert: int) -> None:
        self.windows = [catalogue.window(place) for place in catalogue.row(layer, expert, ["top"])["top"]]
        self.vocabulary = converted.model.get_input_embeddings().num_embeddings
        count = len(catalogue.input_ids)
        chosen = np.linspace(0, count - 1, min(count, _MOST_CONTEXTS)).astype(int)
        self.weighting = TfidfTransformer().fit(self._counts(catalogue.input_ids.take(chosen).to_pylist()))
        self.vector = self._of(self.windows)

    def similarity(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The similarity of each text, given as token ids, to the concept: (S,) float64 in [0, 1]."""
        return self._cosines(texts, self.vector)

    def own_contexts(self) -> float | None:
        """The mean similarity of a top context's window to the concept from the others; None if there is only one."""
        rest = [self.windows[:at] + self.windows[at + 1 :] for at in range(len(self.windows))]
        if len(rest) < 2:
            return None
        found = [self._cosines([own[0]], self._of(others)) for own, others in zip(self.windows, rest, strict=True)]
        return torch.cat(found).mean().item()

    def passages(self, decode: Callable[[list[int]], str]) -> list[str]:
        """The top contexts as text, the strongest token between asterisks."""
        return [f"{decode(ids[:at])}**{decode(ids[at : at + 1])}**{decode(ids[at + 1 :])}" for ids, _, at in self.windows]

    def _of(self, windows: list[tuple[list[int], list[float], int]]) -> csr_matrix:
        near = [token for ids, _, at in windows for token in ids[max(0, at - _BESIDE) : at + _BESIDE + 1]]
        return self.weighting.transform(self._counts([near]))

    def _cosines(self, texts: Sequence[Sequence[int]], vector: csr_matrix) -> Tensor:
        return torch.from_numpy((self.weighting.transform(self._counts(texts)) @ vector.T).toarray()[:, 0])

    def _counts(self, texts: Sequence[Sequence[int]]) -> csr_matrix:
        """How often each token occurs in each text, (texts, V)."""
        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        return csr_matrix((np.ones(len(tokens)), (rows, tokens)), shape=(len(texts), self.vocabulary))


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Texts of one model, without the prompt, and their figures: one entry for each of S.

    Attributes:
        texts: as text.
        similarity: (S,) float64.
        nll: summed over each text's tokens, in nats, under the original model: (S,) float64.
        tokens: (S,) float64.
    """

    texts: list[str]
    similarity: Tensor
    nll: Tensor
    tokens: Tensor

    def figures(self) -> dict[str, Any]:
        """Their mean similarity, and perplexity with its interval."""
        ce = with_interval("ce", self.nll, self.tokens)
        value, *ends = (None if found is None else math.exp(min(found, 700.0)) for found in (ce["ce"], *(ce["ce_ci"] or ())))
        perplexity = {"perplexity": value, "perplexity_ci": ends or None}
        return {"similarity": self.similarity.mean().item()} | perplexity | {"texts": self.texts}


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Samples texts from a model with edits, and measures them."""

    model: PreTrainedModel
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    concept: _Concept
    inputs: Tensor
    sampling: Sampling

    @torch.no_grad()
    def write(self, edits: Edits | None = None) -> _Texts:
        """Texts of the model with these edits, always with the same random numbers."""
        with (edits or Edits()).live(self.model):
            ids = sample(self.model, self.tokenizer, self.inputs, self.sampling, to_the_end=True)
        start, nll = self.inputs.shape[1], []
        for rows in ids.split(_AT_ONCE):
            logits = logits_of(self.original, rows)[:, start - 1 : -1].float()
            nll.append(F.cross_entropy(logits.transpose(1, 2), rows[:, start:], reduction="none").cpu().double().sum(1))
        new = ids[:, start:].tolist()
        tokens = torch.full((len(new),), float(len(new[0])), dtype=torch.float64)
        return _Texts(self.tokenizer.batch_decode(new), self.concept.similarity(new), torch.cat(nll), tokens)


def _steered(unsteered: _Texts, runs: list[tuple[int, float, _Texts]]) -> dict[str, Any]:
    """Figures of the steered expert's texts (the first run) beside those of the controls (the other runs)."""

    def strength(run: _Texts) -> dict[str, Any]:
        return with_interval("strength", run.similarity - unsteered.similarity, torch.ones_like(run.similarity))

    (_, amount, own), *others = runs
    controls = [
        {"expert": number, "amount": of, "strength": strength(run)["strength"], "perplexity": run.figures()["perplexity"]}
        for number, of, run in others
    ]
    return {"amount": amount} | strength(own) | own.figures() | {"controls": controls}


def _judged(judge: Judge, result: dict[str, Any], passages: list[str], reporter: Reporter) -> dict[str, Any]:
    """The result's rows with the judge's ratings, and the judge's name; what it has not rated when it fails has none."""
    rows = [result["unsteered"], *result["steered"]]
    texts, ratings, failed = [text for row in rows for text in row["texts"]], [], None
    with reporter.progress("judge", "texts") as line:
        try:
            for text in texts:
                ratings.append(judge.rate(passages, text))
                line.update(len(ratings), len(texts))
        except JudgeError as error:  # the texts, and what was paid for, are not lost for it
            failed = f"{error.found}; {len(ratings)} of {len(texts)} texts were rated"
            warnings.warn(f"{failed}: rows that are not wholly rated have no ratings", MxDWarning, stacklevel=3)
    judged = []
    for row in rows:
        mine, ratings = ratings[: len(row["texts"])], ratings[len(row["texts"]) :]
        whole = len(mine) == len(row["texts"])
        made = dict(row)
        for name in RATINGS:
            values = torch.tensor([rating[name] for rating in mine], dtype=torch.float64)
            figure = with_interval(f"judged_{name}", values, torch.ones_like(values)) if whole else {f"judged_{name}": None}
            made |= {f"judged_{name}_ci": None} | figure
        judged.append(made)
    return {"unsteered": judged[0], "steered": judged[1:], "judge": judge.model, "judge_failed": failed}


def steering_table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    title = (
        f"Layer {result['layer']}, expert {result['expert']}: {result['samples']} texts of {result['max_new_tokens']} tokens"
    )
    table = Table("text", title=f"{title} after {result['prompt']!r}", caption_justify="left")
    for heading in ("coefficient", "similarity", "strength", "others", "perplexity", "others"):
        table.add_column(heading, justify="right", no_wrap=True)
    judged = "judge" in result
    for name in RATINGS if judged else ():
        table.add_column(f"{name}, judged", justify="right", no_wrap=True)
    table.add_column("the first begins")
    table.caption = escape(legend([str(column.header) for column in table.columns], WORDS, _RANGES))
    for row in [result["unsteered"], *result["steered"]]:
        cells = ["unsteered", "-", f"{row['similarity']:.4f}", "-", "-", with_range(row, "perplexity", ".1f", "\n"), "-"]
        if "amount" in row:
            sign = "+" if result["kind"] == "steer" else "="
            cells[:2] = [f"{row['in_maximum']:g} × maximum", f"{sign}{row['amount']:.2f}"]
            cells[3:5] = [with_range(row, "strength", "+.4f", "\n"), _of_controls(row, "strength", "+.4f")]
            cells[6] = _of_controls(row, "perplexity", ".1f")
        cells += [with_range(row, f"judged_{name}", ".2f", "\n") for name in (RATINGS if judged else ())]
        table.add_row(*cells, escape(repr(row["texts"][0][:_SHOWN])))
    if result["own_contexts"] is not None:
        table.add_section()
        table.add_row("its own contexts", "-", f"{result['own_contexts']:.4f}")
    return table


def _of_controls(row: dict[str, Any], name: str, form: str) -> str:
    """Mean, minimum and maximum of the controls; nothing if there are none."""
    values = [control[name] for control in row["controls"]]
    return f"{sum(values) / len(values):{form}}\n({min(values):{form}}, {max(values):{form}})" if values else "-"
