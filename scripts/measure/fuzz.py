"""Feeds mxdsurgery what others might send: arbitrary and damaged recipes, edits, texts, configs and weights.

    python scripts/measure/fuzz.py --minutes 5

Any input has to end in success or in a named error, soon and in little memory: never in another exception. Hypothesis makes
the inputs; tests/test_fuzz.py runs the same with few examples. Prints how many inputs of each kind were tried, what came of
them, the slowest one and the minutes.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import click
import fuzz_inputs as inputs
import torch
import transformers
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import mxdsurgery
from mxdsurgery.base.analyze import analyze
from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.base.selection import select_layers
from mxdsurgery.checkpoint.adapter import ADAPTER_FILE, read_adapter
from mxdsurgery.checkpoint.apply import make_adapter
from mxdsurgery.checkpoint.converted import PLAN_FILE, RECIPE_FILE, Converted, load, load_with_recipe
from mxdsurgery.editing.edits import check_for, edits_from_flags, read_edits
from mxdsurgery.errors import MxDError
from mxdsurgery.outside import INDEX_FILE, stored_shapes
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.text.sources import Packing, documents

# No input may take longer than so many seconds, on a slow machine with other work.
SLOWEST = 20.0
# Address space that the script may take: an input that needs more fails, and is noticed.
_MOST_BYTES = 16 * 2**30

OPTIONS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}


class Place:
    """Folders to read and to spoil: a tiny base model, its conversion, and that as an adapter.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "file"
        self.base, self.whole, self.adapter = (folder / name for name in ("base", "whole", "adapter"))
        tokenizer = load_tokenizer("demo-glu")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        few = {"tokens": 1024, "eval_tokens": 256, "batch": 256, "context": 16, "n_experts": 16, "k": 4, "shuffle": 0}
        mxdsurgery.convert(str(self.base), data="stdlib", device="cpu", out=str(self.whole), **few)
        make_adapter(self.whole, out=self.adapter)
        self.sharded = shutil.copytree(self.whole, folder / "sharded")
        shard = "model-00001-of-00001.safetensors"
        (self.sharded / "model.safetensors").rename(self.sharded / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(stored_shapes(self.whole), shard)}
        (self.sharded / INDEX_FILE).write_bytes(inputs.as_json(index))
        self.converted: Converted = load(self.whole)
        self.packing = Packing(self.converted.tokenizer(), 16)

    def spoilt(self, folder: Path, name: str, content: bytes) -> Path:
        """A copy of a folder with another content of one file. The next call removes it."""
        other = self.folder / "spoilt"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other, copy_function=os.link)  # they are only read
        (other / name).unlink()
        (other / name).write_bytes(content)
        return other

    def changed(self, folder: Path, name: str, changes: list) -> Path:
        """The same, for JSON with changes in it."""
        given = json.loads((folder / name).read_text(encoding="utf-8"))
        return self.spoilt(folder, name, inputs.as_json(inputs.changed(given, changes)))

    def written(self, suffix: str, content: bytes) -> Path:
        """A file of its own."""
        path = self.file.with_suffix(suffix)
        path.write_bytes(content)
        return path


def _recipe(place: Place, content: bytes) -> None:
    path = place.written(".yaml", content)
    recipe = Recipe(**load_recipe(path))
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe(**load_recipe(path)) == recipe


def _plan(place: Place, values: dict) -> None:
    mxdsurgery.plan(str(place.base), recipe=place.written(".yaml", inputs.as_yaml(values)))


def _layers(place: Place, text: str) -> None:
    chosen = select_layers(text, 12)
    assert chosen == sorted(set(chosen)) and all(0 <= layer < 12 for layer in chosen)


def _edit_file(place: Place, content: bytes) -> None:
    edits = read_edits(place.written(".yaml", content))
    check_for(edits, place.converted)
    edits.words()
    assert read_edits(place.written(".yaml", edits.to_yaml().encode())) == edits


def _edit_flags(place: Place, flags: dict) -> None:
    check_for(edits_from_flags(**flags), place.converted)


def _json_lines(place: Place, content: bytes) -> None:
    for context in place.packing.pack(documents(str(place.written(".jsonl", content)))):
        assert context.shape == (16,)


def _plain_text(place: Place, content: bytes) -> None:
    for context in place.packing.pack(documents(str(place.written(".txt", content)))):
        assert context.shape == (16,)


def _file_of_the_converted(name: str) -> Callable[[Place, Any], None]:
    def run(place: Place, changes: list) -> None:
        load(place.changed(place.whole, name, changes)).tokenizer()

    return run


def _index(place: Place, changes: list) -> None:
    load(place.changed(place.sharded, INDEX_FILE, changes))


def _saved_recipe(place: Place, values: dict) -> None:
    load_with_recipe(place.spoilt(place.whole, RECIPE_FILE, inputs.as_yaml(values)))


def _header(place: Place, spoiling: tuple[str, Any]) -> None:
    what, how = spoiling
    whole = (place.whole / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if what == "json":
        header = inputs.as_json(inputs.changed(json.loads(whole[8 : 8 + length]), how))
        content = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    elif what == "length":
        content = how.to_bytes(8, "little") + whole[8:]
    elif what == "cut":
        content = whole[:how]
    else:
        content = bytearray(whole)
        for position, value in how:
            content[position] = value
    load(place.spoilt(place.whole, "model.safetensors", bytes(content)))


def _adapter(place: Place, changes: list) -> None:
    folder = place.changed(place.adapter, ADAPTER_FILE, changes)
    read_adapter(folder)
    load(folder, base=str(place.base))


def _base_config(place: Place, changes: list) -> None:
    analyze(str(place.changed(place.base, "config.json", changes)))


@dataclass
class Kind:
    """A kind of input: how it is made, what it is fed to, and the results so far.

    Attributes:
        strategy: hypothesis' strategy for the inputs.
        run: called with the place and the input.
        outcomes: counts by outcome; ``read`` where nothing was wrong.
        slowest: seconds of the slowest input.
    """

    strategy: st.SearchStrategy
    run: Callable[[Place, Any], None]
    outcomes: Counter = field(default_factory=Counter)
    slowest: float = 0.0

    def feed(self, place: Place, value: Any) -> None:
        """Runs one input; whatever is not a named error passes through."""
        start = time.perf_counter()
        try:
            self.run(place, value)
            self.outcomes["read"] += 1
        except MxDError as error:
            str(error).encode()  # the message must be printable
            self.outcomes[type(error).__name__] += 1
        took = time.perf_counter() - start
        self.slowest = max(self.slowest, took)
        assert took < SLOWEST, f"{took:.0f} seconds"


KINDS = {
    "recipe, any text": Kind(inputs.TEXTS, _recipe),
    "recipe, keys and values": Kind(inputs.RECIPES, _recipe),
    "recipe, planned": Kind(inputs.PLANNED, _plan),
    "layers": Kind(inputs.SELECTIONS, _layers),
    "edit file, any text": Kind(inputs.TEXTS, _edit_file),
    "edit file": Kind(inputs.EDITS, _edit_file),
    "edit flags": Kind(inputs.FLAGS, _edit_flags),
    "jsonl": Kind(inputs.JSON_LINES, _json_lines),
    "txt": Kind(inputs.TEXTS, _plain_text),
    "config.json": Kind(inputs.CHANGES, _file_of_the_converted("config.json")),
    "plan.json": Kind(inputs.CHANGES, _file_of_the_converted(PLAN_FILE)),
    "generation_config.json": Kind(inputs.CHANGES, _file_of_the_converted("generation_config.json")),
    "tokenizer_config.json": Kind(inputs.CHANGES, _file_of_the_converted("tokenizer_config.json")),
    "tokenizer.json": Kind(inputs.CHANGES, _file_of_the_converted("tokenizer.json")),
    "recipe.yaml of a model": Kind(inputs.NEARLY_GOOD_RECIPES, _saved_recipe),
    "safetensors header": Kind(inputs.HEADERS, _header),
    "index of weights": Kind(inputs.CHANGES, _index),
    "adapter's json": Kind(inputs.CHANGES, _adapter),
    "base model's config.json": Kind(inputs.CHANGES, _base_config),
}


def fuzz(place: Place, kind: Kind, examples: int, number: int | None = None) -> None:
    """Feeds so many inputs of a kind; without a ``number``, always the same ones.

    Raises:
        Exception: the first one that is not a named error, with the smallest input that leads to it.
    """

    @given(kind.strategy)
    @settings(max_examples=examples, derandomize=number is None, **OPTIONS)
    def feed(value: Any) -> None:
        kind.feed(place, value)

    (feed if number is None else seed(number)(feed))()


def quiet() -> None:
    """Keeps the libraries from commenting on every input."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@click.command()
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Of feeding, all kinds together.")
@click.option("--kind", "names", multiple=True, type=click.Choice(list(KINDS)), help="Only this one; may stand several times.")
@click.option("--seed", "first", type=int, default=0, show_default=True, help="Of the first round.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(minutes: float, names: tuple[str, ...], first: int, as_json: bool) -> None:
    """Feeds inputs of all kinds in turn until the time is over; ends with 1 at the first that is no named error."""
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    kinds = {name: KINDS[name] for name in names or KINDS}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        start, number = time.monotonic(), first
        while time.monotonic() - start < 60 * minutes:
            for name, kind in kinds.items():
                try:
                    fuzz(place, kind, 50, number)
                except Exception:
                    click.echo(f"not a named error: {name}, --seed {number}", err=True)
                    raise
            number += 1
        took = (time.monotonic() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    total = sum(kind.outcomes.total() for kind in kinds.values())
    if as_json:
        rows = {name: {"outcomes": kind.outcomes, "slowest": kind.slowest} for name, kind in kinds.items()}
        click.echo(json.dumps({"inputs": total, "minutes": took, "peak_mib": peak, "kinds": rows}))
        return
    table = Table("kind", "inputs", "read", "refused by name", "slowest", title=f"{total:,} inputs in {took:.1f} minutes")
    for name, kind in kinds.items():
        refused = ", ".join(f"{count:,} {what}" for what, count in kind.outcomes.most_common() if what != "read")
        table.add_row(name, f"{kind.outcomes.total():,}", f"{kind.outcomes['read']:,}", refused, f"{kind.slowest:.2f} s")
    Console(width=160).print(table, f"Every one was read or refused by name. {peak:,} MiB at the peak.")


if __name__ == "__main__":
    sys.exit(main())
