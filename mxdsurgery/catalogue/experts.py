"""``experts``: runs text through a converted model once and records, for every expert, when it fires and what it does."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from mxdsurgery.aside import clear_left_overs, put_in_place
from mxdsurgery.base.decoder import layer_count
from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.base.running import hooked, run_base
from mxdsurgery.base.selection import select_layers
from mxdsurgery.catalogue.contexts import CLASSES_FILE, Corpus, Source, read_corpus
from mxdsurgery.catalogue.files import CATALOGUE_FILE, CATALOGUE_VERSION
from mxdsurgery.catalogue.statistics import AFTER, BEFORE, BINS, Tally
from mxdsurgery.catalogue.tables import write_tables
from mxdsurgery.checkpoint.converted import Converted, fingerprint, load_with_recipe, read_config
from mxdsurgery.checkpoint.writing import check_place, check_room, write_json
from mxdsurgery.errors import LayerSelectionError, MemoryBudgetError, OutputError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.hardware.memory import PeakMemory, free_memory
from mxdsurgery.layers.baselines import Molt
from mxdsurgery.layers.interventions import MAXIMUM_FILE
from mxdsurgery.layers.layer import Coefficients, MxDLayer
from mxdsurgery.measuring.held_out import recipes_text
from mxdsurgery.runs.resume import part, prefixed
from mxdsurgery.runs.run_folder import RunFolder
from mxdsurgery.terminal.console import ProgressLine, Reporter, size
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.places import check_there, text_name

# Tokens per forward pass: enough that the bookkeeping for a batch costs little compared with the pass.
_BATCH = 8192
_TALLIES_FILE = "tallies.safetensors"


@dataclass(frozen=True)
class _Settings:
    """What a run depends on."""

    fingerprint: str
    source: Source
    layers: list[int]
    top: int
    sample: int


@guarded
def experts(
    folder: str | Path,
    *,
    data: str | None = None,
    tokens: int = 1_000_000,
    out: str | Path | None = None,
    layers: str = "all",
    text_column: str | None = None,
    label_column: str | None = None,
    top: int = 10,
    sample: int = 10,
    spread: int = 8,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes a catalogue of all experts of a converted model; `mxdsurgery.catalogue.files` says what is in it.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        data: the text; default: the recipe's held-out text, or its training text.
        tokens: how many of its tokens.
        out: the folder to write; default: ``experts`` in ``folder``, where `search`, `report` and ``unit="maximum"`` look.
        layers: which layers, written as for ``convert``.
        text_column: column or field with the text; default: the recipe's.
        label_column: column or field with each document's class; default: ``label`` or ``kind``, where there is one.
        top: how many places to keep of each expert where it fired most strongly.
        sample: how many places to keep of each expert, drawn at random from all where it fired.
        spread: contexts are drawn evenly at random from so many times as much text.
        overwrite: replace an earlier catalogue.
        resume: go on with the unfinished run in ``<out>.run``, if there is one.
        checkpoint_every: passes between two checkpoints; default: the recipe's, or by its checkpoint_minutes alone.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        seed: of all random draws.
        reporter: where progress is reported; default: nowhere.

    Returns:
        ``tokens``, ``contexts``, ``classes``, ``seconds`` of the pass, ``peak_bytes`` (None if unknown), ``out``; of each of
        ``layers`` ``n_experts``, ``unused`` (never fired), the others' ``median_frequency``, how many are ``above_1_percent``.

    Raises:
        NotConvertedError: the folder is not one of ours.
        OutputError: there is a catalogue, or an unfinished one to be neither resumed nor overwritten, or none can be written.
        CheckpointError: the unfinished run has other settings, or is damaged.
        DataError: the text cannot be read, or lacks the label.
        MemoryBudgetError: what is kept of the experts does not fit.
        Interrupted: Ctrl-C; a checkpoint is written first.
    """
    reporter = reporter or Reporter()
    out = _place(folder, out, data, overwrite)
    converted, recipe = load_with_recipe(folder, device, compute, trust_remote_code=trust_remote_code)
    text = data or recipe.eval_data or recipe.data
    settings = _Settings(
        fingerprint=fingerprint(converted),
        source=Source(text, tokens, text_column or recipe.text_column, label_column, spread, seed),
        layers=layers_with_experts(converted, layers),
        top=top,
        sample=sample,
    )
    check_room(out, _check_memory(converted, settings))
    run = RunFolder(out, dataclasses.replace(recipe, checkpoint_every=checkpoint_every or recipe.checkpoint_every))
    run.open(asdict(settings), resume, overwrite)
    with run.working(reporter) as reporter:
        _check_free(out, overwrite)  # again: another run may have ended meanwhile
        compute_in(converted.model, getattr(torch, run.as_begun(recipe, reporter.say).compute))
        try:
            with recipes_text(converted.folder, data):
                packing = Packing(converted.tokenizer(), recipe.context, recipe.prepend_bos)
                summary = _catalogued(converted, settings, packing, run, out, reporter)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{str(out)!r} cannot be written: {first_line(error)}", fix="free some space") from None
    run.finish(out)
    return summary | {"out": str(out)}


def _catalogued(
    converted: Converted, settings: _Settings, packing: Packing, run: RunFolder, out: Path, reporter: Reporter
) -> dict[str, Any]:
    """Reads the text, runs it through the model and writes the catalogue."""
    partial = run.path / "catalogue"
    partial.mkdir(exist_ok=True)
    corpus = read_corpus(partial, settings.source, packing, reporter)
    tallies = _tallies(converted, settings, len(corpus.names))
    memory, start = PeakMemory(converted.model.device.type), time.monotonic()
    with reporter.progress("experts", "tokens") as line, run.watching(reporter.say):
        _run(converted, tallies, corpus, settings, run, line)
    seconds = time.monotonic() - start
    with reporter.progress("write", "experts") as line:
        write_tables(partial, converted, tallies, corpus.tokens, line)
    write_json(partial / CATALOGUE_FILE, _catalogue(converted, settings, corpus))
    _finish(partial, out)
    return _summary(corpus, tallies) | {"seconds": seconds, "peak_bytes": memory.bytes()}


def _summary(corpus: Corpus, tallies: dict[int, Tally]) -> dict[str, Any]:
    layers = []
    for layer, tally in tallies.items():
        frequency = tally.fired.double() / corpus.tokens
        used = frequency[frequency > 0]
        entry = {"layer": layer, "n_experts": len(frequency), "unused": int((frequency == 0).sum())}
        entry["median_frequency"] = used.median().item() if len(used) else None
        layers.append(entry | {"above_1_percent": int((frequency > 0.01).sum())})
    return {"tokens": corpus.tokens, "contexts": len(corpus.ids), "classes": corpus.names, "layers": layers}


def _catalogue(converted: Converted, settings: _Settings, corpus: Corpus) -> dict[str, Any]:
    """What experts.json holds; see `Catalogue`."""
    counted = corpus.classes[:, 1:]
    return {
        "format_version": CATALOGUE_VERSION,
        "model": converted.folder.resolve().name,
        "fingerprint": settings.fingerprint,
        "data": text_name(settings.source.data),
        "tokens": corpus.tokens,
        "contexts": len(corpus.ids),
        "context": corpus.ids.shape[1],
        "classes": corpus.names,
        "class_tokens": [int((counted == number).sum()) for number in range(len(corpus.names))],
        "before": BEFORE,
        "after": AFTER,
        "bins": BINS,
        "layers": {str(layer): converted.layers[layer].gate.n_experts for layer in settings.layers},
    }


def _finish(partial: Path, out: Path) -> None:
    """Moves the finished catalogue to its place, without the file that only a resumed run needs."""
    (partial / CLASSES_FILE).unlink(missing_ok=True)
    put_in_place(partial, out)


def experts_table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    table = Table(title=f"Experts on {result['tokens']:,} tokens")
    table.add_column("layer")
    for heading in ("experts", "never fired", "median frequency of the others", "on more than 1 % of tokens"):
        table.add_column(heading, justify="right")
    for row in result["layers"]:
        median = "-" if row["median_frequency"] is None else f"{row['median_frequency']:.2e}"
        table.add_row(str(row["layer"]), f"{row['n_experts']:,}", f"{row['unused']:,}", median, f"{row['above_1_percent']:,}")
    return table


def layers_with_experts(converted: Converted, layers: str) -> list[int]:
    """The layers of a selection that have experts; all must, unless the selection is ``all``.

    Raises:
        LayerSelectionError: a selected layer has no experts, or no layer has.
    """
    there = [entry.block.layer for entry in converted.plan.layers if entry.n_experts]
    wanted = select_layers(layers, layer_count(converted.model))
    found = [layer for layer in there if layer in wanted]
    if not found or (layers != "all" and len(found) < len(wanted)):
        raise LayerSelectionError(
            f"{str(converted.folder)!r} has no experts in some of the layers {layers}",
            expected="layers among " + (", ".join(map(str, there)) or "none"),
        )
    return found


def _place(folder: str | Path, out: str | Path | None, data: str | None, overwrite: bool) -> Path:
    """Where the catalogue goes. Raises what can be known to be wrong before any weights are read."""
    read_config(folder)
    check_there(data)
    place = Path(out) if out is not None else Path(folder) / Path(MAXIMUM_FILE).parent
    _check_free(place, overwrite)
    check_place(place)
    return place


def _check_free(out: Path, overwrite: bool) -> None:
    """Raises OutputError if there is something that is not to be overwritten."""
    clear_left_overs(out)
    if out.exists() and not overwrite:
        raise OutputError(f"{str(out)!r} exists already", fix="give another --out, or --overwrite")
    if out.exists() and not (out / CATALOGUE_FILE).is_file():
        raise OutputError(
            f"{str(out)!r} is no catalogue that mxdsurgery wrote: it is never overwritten", fix="give another --out"
        )


def _check_memory(converted: Converted, settings: _Settings, classes: int = 0) -> int:
    """Bytes of what is kept of the experts; a checkpoint takes as many. Raises MemoryBudgetError if they are not free."""
    shapes = {layer: converted.layers[layer].gate.weight.shape for layer in settings.layers}
    needed = sum(Tally.bytes(*shape, classes, settings.top, settings.sample) for shape in shapes.values())
    free = free_memory("cpu")
    if needed > 0.9 * free:
        raise MemoryBudgetError(
            f"what is kept of {sum(n for n, _ in shapes.values()):,} experts takes {size(needed)}; {size(free)} are free",
            expected="room for it",
            fix="look at fewer layers at a time: --layers, or keep fewer places: --top, or --sample",
        )
    return needed


def _tallies(converted: Converted, settings: _Settings, classes: int) -> dict[int, Tally]:
    _check_memory(converted, settings, classes)
    shapes = {layer: converted.layers[layer].gate.weight.shape for layer in settings.layers}
    return {layer: Tally.none(*shape, classes, settings.top, settings.sample) for layer, shape in shapes.items()}


@torch.no_grad()
def _run(
    converted: Converted, tallies: dict[int, Tally], corpus: Corpus, settings: _Settings, run: RunFolder, line: ProgressLine
) -> None:
    """The pass over the text, from where an earlier one stopped."""
    done, passes = _restored(run, tallies)
    rows, model = max(1, _BATCH // corpus.ids.shape[1]), converted.model

    def kept() -> Iterator[dict[str, Tensor]]:
        for layer, tally in tallies.items():
            yield prefixed(tally.state(), str(layer))

    with recorded_coefficients(converted, settings.layers) as seen:
        while done < len(corpus.ids):
            batch = corpus.ids[done : done + rows].long()
            run_base(model, batch.to(model.device))
            draw = torch.Generator().manual_seed(settings.source.seed * 2**32 + done)
            for layer, tally in tallies.items():
                a, m = seen.pop(layer)
                shape = (*batch.shape, -1)
                a = Coefficients(a.values.reshape(shape).cpu(), a.indices.reshape(shape).cpu())
                m = None if m is None else m.reshape(shape).cpu()
                tally.add(a, m, corpus.classes[done : done + rows].long(), done, draw)
            done, passes = done + len(batch), passes + 1
            line.update(done * batch.shape[1], corpus.ids.numel())
            run.after(passes, {_TALLIES_FILE: kept}, {}, functools.partial(dict, contexts=done, passes=passes))
    run.save(passes, {_TALLIES_FILE: kept}, {}, {"contexts": done, "passes": passes})


def _restored(run: RunFolder, tallies: dict[int, Tally]) -> tuple[int, int]:
    """Restores the tallies of a resumed run; returns how many contexts and passes they cover."""
    if run.resumed is None:
        return 0, 0
    tensors = run.resumed.tensors(_TALLIES_FILE)
    for layer, tally in tallies.items():
        tally.restore(part(tensors, str(layer)))
    return run.resumed.state["contexts"], run.resumed.state["passes"]


@contextlib.contextmanager
def recorded_coefficients(converted: Converted, layers: list[int]) -> Iterator[dict[int, tuple[Coefficients, Tensor | None]]]:
    """While open, every forward pass leaves in the mapping that is yielded, by layer, the experts' coefficients (..., K) and
    what they weigh: the factor ``D z`` (..., D) in a Mixture of Decoders, the input x (..., D) in a MOLT, None elsewhere."""
    seen: dict[int, tuple[Coefficients, Tensor | None]] = {}
    chosen: dict[int, Coefficients] = {}
    handles = []
    for layer in layers:
        module = converted.layers[layer]

        def keep(_module: Any, args: Any, a: Coefficients, layer: int = layer) -> None:
            chosen[layer] = a
            seen[layer] = (a, args[0] if isinstance(converted.layers[layer], Molt) else None)

        def keep_decoded(_module: Any, _args: Any, m: Tensor, layer: int = layer) -> None:
            seen[layer] = (chosen[layer], m)

        handles.append(module.gate.register_forward_hook(keep))
        if isinstance(module, MxDLayer):
            handles.append(module.decoder.register_forward_hook(keep_decoded))
    with hooked(*handles):
        yield seen
