"""``experts``: runs text through a converted model once and writes down, of every expert, when it fires and what it does."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxdsurgery.activations import hooked
from mxdsurgery.catalogue import CATALOGUE_FILE, CATALOGUE_VERSION
from mxdsurgery.checkpoint import Converted, fingerprint, load_with_recipe
from mxdsurgery.console import ProgressLine, Reporter, size
from mxdsurgery.corpus import CLASSES_FILE, Corpus, Source, read_corpus
from mxdsurgery.errors import Interrupted, LayerSelectionError, MemoryBudgetError, OutputError
from mxdsurgery.export import write_json
from mxdsurgery.interventions import MAXIMUM_FILE
from mxdsurgery.layer import Coefficients, MxDLayer
from mxdsurgery.memory import PeakMemory, free_memory
from mxdsurgery.selection import select_layers
from mxdsurgery.tables import write_tables
from mxdsurgery.tally import AFTER, BEFORE, BINS, Tally
from mxdsurgery.text import Packing, text_name

# Tokens per forward pass: enough that what is kept of a batch costs little beside it.
_BATCH = 8192
# The state is saved this often, in seconds, and never for more than a twentieth of the time.
_SAVE_EVERY = 60.0
_SETTINGS_FILE, _STATE_FILE = "settings.json", "state.safetensors"


@dataclass(frozen=True)
class _Settings:
    """What a run depends on; one that was interrupted goes on only under the same."""

    fingerprint: str
    source: Source
    layers: list[int]
    top: int
    sample: int


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
    device: str | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes a catalogue of all experts of a converted model; `mxdsurgery.catalogue` says what is in it.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        data: the text; default: the recipe's held-out text, or its training text.
        tokens: how many of them.
        out: where to; default: ``experts`` in the folder, where `search`, `report` and ``unit="maximum"`` look.
        layers: which; as ``convert``'s.
        text_column: column or field with the text; default: the recipe's.
        label_column: column or field with each document's class; default: ``label`` or ``kind``, where there is one.
        top: places kept of each expert where it fired most strongly.
        sample: places kept of each, drawn at random from all where it fired.
        spread: contexts are drawn evenly at random from so many times as much text.
        overwrite: take the place of an earlier catalogue.
        device: ``auto``, ``cpu`` or ``cuda``; default: the recipe's.
        seed: of what is drawn.
        reporter: what to tell while working; default: nothing.

    Returns:
        ``tokens``, ``contexts``, ``classes``, ``seconds`` of the pass, ``peak_bytes`` (None if unknown), ``out``, and for each
        of ``layers``: ``n_experts``, ``unused`` (never fired), the others' ``median_frequency``, and how many fire on
        ``above_1_percent`` of the tokens.

    Raises:
        NotConvertedError: the folder is not one of ours.
        OutputError: there is a catalogue already, or an unfinished one with other settings, or it cannot be written.
        DataError: the text cannot be read, or lacks the label.
        MemoryBudgetError: what is kept does not fit.
        Interrupted: Ctrl-C; the same command goes on where it stopped.
    """
    reporter = reporter or Reporter()
    converted, recipe = load_with_recipe(folder, device)
    text, column = data or recipe.eval_data or recipe.data, text_column or recipe.text_column
    settings = _Settings(
        fingerprint=fingerprint(converted),
        source=Source(text, tokens, column, label_column, spread, seed),
        layers=layers_with_experts(converted, layers),
        top=top,
        sample=sample,
    )
    out = Path(out) if out is not None else Path(folder) / Path(MAXIMUM_FILE).parent
    partial = _begin(out, settings, overwrite)
    packing = Packing(converted.tokenizer(), recipe.context, recipe.prepend_bos)
    try:
        corpus = read_corpus(partial, settings.source, packing, reporter)
        tallies = _tallies(converted, settings, len(corpus.names))
        memory, start = PeakMemory(converted.model.device.type), time.monotonic()
        with reporter.progress("experts", "tokens") as line:
            _run(converted, tallies, corpus, settings, partial, line)
        seconds = time.monotonic() - start
        with reporter.progress("write", "experts") as line:
            write_tables(partial, converted, tallies, corpus.tokens, line)
        write_json(partial / CATALOGUE_FILE, _catalogue(converted, settings, corpus))
        _finish(partial, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{str(partial)!r} cannot be written: {error}", fix="free some space; the same command then goes on"
        ) from None
    return _summary(corpus, tallies) | {"seconds": seconds, "peak_bytes": memory.bytes(), "out": str(out)}


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
    """The work in progress, without what only served to go on with it, takes its place."""
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    for name in (_STATE_FILE, CLASSES_FILE, _SETTINGS_FILE):
        (partial / name).unlink(missing_ok=True)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


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
    """Those of a selection that have experts; all must, unless the selection is ``all``.

    Raises:
        LayerSelectionError: one has none, or there is none.
    """
    there = [entry.block.layer for entry in converted.plan.layers if entry.n_experts]
    wanted = select_layers(layers, converted.model.config.get_text_config(decoder=True).num_hidden_layers)
    found = [layer for layer in there if layer in wanted]
    if not found or (layers != "all" and len(found) < len(wanted)):
        raise LayerSelectionError(
            f"{str(converted.folder)!r} has no experts in some of the layers {layers}",
            expected="layers among " + (", ".join(map(str, there)) or "none"),
        )
    return found


def _begin(out: Path, settings: _Settings, overwrite: bool) -> Path:
    """The folder beside ``out`` that work in progress is in, with its settings in it."""
    if out.exists() and not overwrite:
        raise OutputError(f"{str(out)!r} exists already", fix="give another --out, or --overwrite")
    if out.exists() and not (out / CATALOGUE_FILE).is_file():
        raise OutputError(f"{str(out)!r} was not written by mxdsurgery experts: --overwrite does not touch it")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        there = partial / _SETTINGS_FILE
        if there.is_file():
            earlier = json.loads(there.read_text(encoding="utf-8"))
            other = [key for key, value in asdict(settings).items() if earlier.get(key) != value]
            if other:
                raise OutputError(
                    f"{str(partial)!r} holds an unfinished run with another {', '.join(other)}",
                    expected=", ".join(f"{key} {earlier.get(key)}" for key in other),
                    fix="repeat the earlier command to finish it, or delete that folder",
                )
        else:
            write_json(there, asdict(settings))
    except (OSError, ValueError) as error:
        raise OutputError(f"{str(partial)!r} cannot be used: {error}", fix="give another --out") from None
    return partial


def _tallies(converted: Converted, settings: _Settings, classes: int) -> dict[int, Tally]:
    shapes = {layer: converted.layers[layer].experts.weight.shape for layer in settings.layers}
    needed = sum(Tally.bytes(*shape, classes, settings.top, settings.sample) for shape in shapes.values())
    free = free_memory("cpu")
    if needed > 0.9 * free:
        raise MemoryBudgetError(
            f"what is kept of {sum(n for n, _ in shapes.values()):,} experts takes {size(needed)}; {size(free)} are free",
            expected="room for it",
            fix="look at fewer --layers at a time (each run with an --out of its own), or keep fewer places: --top, --sample",
        )
    return {layer: Tally.none(*shape, classes, settings.top, settings.sample) for layer, shape in shapes.items()}


@torch.no_grad()
def _run(
    converted: Converted, tallies: dict[int, Tally], corpus: Corpus, settings: _Settings, partial: Path, line: ProgressLine
) -> None:
    """The pass over the text, from where an earlier one stopped."""
    done = saved = _restored(partial, tallies)
    rows, last, saving = max(1, _BATCH // corpus.ids.shape[1]), time.monotonic(), 0.0
    model = converted.model
    try:
        with recorded_coefficients(converted, settings.layers) as seen:
            while done < len(corpus.ids):
                batch = corpus.ids[done : done + rows].long()
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
                draw = torch.Generator().manual_seed(settings.source.seed * 2**32 + done)
                for layer, tally in tallies.items():
                    a, m = seen.pop(layer)
                    shape = (*batch.shape, -1)
                    a = Coefficients(a.values.reshape(shape).cpu(), a.indices.reshape(shape).cpu())
                    m = None if m is None else m.reshape(shape).cpu()
                    tally.add(a, m, corpus.classes[done : done + rows].long(), done, draw)
                done += len(batch)
                line.update(done * batch.shape[1], corpus.ids.numel())
                start = time.monotonic()
                if start - last > max(_SAVE_EVERY, 20 * saving) and done < len(corpus.ids):
                    _save(partial, tallies, done)
                    saved, last = done, time.monotonic()
                    saving = last - start
    except KeyboardInterrupt:
        kept = f"{saved} of {len(corpus.ids)} contexts are kept in {partial}"
        raise Interrupted(f"Interrupted: {kept}; the same command goes on from there.") from None


def _save(partial: Path, tallies: dict[int, Tally], done: int) -> None:
    """Everything that is kept so far, written aside and renamed."""
    state = {f"{layer}.{name}": tensor for layer, tally in tallies.items() for name, tensor in tally.state().items()}
    aside = partial / f"{_STATE_FILE}.tmp"
    save_file(state, aside, metadata={"done": str(done)})
    os.replace(aside, partial / _STATE_FILE)


def _restored(partial: Path, tallies: dict[int, Tally]) -> int:
    """Takes back what was kept; returns how many contexts it covers."""
    path = partial / _STATE_FILE
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            done = int(file.metadata()["done"])
            for layer, tally in tallies.items():
                tally.restore({name: file.get_tensor(f"{layer}.{name}") for name in tally.state()})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OutputError(f"{str(path)!r} cannot be read: {error}", fix=f"delete {str(partial)!r} and begin anew") from None
    return done


@contextlib.contextmanager
def recorded_coefficients(converted: Converted, layers: list[int]) -> Iterator[dict[int, tuple[Coefficients, Tensor | None]]]:
    """While open, every forward pass leaves in the mapping that is yielded, by layer, the experts' coefficients (..., K) and
    what their say is multiplied with, ``D z`` (..., D) of a Mixture of Decoders, None of other kinds."""
    seen: dict[int, tuple[Coefficients, Tensor | None]] = {}
    chosen: dict[int, Coefficients] = {}
    handles = []
    for layer in layers:
        module = converted.layers[layer]

        def keep(_module: Any, _args: Any, a: Coefficients, layer: int = layer) -> None:
            chosen[layer] = a
            seen[layer] = (a, None)

        def keep_decoded(_module: Any, _args: Any, m: Tensor, layer: int = layer) -> None:
            seen[layer] = (chosen[layer], m)

        handles.append(module.gate.register_forward_hook(keep))
        if isinstance(module, MxDLayer):
            handles.append(module.decoder.register_forward_hook(keep_decoded))
    with hooked(*handles):
        yield seen
