"""``heal``: trains a converted model end to end, so that as a whole it predicts what the original does; in a new folder."""

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.arguments import given_number
from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.base.dtypes import as_stored, compute_in, computed_in
from mxdsurgery.base.examination import weights_digest
from mxdsurgery.base.lora import ADAPTER_FOLDER, Adapters, check_peft, healed_maps, projections
from mxdsurgery.checkpoint.adapter import ABOUT
from mxdsurgery.checkpoint.converted import Converted, chosen_dtype, load, saved_recipe
from mxdsurgery.checkpoint.export import check_reload, reference_outputs, write_code, written_as
from mxdsurgery.checkpoint.writing import check_apart, check_output, check_room, check_room_for_copy
from mxdsurgery.choices import HEAL_CHOICES, LOCAL, LR_FACTOR, SPECIALISE_FACTOR
from mxdsurgery.conversion.heal_text import healing_texts
from mxdsurgery.conversion.shared_run import shared_run
from mxdsurgery.conversion.train import start_kernels
from mxdsurgery.errors import HealError
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.measuring.evaluate import check_before_loading, evaluate, load_original
from mxdsurgery.planning.machine import settled_recipe
from mxdsurgery.recipe import CHECKPOINT_KEYS, Recipe
from mxdsurgery.runs.parallel import my_contexts, rank
from mxdsurgery.runs.run_folder import TRAINING_FILE, Keeper, RunFolder, depends_on
from mxdsurgery.terminal.console import Reporter, compact, duration
from mxdsurgery.text.places import text_name
from mxdsurgery.text.sources import TextStream
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.end_to_end import EndToEnd, Settings, train_end_to_end
from mxdsurgery.training.inputs import Read
from mxdsurgery.training.teacher import Example, KeptPredictions, original_examples

# Share of the steps until the learning rate peaks; from there it falls. Adam's first steps move all weights equally far, good
# or not.
WARMUP = 0.2
# Contexts on which the reloaded checkpoint is compared with the model in memory.
_CHECK_CONTEXTS = 2


@dataclass(frozen=True)
class Healing:
    """How to heal. Each is a keyword of `heal` and a flag of the command.

    Attributes:
        mode: what learns: ``mxd``, the new layers; ``lora``, adapters on the attention projections; or ``both``.
        tokens: of training; default: the recipe's.
        data: the text; default: the recipe's.
        text_column: column or field with the text; default: the recipe's.
        lr: peak learning rate of Adam; default: ``LR_FACTOR`` times the recipe's.
        batch: tokens per optimiser step; default: the recipe's.
        accumulate: forward and backward passes that a step is split into.
        checkpointing: compute the inside of each decoder layer twice, and keep less in memory.
        specialise: weight of the penalty on what frozen experts could do; default: ``SPECIALISE_FACTOR`` times the recipe's.
        local: weight of each layer's own distance from its block's output; default: ``LOCAL``, or 0 with a cached teacher.
        patience: stop after so many validations in a row without a new best, in the second half of the steps; there are 10
            in all.
        lora_rank: of the adapters.
        lora: ``merged`` into the weights, or kept as an ``adapter`` for PEFT in the folder ``lora``.
        teacher: ``model``: the original runs beside the one in training. ``cached``: it runs once, its ``top_n`` likeliest
            tokens at each position are kept on disk, and it is unloaded.
        top_n: see ``teacher``.
        seed: of the text's order and the adapters; default: one more than the recipe's.
        format: ``checkpoint``, or ``adapter``: only what differs from the base model.
        checkpoint_every: as in a recipe, like the next two; default: the recipe's.
        checkpoint_minutes: see there.
        keep_checkpoints: see there.
    """

    mode: str = "mxd"
    tokens: int | None = None
    data: str | None = None
    text_column: str | None = None
    lr: float | None = None
    batch: int | None = None
    accumulate: int = 1
    checkpointing: bool = False
    specialise: float | None = None
    local: float | None = None
    patience: int = 4
    lora_rank: int = 8
    lora: str = "merged"
    teacher: str = "model"
    top_n: int = 64
    seed: int | None = None
    format: str = "checkpoint"
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int | None = None

    def __post_init__(self) -> None:
        for name, choices in HEAL_CHOICES.items():
            if getattr(self, name) not in choices:
                raise HealError(f"{name} is {getattr(self, name)!r}", expected="one of " + ", ".join(choices))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given_number(field.name, getattr(self, field.name), HealError))
        if self.local is None:
            object.__setattr__(self, "local", LOCAL if self.teacher == "model" else 0.0)
        if self.local > 0 and self.teacher == "cached":
            raise HealError(
                "local is above 0 and the teacher is 'cached'",
                expected="teacher 'model': what the original's blocks give is not kept",
                fix="--local 0, or --teacher model",
            )

    @property
    def adapts(self) -> bool:
        """Whether there are adapters."""
        return self.mode != "mxd"

    def recipe(self, saved: Recipe) -> Recipe:
        """The recipe with these settings.

        Raises:
            RecipeError: a value out of range.
        """
        names = ("text_column", "tokens", "lr", "batch", "specialise", "seed", *CHECKPOINT_KEYS)
        given = {name: getattr(self, name) for name in names}
        defaults = {"lr": LR_FACTOR * saved.lr, "seed": (saved.seed + 1) % 2**32}
        defaults |= {"warmup": WARMUP, "decay": 1.0 - WARMUP, "parallel": "data"}
        defaults |= {"specialise": min(10.0, SPECIALISE_FACTOR * saved.specialise)}
        return dataclasses.replace(saved, **defaults | {name: value for name, value in given.items() if value is not None})


@guarded_with(*(field.name for field in dataclasses.fields(Healing)))
def heal(
    folder: str | Path,
    *,
    out: str | Path,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Trains a converted model end to end toward its original's predictions, writes the result and measures it.

    Training lowers KL(original ‖ converted) of the next token. The layers keep their form and K. The weights that are best on
    validation text, not trained on, are written; the first ones are a candidate, too. ``out`` appears whole or not at all.

    Args:
        folder: what ``convert`` or ``heal`` wrote; it is left as it is.
        out: the folder to write.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        overwrite: replace an earlier folder that mxdsurgery wrote.
        resume: go on with the unfinished run in ``<out>.run``, if there is one, as if it had not been interrupted.
        reporter: where progress is reported; default: nowhere.
        **options: the fields of `Healing`, for example ``mode="both"``, ``tokens=1_000_000``, ``lr=3e-4``.

    Returns:
        The record of this healing as config.json has it (``kl_before`` and ``kl_after`` on the validation text in nats per
        token, ``tokens``, ``seconds``, the settings), ``evaluation``, the figures on held-out text as `evaluate` gives them,
        and ``out``. None in all processes but the first, where several were launched.

    Raises:
        NotConvertedError: the folder is not one of ours.
        HealError: the folder's experts were edited, it has an adapter that is not merged, or an option's value is not allowed.
        LoRAError: peft is not installed.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
        DataError: the text cannot be read, is too short, or is the held-out text.
        DivergedError: the learning rate was too high.
        OutputError: ``out`` cannot be written, or an unfinished run is neither to be resumed nor overwritten.
        CheckpointError: the unfinished run cannot be resumed.
        Interrupted: Ctrl-C; while training, a checkpoint is written first.
    """
    reporter, how = reporter or Reporter(), Healing(**options)
    where = {"base": base, "device": device, "trust_remote_code": trust_remote_code}
    check_before_loading(folder, how.data, base, trust_remote_code)
    target = _target(folder, out, overwrite)
    converted, saved = load(folder, trust_remote_code=trust_remote_code), saved_recipe(folder, device)
    _check_folder(converted, how)
    recipe = how.recipe(saved)
    size = _contexts_per_pass(recipe, how)
    more = depends_on(asdict(how)) | {"source": weights_digest(converted.model)}
    with shared_run(target, recipe, more, resume, overwrite, reporter) as (run, reporter):
        recipe = _settled(converted, recipe, compute, run, reporter)
        accelerator = make_accelerator(recipe)
        train, validation, heldout, measured_on = healing_texts(converted, saved, recipe, how.data, reporter)
        original = load_original(converted, base or recipe.model, recipe).to(accelerator.device)
        run.confirm(original=weights_digest(original))
        healed = _open_for_healing(converted, original, recipe, how, reporter)
        tokens = size * how.accumulate * recipe.context
        state = _where_it_stands(EndToEnd(max(1, recipe.tokens // tokens), tokens), healed, run, reporter)
        texts = _texts_with_answers(original, healed, train, validation, size, run.scratch, how, recipe, state)
        if how.teacher == "cached":
            original = None
        _train(healed, texts, recipe, how, accelerator, state, run, reporter)
        if rank():
            accelerator.end_training()
            return None
        del texts, original  # `evaluate` loads it anew
        step = _record(healed, recipe, how, state, validation)
        origin = (converted.plan.model, converted.plan.revision) if base is None else (base, None)
        with written_as(target, how.format, *origin, within=run.scratch, trust_remote_code=trust_remote_code) as checkpoint:
            _write(healed, checkpoint, step, how, validation[:_CHECK_CONTEXTS])
            where |= {"data": measured_on, "contexts": heldout, "compute": recipe.compute}
            evaluation = evaluate(checkpoint, **where, reporter=reporter)
    accelerator.end_training()
    return step | {"evaluation": evaluation, "out": str(target)}


def _settled(converted: Converted, recipe: Recipe, compute: str | None, run: RunFolder, reporter: Reporter) -> Recipe:
    """The recipe with its compute dtype settled; a resumed run keeps its own. The converted model then computes in it."""
    asked = dataclasses.replace(recipe, compute=compute or recipe.compute)
    settled = settled_recipe(asked, converted.plan.layers, chosen_dtype(converted, asked))
    settled = run.as_begun(settled, reporter.say)
    compute_in(converted.model, getattr(torch, settled.compute))
    return settled


def _where_it_stands(state: EndToEnd, healed: "_Healed", run: RunFolder, reporter: Reporter) -> EndToEnd:
    """The training's state; that of a resumed run is restored."""
    if run.resumed is not None:
        state.restore(run.resumed.state, healed.layers)
        reporter.say(f"resume     from step {state.step}, in {run.path}")
    return state


@dataclass
class _Healed:
    """The model that is healed, and which parts of it learn."""

    converted: Converted
    layers: dict[LayerPlan, nn.Module]  # fp32 copies
    adapters: Adapters | None
    maps: list[str]  # what the adapters are on


def _target(folder: str | Path, out: str | Path, overwrite: bool) -> Path:
    """The folder to write, beside the one that is read; raises OutputError if it cannot be written or has no room."""
    check_apart(out, folder, "the folder to heal")
    target = check_output(out, overwrite)
    check_room_for_copy(target, Path(folder))
    return target


def _check_folder(converted: Converted, how: Healing) -> None:
    mxd, name = converted.model.config.mxd, str(converted.folder)
    if mxd.get("edits"):
        raise HealError(
            f"the experts of {name!r} were edited: healing would teach them what the edits took away",
            expected="a model as convert or heal wrote it",
            fix="heal the unedited model (mxdsurgery edit DIR --undo), then edit the result",
        )
    if healed_maps(mxd, "adapter"):
        raise HealError(
            f"{name!r} was healed with an adapter that is not merged",
            expected="a model as convert wrote it, or healed with merged adapters",
            fix="heal the folder that it was made from: --lora merged",
        )
    if how.adapts:
        check_peft()


def _contexts_per_pass(recipe: Recipe, how: Healing) -> int:
    """How many contexts run through the model at a time."""
    contexts = recipe.batch // recipe.context
    if contexts < how.accumulate:
        raise HealError(
            f"accumulate is {how.accumulate}, and a step has {contexts} contexts ({recipe.batch} tokens)",
            expected="at least one context in each pass",
            fix="lower --accumulate, or raise --batch",
        )
    return contexts // how.accumulate


def _open_for_healing(
    converted: Converted, original: PreTrainedModel, recipe: Recipe, how: Healing, reporter: Reporter
) -> _Healed:
    model = converted.model.to(original.device)
    maps = projections(original) if how.adapts else []
    adapters = Adapters(model, maps, how.lora_rank, recipe.seed) if how.adapts else None
    layers = {}
    for plan in converted.plan.layers if how.mode != "lora" else ():
        layer = layers[plan] = copy.deepcopy(converted.layers[plan.block.layer]).float().requires_grad_(True)
        if hasattr(layer, "block"):  # an autoencoder keeps the original block
            layer.block.requires_grad_(False)
    learn = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    learn += adapters.parameters() if adapters is not None else []
    what = {"mxd": "the new layers", "lora": "LoRA", "both": "the new layers and LoRA"}[how.mode]
    reporter.say(f"heal       {what}: {compact(sum(p.numel() for p in learn))} parameters; {compact(recipe.tokens)} tokens")
    return _Healed(converted, layers, adapters, maps)


class _Texts(NamedTuple):
    """Training examples, without end, and validation examples, each with the original's predictions."""

    examples: Iterator[Example]
    validation: list[Example]
    read: Read


def _texts_with_answers(
    original: PreTrainedModel,
    healed: _Healed,
    train: TextStream,
    validation: Tensor,
    size: int,
    scratch: Path,
    how: Healing,
    recipe: Recipe,
    state: EndToEnd,
) -> _Texts:
    """The texts with the original's predictions, from where the training stands."""
    taken = state.step * how.accumulate
    if how.teacher == "model":
        blocks = healed.converted.plan.blocks if how.local > 0 else ()
        read = Read(train.batches(size))
        read.skip(taken)
        looked_at = list(original_examples(original, (), validation.split(size)))
        mine = (my_contexts(batch, recipe) for batch in read)
        return _Texts(original_examples(original, blocks, mine), looked_at, read)
    wanted = state.steps * size * how.accumulate
    vocabulary = vocabulary_size(original)
    check_room(scratch, KeptPredictions.bytes(wanted + len(validation), recipe.context, min(how.top_n, vocabulary)))
    read = Read(itertools.islice(train.contexts(), wanted))
    made = []
    for name, contexts, count in (("train", read, wanted), ("validation", iter(validation), len(validation))):
        folder = scratch / name
        folder.mkdir()
        kept = KeptPredictions(folder, count, recipe.context, how.top_n, vocabulary)
        while batch := list(itertools.islice(contexts, size)):
            kept.add(original, torch.stack(batch))
        made.append(kept)
    examples = itertools.islice(made[0].examples(size, original.device, recipe.seed), taken, None)
    return _Texts(examples, made[1].in_order(size, original.device), read)


def _train(
    healed: _Healed,
    texts: _Texts,
    recipe: Recipe,
    how: Healing,
    accelerator: Accelerator,
    state: EndToEnd,
    run: RunFolder,
    reporter: Reporter,
) -> None:
    tokens = state.tokens_per_step // how.accumulate
    start_kernels(accelerator, healed.converted.plan.layers, tokens, reporter)
    settings = Settings(how.local, how.accumulate, how.checkpointing, patience=how.patience)
    resumed = None
    if run.resumed is not None:
        run.check_text(texts.read.digest())
        resumed = run.resumed.tensors(TRAINING_FILE)
    keeper = Keeper(run, lambda: state.step, lambda: state.state() | {"text": texts.read.digest()}, resumed=resumed)
    with reporter.progress("heal", "tokens") as line, run.watching(reporter.say):

        def report(now: EndToEnd) -> None:
            line.update(now.tokens, now.steps * now.tokens_per_step, f"KL {now.validation[-1][1]:.4f}")
            run.journal.metrics("heal", **now.row())

        model, layers, given = healed.converted.model, healed.layers, (texts.examples, texts.validation)
        train_end_to_end(model, layers, *given, recipe, settings, accelerator, state, report, healed.adapters, keeper)
    for plan, layer in layers.items():
        healed.converted.layers[plan.block.layer].load_state_dict(layer.state_dict())
    before = state.validation[0][1]
    early = f", stopped after {compact(state.tokens)}" if state.stopped else ""
    reporter.say(
        f"healed     {compact(state.best_tokens)} tokens in {duration(state.seconds)}{early}; KL on text that was not"
    )
    reporter.say(f"           trained on: {before:.4f} before, {state.best_kl:.4f} after")
    if state.best_step == 0:
        reporter.say("           nothing better than the start was found: the weights are as they were")


def _record(healed: _Healed, recipe: Recipe, how: Healing, state: EndToEnd, validation: Tensor) -> dict[str, Any]:
    """The record of this healing as config.json keeps it: plain data that names no local path."""
    return {
        "mode": how.mode,
        "data": text_name(how.data or recipe.data),
        "tokens": state.tokens,
        "tokens_to_best": state.best_tokens,
        "seconds": round(state.seconds, 1),
        "batch": state.tokens_per_step,
        "lr": recipe.lr,
        "specialise": recipe.specialise,
        "local": how.local,
        "seed": recipe.seed,
        "teacher": how.teacher,
        "top_n": how.top_n if how.teacher == "cached" else None,
        "lora": how.lora if how.adapts else None,
        "lora_rank": how.lora_rank if how.adapts else None,
        "maps": healed.maps,
        "stopped_early": state.stopped,
        "validation_tokens": validation[:, 1:].numel(),
        "kl_before": state.validation[0][1],
        "kl_after": state.best_kl,
        "validation": [{"tokens": step * state.tokens_per_step, "kl": kl} for step, kl in state.validation],
    }


def _write(healed: _Healed, folder: Path, step: dict[str, Any], how: Healing, check: Tensor) -> None:
    """Writes the healed model's folder, all but evaluation and card; reloads it in a fresh process and compares."""
    converted, adapters = healed.converted, healed.adapters
    for path in converted.folder.iterdir():
        if path.is_file() and path.name not in ABOUT and ".safetensors" not in path.name:
            shutil.copy2(path, folder / path.name)
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
    check_reload(folder, reference)


def heal_table(result: dict[str, Any]) -> Table:
    """For a terminal: KL on the validation text in the course of training."""
    table = Table(title=f"On {result['validation_tokens']:,} tokens that were not trained on")
    table.add_column("tokens", justify="right")
    table.add_column("KL(original ‖ converted)", justify="right")
    for row in result["validation"]:
        table.add_row(compact(row["tokens"]), f"{row['kl']:.4f}" + (" *" if row["kl"] == result["kl_after"] else ""))
    return table
