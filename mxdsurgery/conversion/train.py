"""Training: all new layers of a plan, group after group, each group from one pass over the text."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import distinct
from mxdsurgery.base.dtypes import cast, rounded, stored_in
from mxdsurgery.base.offload import execution_device, on_disk, weights_of
from mxdsurgery.checkpoint.writing import check_apart, check_place, check_room
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.measuring.shares import Shares
from mxdsurgery.planning.effort import fitted_per_scored
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.journal import Journal
from mxdsurgery.runs.parallel import first_ones, my_contexts, rank, receive, receive_values, send, send_values, text_shares
from mxdsurgery.runs.resume import Files, part, prefixed
from mxdsurgery.runs.run_folder import TRAINING_FILE, Keeper, RunFolder
from mxdsurgery.terminal.console import ProgressLine, Reporter, compact, duration
from mxdsurgery.text.fingerprints import Fingerprints
from mxdsurgery.text.sources import Texts, TextStream, check_validation
from mxdsurgery.training.accelerator import choose_kernels, kernels_used, ranks_in, use_kernels
from mxdsurgery.training.activation_cache import ActivationCache, check_cache_folder, kept_bytes, shape_of
from mxdsurgery.training.cost import LayerPlan, tokens_per_step
from mxdsurgery.training.distill import Progress, batches_taken, distill, layer_key
from mxdsurgery.training.end_to_end import EndToEnd, Settings, train_end_to_end
from mxdsurgery.training.initialize import initial_layers, layer_shape
from mxdsurgery.training.inputs import ConvertedInputs, OriginalInputs, Read
from mxdsurgery.training.share import SharesOf
from mxdsurgery.training.teacher import original_examples

# The weight of each layer's own loss beside the KL, where layers are trained jointly from their start.
JOINT_LOCAL = 1.0
# What a finished group was trained on, among its tensors.
_TEXT = "text"


@dataclass
class Training:
    """Where the training of all groups stands; kept up to date while it runs, so that an interrupted one can be described.

    Attributes:
        groups: how many there are.
        passes: the progress of each group begun so far; one pass over the text each.
        layers: finished layers, rounded to the dtype that they will be stored in, and layers in training, in fp32.
        times_read: how many times a pass began the text; more than once where the text is shorter than the training.
        seconds_feeding: time spent on statistics and hidden states, before the layers' own steps.
        trained_on: fingerprints of the contexts that a group was trained on; all groups are trained on the same.
        contexts: how many these are.
    """

    groups: int
    passes: list[Progress] = field(default_factory=list)
    layers: dict[LayerPlan, nn.Module] = field(default_factory=dict)
    times_read: int = 0
    seconds_feeding: float = 0.0
    trained_on: Fingerprints | None = None
    contexts: int = 0

    @property
    def seconds(self) -> float:
        """Of all passes so far, and of what had to be run before each."""
        return self.seconds_feeding + sum(progress.seconds for progress in self.passes)

    @property
    def step(self) -> int:
        """Steps of all groups so far."""
        return sum(progress.step for progress in self.passes)

    def state(self) -> dict[str, Any]:
        """Where it stands, as plain data; `_Work` reads it when a run is resumed."""
        passes = [progress.state() for progress in self.passes]
        return {"passes": passes, "times_read": self.times_read, "seconds_feeding": self.seconds_feeding}

    @property
    def nmse(self) -> dict[LayerPlan, float]:
        """By layer, over the last steps looked at."""
        return {layer: value for progress in self.passes for layer, value in progress.nmse.items()}

    @property
    def dead_share(self) -> dict[LayerPlan, float]:
        """By layer, the share of its experts that are dead."""
        return {layer: value for progress in self.passes for layer, value in progress.dead_share.items()}


def check_cache(made: Plan, recipe: Recipe) -> None:
    """Checks, before anything is loaded, that activations can be kept where the recipe says, if it does.

    Raises:
        CacheError: the folder holds those of other batches.
        OutputError: it holds something else, is where the result goes, or has no room for what it does not hold yet.
    """
    if recipe.cache_activations is None:
        return
    folder = Path(recipe.cache_activations)
    for out in (recipe.out, f"{recipe.out}.run"):
        check_apart(out, folder, "where cache_activations keeps activations")
    check_cache_folder(folder, shape_of(recipe))
    check_place(folder, "--cache-activations")
    layers = {block.layer for block in made.blocks}
    check_room(folder, max(0, made.cache_bytes - kept_bytes(folder, sorted(layers))), "--cache-activations")


def train_groups(
    base: PreTrainedModel,
    made: Plan,
    texts: Texts,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    reporter: Reporter,
    run: RunFolder | None = None,
) -> None:
    """Distils group after group. Afterwards all layers are frozen, in the dtype that the base model computes in, rounded to
    the dtype that they will be stored in; and in host memory, or on disk where the plan offloads.

    Args:
        base: the unmodified model, on the accelerator's device, or with its weights on disk.
        made: which layers, in which groups.
        texts: to train on, each group from the beginning; and to choose on: the best weights, with ``inputs: joint``, and else
            how much is asked of the experts.
        recipe: how to train.
        accelerator: device, precision and trackers.
        training: is kept up to date.
        reporter: where progress is reported.
        run: holds checkpoints, what to resume from, and the scratch folder for hidden states and finished layers; default:
            none of these, for a plan that keeps nothing on disk.

    Raises:
        DivergedError: naming the layer.
        DataError: the text cannot be read to its end.
        UnsupportedBlockError: with ``inputs: converted``, the decoder layers cannot be run one by one.
        CacheError: the activations that ``cache_activations`` kept are of another model or text, or damaged.
        CheckpointError: the text is not the one that the run began with.
        OutputError: a checkpoint cannot be written.
        Interrupted: the run was asked to stop.
    """
    run = run or RunFolder(None, recipe)
    if recipe.inputs == "joint":
        check_validation(texts.validation, texts.train)
    if recipe.tracker != "none":
        settings = {name: value for name, value in recipe.to_dict().items() if value is not None}
        accelerator.init_trackers("mxdsurgery", config=settings)
    selection = None if recipe.inputs == "joint" else ranks_in(recipe)
    start_kernels(accelerator, made.layers, tokens_per_step(recipe), selection, reporter)
    start = time.perf_counter()
    source = _source(base, texts.train, recipe, accelerator.device, reporter, run.scratch if made.states_on_disk else None)
    training.seconds_feeding += time.perf_counter() - start
    with ExitStack() as stack:
        # One line for all groups; it counts from when the first of them is ready to train.
        line = functools.cache(lambda: stack.enter_context(reporter.progress("distil", "tokens", made.training_cost(recipe))))
        stack.enter_context(run.watching(reporter.say))
        work = _Work(base, made.steps, made.look_tokens, source, texts.validation, recipe, accelerator, training, run, line)
        remaining = iter(made.layers)
        for number, group in enumerate(made.groups):
            layers = list(itertools.islice(remaining, len(group.layers)))
            if not work.take_finished(number, layers):
                work.train(number, layers)
            source.replace(_freeze(layers, base, made.dtype, training, run.scratch if made.offloaded else None))
            work.finished.append(layers)
            run.save(training.step, {}, work.finished_files(), work.state())
    for tracker in accelerator.trackers:
        tracker.finish()
    dead = sum(training.dead_share.values()) / len(training.dead_share)
    tokens = compact(training.passes[-1].tokens)
    reporter.say(f"distilled  {tokens} tokens in {duration(training.seconds)}, {dead:.1%} of experts dead")
    if training.times_read > 1:
        reporter.say(f"           the text is short: it was read {training.times_read} times over")


def start_kernels(
    accelerator: Accelerator, layers: Sequence[LayerPlan], tokens: int, selection: torch.dtype | None, reporter: Reporter
) -> None:
    """Uses Triton kernels where they are faster for the largest of the layers on ``tokens`` tokens; reports the choice.

    The first process tries them, and decides for all: they then compute alike.
    """
    largest = max(layers, key=lambda layer: layer.n_experts)
    shape = {"d_model": largest.block.d_model, "n_experts": largest.n_experts, "k": largest.k}
    tried = None if rank() else choose_kernels(accelerator, **shape, tokens=tokens, selection=selection)
    kernels, used = first_ones([tried, kernels_used(accelerator)])
    use_kernels(accelerator, used)
    if kernels is not None:
        reporter.say(f"kernels    {kernels}")


def _source(
    base: PreTrainedModel,
    train: TextStream,
    recipe: Recipe,
    device: torch.device,
    reporter: Reporter,
    folder: Path | None,
) -> OriginalInputs | ConvertedInputs:
    """Where the layers' inputs come from, by the recipe. Layers trained jointly start from statistics of the original's."""
    if recipe.inputs == "converted":
        return ConvertedInputs(base, train, recipe, device, folder, reporter)
    kept = None if recipe.cache_activations is None else ActivationCache(Path(recipe.cache_activations), base, recipe)
    return OriginalInputs(base, train, recipe, device, kept)


@dataclass
class _Work:
    """Trains the groups of a run, and keeps which of them are finished."""

    base: PreTrainedModel
    steps: int
    look_tokens: int
    source: OriginalInputs | ConvertedInputs
    validation: Tensor
    recipe: Recipe
    accelerator: Accelerator
    training: Training
    run: RunFolder
    line: Callable[[], ProgressLine]
    finished: list[list[LayerPlan]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Where the run stands, as plain data."""
        return self.training.state() | {"finished": len(self.finished), "text": self.source.read.digest()}

    def finished_files(self) -> Files:
        """The layers of each finished group, and what of the text it was trained on."""
        return {_group_file(number): functools.partial(self._weights, layers) for number, layers in enumerate(self.finished)}

    def _weights(self, layers: Sequence[LayerPlan]) -> Iterator[dict[str, Tensor]]:
        for plan in layers:
            layer = self.training.layers[plan]
            yield prefixed(rounded(layer, weights_of(layer), stored_in(self.base)), layer_key(plan))
        if self.training.trained_on is not None:
            met, count = self.training.trained_on.tensor(), torch.tensor(self.training.contexts)
            yield prefixed({"met": met, "contexts": count}, _TEXT)

    def take_finished(self, number: int, layers: Sequence[LayerPlan]) -> bool:
        """Takes a group's layers from the checkpoint that the run resumes from, if the group is finished there."""
        saved = self.run.resumed
        if saved is None or number >= saved.state["finished"]:
            return False
        tensors = saved.tensors(_group_file(number))
        for plan in layers:
            layer = LAYER_KINDS[plan.kind](**layer_shape(plan)).to(self.base.dtype)
            layer.load_state_dict(part(tensors, layer_key(plan)))
            self.training.layers[plan] = layer
        if text := part(tensors, _TEXT):
            self.training.trained_on = Fingerprints.from_tensor(self.recipe.context, text["met"])
            self.training.contexts = int(text["contexts"])
        self._progress(number).restore(saved.state["passes"][number], layers)
        self.training.times_read = saved.state["times_read"]
        self.training.seconds_feeding = saved.state["seconds_feeding"]
        return True

    def _progress(self, number: int) -> Progress:
        """Adds the progress of a group that begins, and returns it."""
        tokens = tokens_per_step(self.recipe)
        kind = EndToEnd if self.recipe.inputs == "joint" else Progress
        self.training.passes.append(kind(self.steps, tokens, self.steps * number))
        return self.training.passes[-1]

    def train(self, number: int, layers: Sequence[LayerPlan]) -> None:
        """Trains a group of layers, on the same text as all other groups: a layer learns the same in whatever group it is."""
        start, training, saved = time.perf_counter(), self.training, self.run.resumed
        progress, resumed = self._progress(number), None
        if saved is not None and len(saved.state["passes"]) > number == saved.state["finished"]:
            progress.restore(saved.state["passes"][number], layers)
            training.seconds_feeding = saved.state["seconds_feeding"]
            resumed = saved.tensors(TRAINING_FILE)
        keeper = Keeper(self.run, lambda: training.step, self.state, self.finished_files(), resumed)
        blocks = distinct(layer.block for layer in layers)
        joint = self.recipe.inputs == "joint"
        with self.source.feed(blocks, skip=0 if joint else batches_taken(progress, self.recipe)) as feed:
            if resumed is not None and not joint:
                self.run.check_text(feed.read.digest())
            started = initial_layers(self.base, layers, feed.statistics, self.recipe)
            training.seconds_feeding += time.perf_counter() - start
            training.layers |= started
            report = _report_to(self.line(), training, self.run.journal)
            if joint:
                given = (self.source, self.validation, self.recipe, self.accelerator, progress, report, keeper)
                _train_jointly(self.base, started, *given)
            else:
                given = (self.recipe, self.accelerator, progress, report, keeper, self._shares_of())
                distill(started, feed.batches, *given)
        training.times_read = self.source.times_read
        read = self.source.read
        training.trained_on, training.contexts = read.fingerprints(), read.contexts

    def _shares_of(self) -> SharesOf | None:
        """Measures what the layers' experts carry, where a share is asked for; processes that train the same layers hear one
        answer."""
        recipe = self.recipe
        if not self.look_tokens or len(self.validation) == 0:
            return None
        scored = min(max(1, self.look_tokens // recipe.context), len(self.validation))
        fitted = min(fitted_per_scored(recipe.tokens, self.look_tokens), len(self.validation) // scored)
        contexts = self.validation[:: len(self.validation) // (scored * fitted)][: scored * fitted]
        measured = Shares(self.base, contexts, recipe.batch, fitted)

        def shares_of(layers: Mapping[LayerPlan, nn.Module]) -> dict[LayerPlan, dict[str, float]]:
            if text_shares(recipe) == 1:
                return measured(layers)
            found = list(measured(layers).values()) if rank() == 0 else []
            return dict(zip(layers, first_ones(found), strict=True))

        return shares_of


def _group_file(number: int) -> str:
    return f"group_{number}.safetensors"


def _train_jointly(
    base: PreTrainedModel,
    layers: dict[LayerPlan, nn.Module],
    source: OriginalInputs,
    validation: Tensor,
    recipe: Recipe,
    accelerator: Accelerator,
    progress: EndToEnd,
    report: Callable[[Progress], None],
    keeper: Keeper,
) -> None:
    """Trains all layers at once, end to end, each also toward its block's output: fresh layers give nothing useful yet."""
    contexts = recipe.batch // recipe.context
    blocks = [layer.block for layer in layers]
    settings = Settings(local=JOINT_LOCAL, anneal=True)
    with closing(source.text.batches(contexts)) as batches:
        source.read = Read(batches)
        source.read.skip(progress.step)
        if keeper.resumed is not None:
            keeper.run.check_text(source.read.digest())
        examples = original_examples(base, blocks, (my_contexts(batch, recipe) for batch in source.read))
        looked_at = list(original_examples(base, (), validation.split(contexts)))
        train_end_to_end(base, layers, examples, looked_at, recipe, settings, accelerator, progress, report, keeper=keeper)


def _freeze(
    layers: Sequence[LayerPlan], base: PreTrainedModel, stored: str, training: Training, folder: Path | None
) -> dict[LayerPlan, nn.Module]:
    """Freezes trained layers, rounded to the dtype ``stored``, and moves them off the device: to host memory or a folder."""
    device = execution_device(base)
    for planned in layers:
        layer = training.layers[planned].to(device="cpu", dtype=getattr(torch, stored)).eval().requires_grad_(False)
        if folder is not None:
            on_disk(layer, folder / f"layer_{planned.block.layer}.safetensors", device)
        cast(layer, base.dtype)
    return {planned: training.layers[planned] for planned in layers}


def collect(training: Training, shares: Sequence[Sequence[LayerPlan]], base: PreTrainedModel, device: torch.device) -> None:
    """Brings the layers that other processes trained, and what is known of their training, to the first process.

    Args:
        training: of this process; in the first one, all layers are in it afterwards.
        shares: the layers of each process; a single list where all train the same layers.
        base: its dtype is that of the layers.
        device: of the process; tensors are sent from it and received on it.
    """
    if len(shares) == 1:
        return  # all of them trained all
    if rank() > 0:
        for plan in shares[rank()]:
            for tensor in training.layers[plan].state_dict().values():
                send(tensor, device)
        send_values([progress.state() for progress in training.passes], device)
        return
    for source, layers in enumerate(shares[1:], start=1):
        for plan in layers:
            layer = LAYER_KINDS[plan.kind](**layer_shape(plan)).to(base.dtype).eval().requires_grad_(False)
            layer.load_state_dict({name: receive(held, source, device) for name, held in layer.state_dict().items()})
            training.layers[plan] = layer
        for state in receive_values(source, device):
            first = training.passes[0]
            progress = Progress(first.steps, first.tokens_per_step)
            progress.restore(state | {"seconds": 0.0}, layers)  # they trained at the same time
            training.passes.append(progress)
            training.groups += 1


def _report_to(line: ProgressLine, training: Training, journal: Journal) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        mean = sum(progress.nmse.values()) / max(1, len(progress.nmse))
        number = len(training.passes)
        group = f"group {number} of {training.groups}, " if training.groups > 1 else ""
        done = sum(begun.tokens for begun in training.passes)
        line.update(done, training.groups * progress.steps * progress.tokens_per_step, f"{group}NMSE {mean:.4f}")
        journal.metrics("distil", group=number, **progress.row())

    return report
