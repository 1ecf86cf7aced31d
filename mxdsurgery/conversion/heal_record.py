"""What `heal` writes: the healed model's folder, and the record of what was done."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mxdsurgery.base.dtypes import as_stored, compute_in, computed_in
from mxdsurgery.base.lora import ADAPTER_FOLDER, Adapters
from mxdsurgery.checkpoint.adapter import ABOUT
from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.checkpoint.export import Reference, reference_outputs, write_code
from mxdsurgery.checkpoint.trained_on import TrainedOn, text_used
from mxdsurgery.conversion.heal_text import Answered, HealingTexts
from mxdsurgery.conversion.healing import Healing
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import rank
from mxdsurgery.terminal.console import Reporter, compact, duration
from mxdsurgery.text.places import text_name
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.end_to_end import EndToEnd, Settings, validation_kl
from mxdsurgery.training.inputs import Read


@dataclass
class Healed:
    """The model that is healed, and which parts of it learn."""

    converted: Converted
    layers: dict[LayerPlan, nn.Module]  # fp32 copies
    adapters: Adapters | None
    maps: list[str]  # what the adapters are on


def heldout_kl(healed: Healed, answered: Answered) -> float:
    """KL(original ‖ the model as it is written) on the text to report on, which decides nothing; the first process asks."""
    merged = nullcontext() if healed.adapters is None else healed.adapters.as_written()
    with merged:
        return math.nan if rank() else validation_kl(healed.converted.model, answered.heldout())


def record_of(
    healed: Healed,
    recipe: Recipe,
    how: Healing,
    settings: Settings,
    state: EndToEnd,
    texts: HealingTexts,
    before: float,
    after: float,
) -> dict[str, Any]:
    """The record of this healing as config.json keeps it: plain data that names no local path."""
    return {
        "mode": how.mode,
        "data": text_name(how.data or recipe.data),
        "tokens": state.tokens,
        "tokens_to_best": state.best_tokens,
        "seconds": round(state.seconds, 1),
        "batch": state.tokens_per_step,
        "lr": recipe.lr,
        "moments": None if how.mode == "lora" else recipe.moments,
        "specialise": recipe.specialise,
        "keeps_shares": settings.keeps_shares,
        "local": how.local,
        "seed": recipe.seed,
        "teacher": how.teacher,
        "top_n": how.top_n if how.teacher == "cached" else None,
        "lora": how.lora if how.adapts else None,
        "lora_rank": how.lora_rank if how.adapts else None,
        "maps": healed.maps,
        "stopped_early": state.stopped,
        "heldout_tokens": texts.heldout[:, 1:].numel(),
        "kl_before": before,
        "kl_after": after,
        "validation_tokens": texts.validation[:, 1:].numel(),
        "validation": [{"tokens": step * state.tokens_per_step, "kl": kl} for step, kl in state.validation],
    }


def say_healed(step: dict[str, Any], reporter: Reporter) -> None:
    """Says what came of it."""
    early = f", stopped after {compact(step['tokens'])}" if step["stopped_early"] else ""
    reporter.say(
        f"healed     {compact(step['tokens_to_best'])} tokens in {duration(step['seconds'])}{early}; KL on text that nothing"
    )
    reporter.say(f"           was trained or chosen on: {step['kl_before']:.4f} before, {step['kl_after']:.4f} after")
    if step["tokens_to_best"] == 0:
        reporter.say("           nothing better than the start was found: the weights are as they were")


def trained_on_now(texts: HealingTexts, read: Read) -> TrainedOn | None:
    """The folder's record with this healing; None where there was none: half a record would pass for a whole one."""
    if texts.before is None:
        return None
    passes = max(1, texts.train.passes)
    return texts.before | TrainedOn(read.fingerprints(), [text_used(texts.train, read.contexts, passes)])


def write_healed(
    healed: Healed, folder: Path, step: dict[str, Any], how: Healing, check: Tensor, record: TrainedOn | None
) -> Reference:
    """Writes the healed model's folder, all but evaluation and card; returns what it computes, for `check_reload`."""
    converted, adapters = healed.converted, healed.adapters
    for path in converted.folder.iterdir():
        if path.is_file() and path.name not in ABOUT and ".safetensors" not in path.name:
            shutil.copy2(path, folder / path.name)
    if record is not None:
        record.write(folder)
    if adapters is not None and how.lora == "merged":
        adapters.merge()
    elif adapters is not None:
        adapters.save(folder / ADAPTER_FOLDER)
        adapters.remove()
    model = converted.model.eval().requires_grad_(False)
    dtype = computed_in(model)
    as_stored(model)  # rounds the weights before the comparison
    compute_in(model, dtype)
    reference = reference_outputs(model, check)
    as_stored(model)
    model.config.mxd["healed"] = [*model.config.mxd.get("healed", []), step]
    model.save_pretrained(folder, max_shard_size="5GB", save_original_format=False)
    write_code(model, folder)
    return reference
