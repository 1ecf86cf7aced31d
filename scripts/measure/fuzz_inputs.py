"""What scripts/measure/fuzz.py feeds: hypothesis' strategies for recipes, edits, texts and what is changed in files."""

import itertools
import json
from typing import Any

import yaml
from hypothesis import strategies as st

from mxdsurgery.recipe import RECIPE_KEYS, Key

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
TEXTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("{}[]:,-&*!|>'\"#%@?\n\t 0123456789abcxelk.~", max_size=200).map(str.encode),
    _DEEP.map(str.encode),
    st.sampled_from(TRICKS).map(str.encode),
)


def as_yaml(values: Any) -> bytes:
    """The values as YAML; what YAML cannot write, as Python writes it."""
    try:
        return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return ascii(values)[:10_000].encode()


def as_json(values: Any) -> bytes:
    try:
        return json.dumps(values).encode()
    except (ValueError, TypeError):  # keys of two kinds, numbers of thousands of digits
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
        "layers": st.sampled_from(["0", "1-1", "all", [0, 1]]),
        "flag": st.booleans(),
    }[key.kind]


_RECIPES = st.dictionaries(st.sampled_from([*RECIPE_KEYS, "match", "n_expert"]) | st.text(max_size=9), _VALUES, max_size=5)
_GOOD_RECIPES = st.fixed_dictionaries({}, optional={name: _allowed(key) for name, key in RECIPE_KEYS.items()})
NEARLY_GOOD_RECIPES = st.builds(lambda good, other: good | other, _GOOD_RECIPES, _RECIPES)
RECIPES = (_RECIPES | _GOOD_RECIPES | NEARLY_GOOD_RECIPES).map(as_yaml)
PLANNED = st.fixed_dictionaries(
    {"data": st.just("stdlib"), "layers": st.sampled_from(["all", "0", "1"])},
    optional={
        name: _allowed(key)
        for name, key in RECIPE_KEYS.items()
        if (key.kind in ("count", "number") or key.choices) and name != "threads"  # which would stay for all that follow
    },
)
SELECTIONS = st.text("0123456789,- al", max_size=30) | st.text(max_size=20) | _DEEP | st.just("0-" + "9" * 5000)
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
EDITS = (_EDITS | _GOOD_EDITS).map(as_yaml)
FLAGS = st.dictionaries(
    st.sampled_from(["ablate", "drop", "scale", "steer", "clamp"]),
    st.text("0123456789:=,.-e ", max_size=20)
    | st.from_regex(r"[01]:[0-9]{1,2}(=-?[0-9.]{1,4})?", fullmatch=True)
    | SELECTIONS,
    max_size=3,
)
_ROWS = st.fixed_dictionaries({}, optional={"text": st.text(max_size=80) | _VALUES, "other": _VALUES})
JSON_LINES = st.lists(_ROWS.map(as_json) | TEXTS, max_size=6).map(b"\n".join)

# A change of JSON: where (a path of choices among keys), what is done there, and with what.
CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from(["set", "set", "cut", "add"]), _VALUES),
    min_size=1,
    max_size=3,
)
HEADERS = st.one_of(
    st.tuples(st.just("json"), CHANGES),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 2**20, 10**8, 10**9, 2**40, 2**60, 2**63, 2**64 - 1])),
    st.tuples(st.just("bytes"), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8)),
    st.tuples(st.just("cut"), st.integers(0, 6000)),
)
_ADDED = ["k", "quantization_config", "auto_map", "attn_implementation", "transformers_weights", "rope_scaling", "to_dict"]


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
