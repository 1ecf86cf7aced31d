"""``heal``: trains a converted model end to end, so that as a whole it predicts what the original does; in a new folder."""

import copy
import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from transformers import PreTrainedModel

from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.base.examination import weights_digest
from mxdsurgery.base.lora import Adapters, check_peft, healed_maps, projections
from mxdsurgery.checkpoint.converted import Converted, chosen_dtype, load, saved_recipe
from mxdsurgery.checkpoint.export import check_reload, written_as
from mxdsurgery.checkpoint.writing import check_apart, check_output, check_room_for_copy
from mxdsurgery.conversion.heal_record import Healed, heldout_kl, record_of, say_healed, trained_on_now, write_healed
from mxdsurgery.conversion.heal_text import Answered, HealingTexts, healing_texts, with_answers, with_kept_answers
from mxdsurgery.conversion.healing import Healing
from mxdsurgery.conversion.shared_run import shared_run
from mxdsurgery.conversion.train import start_kernels
from mxdsurgery.errors import HealError
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.measuring.evaluate import check_before_loading, evaluate, load_original
from mxdsurgery.planning.machine import settled_recipe
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import rank, text_shares
from mxdsurgery.runs.run_folder import TRAINING_FILE, Keeper, RunFolder, depends_on
from mxdsurgery.terminal.console import Reporter, compact
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.end_to_end import EndToEnd, Settings, train_end_to_end

# Contexts on which the reloaded checkpoint is compared with the model in memory.
_CHECK_CONTEXTS = 2


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
    validation text are written; the first ones are a candidate, too. What is trained on, chosen on and reported on are three
    texts, and the conversion has used none but the first. ``out`` appears whole or not at all.

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
        The record of this healing as config.json has it: ``kl_before`` and ``kl_after`` in nats per token on
        ``heldout_tokens`` tokens that nothing was trained or chosen on, ``validation``, the KL on the text that was chosen on,
        ``tokens``, ``seconds``, the settings; ``evaluation``, the figures as `evaluate` gives them; and ``out``. None in all
        processes but the first, where several were launched.

    Raises:
        NotConvertedError: the folder is not one of ours.
        HealError: the folder's experts were edited, it has an adapter that is not merged, or an option's value is not allowed.
        LoRAError: peft is not installed.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
        DataError: the text cannot be read, is too short, or is the held-out text.
        DivergedError: the learning rate was too high.
        OutputError, CheckpointError: ``out`` cannot be written, or an unfinished run is in the way, or cannot be resumed.
        Interrupted: Ctrl-C; while training, a checkpoint is written first.
    """
    reporter, how, trust = reporter or Reporter(), Healing(**options), trust_remote_code
    where = {"base": base, "device": device, "trust_remote_code": trust}
    check_before_loading(folder, how.data, base, trust)
    target = _target(folder, out, overwrite)
    converted, saved = load(folder, trust_remote_code=trust), saved_recipe(folder, device)
    _check_folder(converted, how)
    recipe = how.recipe(saved)
    more = depends_on(asdict(how)) | {"source": weights_digest(converted.model)}
    with shared_run(target, recipe, more, resume, overwrite, reporter) as (run, reporter):
        size = _contexts_per_pass(recipe, how)
        recipe = _settled(converted, recipe, compute, run, reporter)
        accelerator = make_accelerator(recipe)
        texts = healing_texts(converted, saved, recipe, how.data, reporter)
        original = _original(converted, base, recipe, accelerator.device, run)
        healed = _open_for_healing(converted, original, recipe, how, reporter)
        state = _where_it_stands(size * how.accumulate * recipe.context, healed, recipe, run, reporter)
        answered = _answered(original, healed, texts, size, run.scratch, how, recipe, state)
        original = None if how.teacher == "cached" else original
        step = _train(healed, texts, answered, recipe, how, how.settings(saved), accelerator, state, run, reporter)
        if rank():
            accelerator.end_training()
            return None
        record = trained_on_now(texts, answered.read)
        del answered, original  # `evaluate` loads it anew
        origin = (converted.plan.model, converted.plan.revision) if base is None else (base, None)
        with written_as(target, how.format, *origin, within=run.scratch, trust_remote_code=trust) as checkpoint:
            reference = write_healed(healed, checkpoint, step, how, texts.validation[:_CHECK_CONTEXTS], record)
            del converted, healed, state  # what is written is loaded in another process, with no model beside it
            check_reload(checkpoint, reference)
            where |= {"data": texts.measured_on, "contexts": texts.heldout, "compute": recipe.compute}
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


def _original(converted: Converted, base: str | None, recipe: Recipe, device: torch.device, run: RunFolder) -> PreTrainedModel:
    """The original model; a resumed run refuses another than it began with."""
    original = load_original(converted, base or recipe.model, recipe).to(device)
    run.confirm(original=weights_digest(original))
    return original


def _where_it_stands(step: int, healed: Healed, recipe: Recipe, run: RunFolder, reporter: Reporter) -> EndToEnd:
    """The training's state, with ``step`` tokens per step; that of a resumed run is restored."""
    state = EndToEnd(max(1, recipe.tokens // step), step)
    if run.resumed is not None:
        state.restore(run.resumed.state, healed.layers)
        reporter.say(f"resume     from step {state.step}, in {run.path}")
    return state


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
    """How many contexts run through the model at a time, in all processes together: each has as many as any other.

    Raises:
        HealError: the contexts of a step cannot be split so.
    """
    contexts, shares = recipe.batch // recipe.context, text_shares(recipe)
    if contexts % (how.accumulate * shares):
        together = f" in {shares} processes" if shares > 1 else ""
        fits = max(n for n in range(1, contexts // shares + 1) if n <= how.accumulate and contexts % (n * shares) == 0)
        raise HealError(
            f"accumulate is {how.accumulate}, and a step has {contexts} contexts ({recipe.batch} tokens){together}",
            expected="as many contexts in each pass of each process, at least one",
            fix=f"--accumulate {fits}, or --batch {how.accumulate * shares * recipe.context}, or a multiple of that",
        )
    return contexts // how.accumulate


def _open_for_healing(
    converted: Converted, original: PreTrainedModel, recipe: Recipe, how: Healing, reporter: Reporter
) -> Healed:
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
    return Healed(converted, layers, adapters, maps)


def _answered(
    original: PreTrainedModel,
    healed: Healed,
    texts: HealingTexts,
    size: int,
    scratch: Path,
    how: Healing,
    recipe: Recipe,
    state: EndToEnd,
) -> Answered:
    """The texts with the original's predictions, from where the training stands."""
    taken = state.step * how.accumulate
    if how.teacher == "cached":
        wanted = state.steps * size * how.accumulate
        return with_kept_answers(original, texts, size, taken, wanted, how.top_n, scratch, recipe)
    return with_answers(original, healed.converted.plan.blocks if how.local > 0 else (), texts, size, taken, recipe)


def _train(
    healed: Healed,
    texts: HealingTexts,
    answered: Answered,
    recipe: Recipe,
    how: Healing,
    settings: Settings,
    accelerator: Accelerator,
    state: EndToEnd,
    run: RunFolder,
    reporter: Reporter,
) -> dict[str, Any]:
    """Trains; the model then has the best weights. Returns the record of it, without the KL but in the first process."""
    before = heldout_kl(healed, answered)  # a resumed run starts from the same
    tokens = state.tokens_per_step // how.accumulate
    start_kernels(accelerator, healed.converted.plan.layers, tokens, None, reporter)
    resumed = None
    if run.resumed is not None:
        run.check_text(answered.read.digest())
        resumed = run.resumed.tensors(TRAINING_FILE)
    keeper = Keeper(run, lambda: state.step, lambda: state.state() | {"text": answered.read.digest()}, resumed=resumed)
    with reporter.progress("heal", "tokens") as line, run.watching(reporter.say):

        def report(now: EndToEnd) -> None:
            line.update(now.tokens, now.steps * now.tokens_per_step, f"KL {now.validation[-1][1]:.4f}")
            run.journal.metrics("heal", **now.row())

        model, layers, given = healed.converted.model, healed.layers, (answered.examples, answered.validation)
        train_end_to_end(model, layers, *given, recipe, settings, accelerator, state, report, healed.adapters, keeper)
    for plan, layer in layers.items():
        healed.converted.layers[plan.block.layer].load_state_dict(layer.state_dict())
    step = record_of(healed, recipe, how, settings, state, texts, before, heldout_kl(healed, answered))
    say_healed(step, reporter)
    return step


def heal_table(result: dict[str, Any]) -> Table:
    """For a terminal: KL on the validation text in the course of training, and on the held-out text."""
    chosen_on = f"{result['validation_tokens']:,} tokens that the best weights are chosen on (*)"
    reported = f"{result['kl_before']:.4f} before, {result['kl_after']:.4f} after"
    table = Table(
        title=f"On {chosen_on}",
        caption=f"On {result['heldout_tokens']:,} tokens that nothing is trained or chosen on: {reported}",
    )
    table.add_column("tokens", justify="right")
    table.add_column("KL(original ‖ converted)", justify="right")
    for row in result["validation"]:
        table.add_row(compact(row["tokens"]), f"{row['kl']:.4f}" + (" *" if row["tokens"] == result["tokens_to_best"] else ""))
    return table
