"""Feeds mxdsurgery what others might: recipes, edits, texts, configs and weights that are anything but as they should be.

    python scripts/fuzz.py --minutes 5

Any input has to end in success or in a named error, soon and in little memory: never in another exception. What is fed is made
by hypothesis; tests/test_fuzz.py runs the same with few examples. Prints how many inputs of each kind were tried, what came of
them, the slowest one and the minutes.
"""

import itertools
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
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import mxdsurgery
from mxdsurgery.adapter import ADAPTER_FILE, read_adapter
from mxdsurgery.analyze import analyze
from mxdsurgery.apply import make_adapter
from mxdsurgery.checkpoint import PLAN_FILE, RECIPE_FILE, Converted, load, load_with_recipe
from mxdsurgery.edits import check_for, edits_from_flags, read_edits
from mxdsurgery.errors import MxDError
from mxdsurgery.model import load_tokenizer
from mxdsurgery.outside import INDEX_FILE, stored_shapes
from mxdsurgery.recipe import RECIPE_KEYS, Key, Recipe, load_recipe
from mxdsurgery.selection import select_layers
from mxdsurgery.text import Packing, documents

# No input may take longer than this, on a slow machine with others at work on it.
SLOWEST = 20.0
# Address space that the script may take: what asks for more fails, and is seen.
_MOST_BYTES = 16 * 2**30

OPTIONS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}

# What is fed

_NUMBERS = st.sampled_from([-(10**12), -1, 0, 1, 2, 3, 63, 2**31, 2**40, 10**12, 2**60, 2**63, 10**30, 10**400])
_NAMES = ["../../etc/passwd", "/etc/passwd", "..", "", ".", "C:\\x", "a\0b", "\ud800", "x" * 5000, "mlp", "*a", "&a"]
_SECRETS = ["hf_" + "a1" * 20, "https://me:word@host/x"]
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    st.integers(-10, 300),
    st.floats(),
    st.sampled_from(_NAMES + _SECRETS),
    st.sampled_from(["auto", "gelu", "silu", "float32", "cuda", "all", "1k", "1e400", ".nan", "evil.Evil", "org/kernel"]),
    st.text(max_size=20),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 3), inner, max_size=4),
    max_leaves=8,
)
_DEEP = st.builds(lambda depth, left: left * depth + "]" * depth, st.integers(1, 3000), st.sampled_from("[{"))
_LAUGHS = ["a: &a [1, 1]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi"))]
TRICKS = ["\n".join(_LAUGHS), "!!python/object/apply:os.system [echo]", "<<: *a", "k: 0x" + "f" * 5000, "k: " + "1:" * 9000]
_TEXTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("{}[]:,-&*!|>'\"#%@?\n\t 0123456789abcxelk.~", max_size=200).map(str.encode),
    _DEEP.map(str.encode),
    st.sampled_from(TRICKS).map(str.encode),
)


def _written(values: Any) -> bytes:
    """As YAML; what YAML cannot write is left as Python writes it."""
    try:
        return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return ascii(values)[:10_000].encode()


def _allowed(key: Key) -> st.SearchStrategy:
    """Values that a recipe key may have."""
    if key.choices:
        return st.sampled_from(key.choices)
    low = key.low or 0
    counts = st.integers(int(low), int(key.high or low + 50)) | st.integers(int(low), int(key.high or 10**18 - 1))
    return {
        "count": counts,
        "number": st.floats(low, min(key.high or 1e17, low + 0.3)) | st.floats(low, key.high or 1e17),
        "text": st.sampled_from(["stdlib", "0", "1-1", "all"]),
        "flag": st.booleans(),
    }[key.kind]


_RECIPES = st.dictionaries(st.sampled_from([*RECIPE_KEYS, "match", "n_expert"]) | st.text(max_size=9), _VALUES, max_size=5)
_GOOD_RECIPES = st.fixed_dictionaries({}, optional={name: _allowed(key) for name, key in RECIPE_KEYS.items()})
_NEARLY_GOOD_RECIPES = st.builds(lambda good, other: good | other, _GOOD_RECIPES, _RECIPES)
_PLANNED = st.fixed_dictionaries(
    {"data": st.just("stdlib"), "layers": st.sampled_from(["all", "0", "1"])},
    optional={
        name: _allowed(key)
        for name, key in RECIPE_KEYS.items()
        if (key.kind in ("count", "number") or key.choices) and name != "threads"  # which would stay for all that follow
    },
)
_SELECTIONS = st.text("0123456789,- al", max_size=30) | st.text(max_size=20) | _DEEP | st.just("0-" + "9" * 5000)
_EXPERTS = st.integers(0, 15) | st.integers(0, 15) | st.integers(0, 15) | _NUMBERS
_OF_EXPERTS = st.one_of(
    st.lists(_EXPERTS, max_size=4),
    st.lists(st.lists(_EXPERTS, max_size=4), max_size=3),
    st.dictionaries(_EXPERTS, st.floats() | _EXPERTS | st.lists(st.floats(), max_size=40), max_size=3),
    _VALUES,
)
_KINDS = st.sampled_from(["ablate", "drop", "scale", "steer", "replace", "copy", "merge", "clamp", "zork"])
_EDITS = st.fixed_dictionaries(
    {"layers": st.dictionaries(_EXPERTS | st.text(max_size=3), st.dictionaries(_KINDS, _OF_EXPERTS, max_size=3), max_size=3)},
    optional={"model": _LEAVES},
)
_FEW = st.lists(st.integers(0, 15), min_size=1, max_size=3)


def _of_few(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(st.integers(0, 15), values, min_size=1, max_size=2)


_GOOD_EDITS = st.fixed_dictionaries(
    {},
    optional={
        **{kind: _FEW for kind in ("ablate", "drop")},
        **{kind: _of_few(st.floats(-10, 10)) for kind in ("scale", "steer", "clamp")},
        "copy": _of_few(st.integers(0, 15)),
        "merge": st.lists(_FEW, max_size=2),
        "replace": _of_few(st.lists(st.floats(-9, 9), min_size=32, max_size=32)),
    },
).map(lambda layer: {"layers": {1: layer}})
_FLAGS = st.dictionaries(
    st.sampled_from(["ablate", "drop", "scale", "steer", "clamp"]),
    st.text("0123456789:=,.-e ", max_size=20)
    | st.from_regex(r"[01]:[0-9]{1,2}(=-?[0-9.]{1,4})?", fullmatch=True)
    | _SELECTIONS,
    max_size=3,
)
_ROWS = st.fixed_dictionaries({}, optional={"text": st.text(max_size=80) | _VALUES, "other": _VALUES})
_JSON_LINES = st.lists(_ROWS.map(lambda row: _json(row)) | _TEXTS, max_size=6).map(b"\n".join)

# A change of JSON: where (a path of choices among keys), what is done there, and with what.
_CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from(["set", "set", "cut", "add"]), _VALUES),
    min_size=1,
    max_size=3,
)
_HEADERS = st.one_of(
    st.tuples(st.just("json"), _CHANGES),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 2**20, 10**8, 10**9, 2**40, 2**60, 2**63, 2**64 - 1])),
    st.tuples(st.just("bytes"), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8)),
    st.tuples(st.just("cut"), st.integers(0, 6000)),
)
_ADDED = ["k", "quantization_config", "auto_map", "attn_implementation", "transformers_weights", "rope_scaling", "to_dict"]


def _json(values: Any) -> bytes:
    try:
        return json.dumps(values).encode()
    except (ValueError, TypeError):  # keys of two kinds, numbers of thousands of digits
        return ascii(values)[:10_000].encode()


def changed(values: Any, changes: list[tuple[list[int], str, Any]]) -> Any:
    """A copy of what a JSON file holds, with entries set to something else, cut out or added."""
    values = json.loads(json.dumps(values))
    for path, what, new in changes:
        holder, key = None, None
        inner = values
        for choice in path:
            if not isinstance(inner, dict | list) or not inner:
                break
            holder = inner
            key = list(inner)[choice % len(inner)] if isinstance(inner, dict) else choice % len(inner)
            inner = inner[key]
        if holder is None:
            continue
        if what == "cut":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[_ADDED[path[0] % len(_ADDED)]] = new
        else:
            holder[key] = new
    return values


# What it is fed to


class Place:
    """Folders to read and to spoil: a tiny base model, the same converted, and as an adapter.

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
        (self.sharded / INDEX_FILE).write_bytes(_json(index))
        self.converted: Converted = load(self.whole)
        self.packing = Packing(self.converted.tokenizer(), 16)

    def spoilt(self, folder: Path, name: str, content: bytes) -> Path:
        """A folder like another, but for one file. It is gone with the next one."""
        other = self.folder / "spoilt"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other, copy_function=os.link)  # they are only read
        (other / name).unlink()
        (other / name).write_bytes(content)
        return other

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
    mxdsurgery.plan(str(place.base), recipe=place.written(".yaml", _written(values)))


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
        given = json.loads((place.whole / name).read_text(encoding="utf-8"))
        load(place.spoilt(place.whole, name, _json(changed(given, changes)))).tokenizer()

    return run


def _index(place: Place, changes: list) -> None:
    given = json.loads((place.sharded / INDEX_FILE).read_text(encoding="utf-8"))
    load(place.spoilt(place.sharded, INDEX_FILE, _json(changed(given, changes))))


def _saved_recipe(place: Place, values: dict) -> None:
    load_with_recipe(place.spoilt(place.whole, RECIPE_FILE, _written(values)))


def _header(place: Place, spoiling: tuple[str, Any]) -> None:
    what, how = spoiling
    whole = (place.whole / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if what == "json":
        header = _json(changed(json.loads(whole[8 : 8 + length]), how))
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
    given = json.loads((place.adapter / ADAPTER_FILE).read_text(encoding="utf-8"))
    folder = place.spoilt(place.adapter, ADAPTER_FILE, _json(changed(given, changes)))
    read_adapter(folder)
    load(folder, base=str(place.base))


def _base_config(place: Place, changes: list) -> None:
    given = json.loads((place.base / "config.json").read_text(encoding="utf-8"))
    analyze(str(place.spoilt(place.base, "config.json", _json(changed(given, changes)))))


@dataclass
class Kind:
    """A kind of input: what is fed, to what, and what came of it so far.

    Attributes:
        strategy: hypothesis'.
        run: is given the place and the input.
        outcomes: how often each; ``read`` where nothing was wrong.
        slowest: seconds of the slowest.
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
            str(error).encode()  # it has to be shown
            self.outcomes[type(error).__name__] += 1
        took = time.perf_counter() - start
        self.slowest = max(self.slowest, took)
        assert took < SLOWEST, f"{took:.0f} seconds"


KINDS = {
    "recipe, any text": Kind(_TEXTS, _recipe),
    "recipe, keys and values": Kind((_RECIPES | _GOOD_RECIPES | _NEARLY_GOOD_RECIPES).map(_written), _recipe),
    "recipe, planned": Kind(_PLANNED, _plan),
    "layers": Kind(_SELECTIONS, _layers),
    "edit file, any text": Kind(_TEXTS, _edit_file),
    "edit file": Kind((_EDITS | _GOOD_EDITS).map(_written), _edit_file),
    "edit flags": Kind(_FLAGS, _edit_flags),
    "jsonl": Kind(_JSON_LINES, _json_lines),
    "txt": Kind(_TEXTS, _plain_text),
    "config.json": Kind(_CHANGES, _file_of_the_converted("config.json")),
    "plan.json": Kind(_CHANGES, _file_of_the_converted(PLAN_FILE)),
    "generation_config.json": Kind(_CHANGES, _file_of_the_converted("generation_config.json")),
    "tokenizer_config.json": Kind(_CHANGES, _file_of_the_converted("tokenizer_config.json")),
    "tokenizer.json": Kind(_CHANGES, _file_of_the_converted("tokenizer.json")),
    "recipe.yaml of a model": Kind(_NEARLY_GOOD_RECIPES, _saved_recipe),
    "safetensors header": Kind(_HEADERS, _header),
    "index of weights": Kind(_CHANGES, _index),
    "adapter's json": Kind(_CHANGES, _adapter),
    "base model's config.json": Kind(_CHANGES, _base_config),
}


def fuzz(place: Place, kind: Kind, examples: int, number: int | None = None) -> None:
    """Feeds so many inputs of a kind; without a ``number``, always the same ones.

    Raises:
        Exception: the first that is no named error, with the smallest input that leads to it.
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
