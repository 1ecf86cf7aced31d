"""``generate``: text from a converted model, to see that it still writes, and what edits of its experts do to its text."""

import dataclasses
import os.path
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mxdsurgery.checkpoint.converted import Converted, load_with_recipe
from mxdsurgery.choices import UNITS
from mxdsurgery.editing.edits import Edits, check_for
from mxdsurgery.editing.sampling import Sampling, chat_ids, prompt_ids, sample
from mxdsurgery.errors import CatalogueError, EditError, as_typed, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.interventions import InterventionError


@guarded
def generate(
    folder: str | Path,
    *,
    prompt: str,
    chat: bool = False,
    edits: Edits | None = None,
    unit: str = "coefficient",
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
) -> list[str] | dict[str, Any]:
    """Samples continuations of a prompt; with edits, from the edited model beside the unedited one.

    By default from all that the model predicts. The base model's generation config has no say, but for special tokens.

    Args:
        folder: what ``convert`` wrote.
        prompt: how the text begins; with ``chat``, what the user says.
        chat: whether the prompt is a message, which the model's chat template puts into words; the texts are its answers.
        edits: what to do to which experts, on the prompt and on every token that is sampled; default: nothing.
        unit: of the numbers of ``steer`` and ``clamp``; see `in_coefficients`.
        max_new_tokens: the most tokens to add.
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_k: how many of the likeliest tokens are sampled from; default: all.
        top_p: share of the probability mass that is sampled from.
        samples: how many continuations.
        seed: of the sampling.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.

    Returns:
        Without edits the texts, prompt included, or the answers. With edits ``prompt``, ``chat``, how it was sampled,
        ``edits`` (a line each), and the texts as ``unedited`` and ``edited``: both are sampled with the same random numbers,
        so that sample i differs by the edits only.

    Raises:
        NotConvertedError: the folder is not one of ours.
        EditError: the edits do not fit this model, or make its predictions NaN or infinite.
        CatalogueError: the unit is ``maximum``, and no maxima are known.
        RecipeError: the text would be longer than the model can read, there are several samples at temperature 0, or the
            model has no chat template.
    """
    sampling = Sampling(max_new_tokens, temperature, samples, top_k, top_p, seed)
    converted, _ = load_with_recipe(folder, device, compute, rows=samples, trust_remote_code=trust_remote_code)
    tokenizer = converted.tokenizer()
    inputs = chat_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)

    def texts() -> list[str]:
        made = sample(converted.model, tokenizer, inputs, sampling)
        return tokenizer.batch_decode(made[:, inputs.shape[1] :] if chat else made, skip_special_tokens=True)

    if not edits:
        return texts()
    edits = in_coefficients(edits, converted, unit)
    unedited = texts()
    with edits.live(converted.model):
        edited = texts()
    made = {"edits": edits.words(), "unedited": unedited, "edited": edited}
    return {"prompt": prompt, "chat": chat, **dataclasses.asdict(sampling), **made}


def in_coefficients(edits: Edits, converted: Converted, unit: str) -> Edits:
    """Checks that edits fit the model; returns them with the numbers of ``steer`` and ``clamp`` in coefficients.

    Args:
        edits: what to do.
        converted: the model.
        unit: of those numbers: ``coefficient``, or ``maximum``, the expert's largest coefficient that `mxdsurgery experts`
            observed.

    Raises:
        EditError: the edits do not fit, the unit is unknown, or an expert never fired and so has no maximum.
        CatalogueError: no maxima are known.
    """
    if unit not in UNITS:
        raise EditError(f"unit is {unit!r}", expected="one of " + ", ".join(UNITS))
    check_for(edits, converted)
    if unit == "coefficient":
        return edits
    changed = {
        kind: {
            layer: {expert: number * maximum_of(converted, layer, expert) for expert, number in numbers.items()}
            for layer, numbers in getattr(edits, kind).items()
        }
        for kind in ("steer", "clamp")
    }
    return dataclasses.replace(edits, **changed)


def maximum_of(converted: Converted, layer: int, expert: int) -> float:
    """An expert's largest coefficient, as `mxdsurgery experts` observed it.

    Raises:
        CatalogueError: it was not run on this model, or not on this layer.
        EditError: the expert never fired.
    """
    try:
        maximum = converted.model.mxd.maximum(layer)[expert].item()
    except (InterventionError, KeyError) as error:
        raise CatalogueError(
            f"no largest coefficients of layer {layer} are known: {first_line(error)}",
            expected="what mxdsurgery experts writes",
            fix=f"run mxdsurgery experts {as_typed(converted.folder)} first, or give coefficients",
        ) from None
    if maximum == 0:
        raise EditError(
            f"layer {layer}, expert {expert} never fired where mxdsurgery experts looked: it has no largest coefficient",
            expected="an expert that fires, or a number in coefficients",
        )
    return maximum


def side_by_side(result: dict[str, Any]) -> Table:
    """What `generate` returns with edits, for a terminal: a row for each sample; the beginning that both share is dim."""
    table = Table(title="\n".join(result["edits"]), show_lines=True)
    for heading in ("unedited", "edited"):
        table.add_column(heading, ratio=1, overflow="fold")
    for texts in zip(result["unedited"], result["edited"], strict=True):
        common = len(os.path.commonprefix(texts))
        table.add_row(*(Text.assemble((text[:common], "dim"), text[common:]) for text in texts))
    return table
