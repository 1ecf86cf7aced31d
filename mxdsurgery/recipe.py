"""Recipes: everything that a conversion depends on, in one strict YAML file.

Each key is a field of `Recipe`, a flag of the commands (``n_experts`` is ``--n-experts``) and a keyword of the Python
functions. Flags override the recipe's file, the file overrides the defaults; the result is saved with the model.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import RecipeError, first_line
from mxdsurgery.keys import Key
from mxdsurgery.outside import read_yaml, shown

_PACKAGE = Path(__file__).parent
# Inside the package in an installed wheel; at the top of the repository in a checkout.
RECIPES_FOLDER = next(path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if path.is_dir())

# What the experts are to carry, and the fixed weight of the penalty on frozen experts where no share can be asked for.
EXPERT_SHARE = 0.5
SPECIALISE = 0.003
# Tokens of a step if nothing else is said: at least, at most.
_BATCHES = (256, 4096)
# Unless k_start says otherwise, K starts at most at this, or at k where that is more: early steps would cost too much.
_MOST_K_START = 256


def _key(default: Any, kind: str, doc: str, **rules: Any) -> Any:
    return field(default=default, metadata={"key": Key(kind, doc, optional=default is None, **rules)})


@dataclass(frozen=True)
class Recipe:
    """What to convert, into what, on which text and how. See each key's line."""

    # What
    model: str | None = _key(None, "text", "hub id or local folder of the base model, or demo-glu, demo-mlp")
    revision: str | None = _key(None, "text", "the base model's revision on the hub")
    trust_remote_code: bool = _key(
        False,
        "flag",
        "run the Python code that comes with the base model and its tokenizer, where they need it; never set by a file",
    )
    layers: str = _key("all", "layers", "layers to convert: all, 3, 2-5, 0,4,7-9, -1")
    # Into what
    kind: str = _key(
        "mxd",
        "text",
        "what stands in a block's place: a Mixture of Decoders, or one of the layers to compare it with",
        choices=("mxd", "transcoder", "skip-transcoder", "topk-sae", "molt", "dense"),
    )
    init: str | None = _key(
        None,
        "text",
        "start of training: the whole block, as a shared expert; the block's encoder; the paper's random one; or the whole "
        "block, by experts that are all alike; default: shared where a share is asked for, else encoder",
        choices=("shared", "encoder", "random", "pretrained"),
    )
    sparsity: str = _key(
        "topk",
        "text",
        "which experts are active: each token's K; a batch's K per token on average, by a threshold after training; or those "
        "above a threshold of their own, which is learned such that it is K on average",
        choices=("topk", "batchtopk", "jumprelu"),
    )
    k: int = _key(32, "count", "K, experts active per token", low=1)
    k_start: int | None = _key(
        None,
        "count",
        "K at the first step, from where it falls to k; default: 8 k, but at most 256",
        low=1,
    )
    n_experts: int | None = _key(None, "count", "N, experts per layer; default: matched through expansion", low=1)
    expansion: float = _key(32.0, "number", "match N to a transcoder of this many times D features", low=0.01)
    unit_norm: bool = _key(False, "flag", "keep the experts' rows (C) at unit length")
    expert_share: float | None = _key(
        None,
        "number",
        "share of a block's worth that the experts of a Mixture of Decoders are trained to carry, in each layer; 0: as it "
        f"comes; default: {EXPERT_SHARE:g}, but none where specialise is given, or with inputs: joint, or init: pretrained",
        low=0.0,
        high=0.95,
    )
    specialise: float | None = _key(
        None,
        "number",
        "instead of a share: fixed weight of the penalty on what a Mixture of Decoders could do with frozen experts; more: "
        f"experts carry more; default: 0, or {SPECIALISE:g} with inputs: joint, or init: pretrained",
        low=0.0,
        high=10.0,
    )
    auxk: float = _key(0.0, "number", "weight of the loss that revives dead experts", low=0.0, high=10.0)
    # From what
    inputs: str = _key(
        "original",
        "text",
        "what a layer learns on: the original model's inputs, each layer for itself; those that the converted layers below it "
        "give, block after block; or joint: all layers together, end to end, toward the original's predictions",
        choices=("original", "converted", "joint"),
    )
    target: str = _key(
        "stream",
        "text",
        "what a layer learns with inputs: converted: what brings the decoder layer's output to the original model's; the "
        "block's output in the original model; or that on its own input",
        choices=("stream", "original", "own"),
    )
    kept_tokens: int | None = _key(
        None,
        "count",
        "with inputs: converted, tokens whose hidden states are kept from block to block and trained on again and again; "
        "default: tokens",
        low=8,
    )
    offload: str = _key(
        "auto",
        "text",
        "with inputs: converted, where the base model's weights are but for the block at work; auto: on disk if it has to be",
        choices=("auto", "none", "disk"),
    )
    # On which text
    data: str | None = _key(None, "text", "training text: a file, folder or pattern of files, hub dataset, or stdlib")
    eval_data: str | None = _key(None, "text", "held-out text; default: the first eval_tokens of data, not trained on")
    text_column: str = _key("text", "text", "the column or field that holds the text; dotted inside others: doc.text")
    context: int = _key(128, "count", "tokens per packed context", low=8)
    prepend_bos: bool | None = _key(None, "flag", "begin each context with BOS; default: if the tokenizer does")
    tokens: int = _key(2_000_000, "count", "training tokens", low=1)
    eval_tokens: int = _key(100_000, "count", "held-out tokens that the figures rest on", low=1)
    eval_tokens_single: int | None = _key(
        None,
        "count",
        "held-out tokens that each layer alone is measured on, spread evenly over the text; default: as many as keep "
        "evaluation within a fifth of the training time",
        low=1,
    )
    shuffle: int = _key(8_000_000, "count", "tokens in the buffer that contexts are drawn from at random; 0: in order", low=0)
    activation_buffer: int = _key(
        0, "count", "positions in the buffer of activations that batches are drawn from at random; 0: as the text comes", low=0
    )
    cache_activations: str | None = _key(
        None,
        "text",
        "folder in which the activations that layers learn on are kept, so that other trainings on the same text and batches "
        "need no pass of the base model; with inputs: original",
    )
    # How
    batch: int | None = _key(
        None,
        "count",
        f"tokens per optimiser step; default: by the tokens of the training, from {_BATCHES[0]} to {_BATCHES[1]}",
        low=8,
    )
    lr: float = _key(
        1e-3,
        "number",
        "peak learning rate of Adam; four times that with init: shared, and of all kinds to compare it with but dense",
        low=1e-8,
        high=1.0,
    )
    warmup: float = _key(0.05, "number", "share of the steps with linear warm-up", low=0.0, high=1.0)
    decay: float = _key(0.3, "number", "share of the steps with linear decay to zero at the end", low=0.0, high=1.0)
    moments: str = _key(
        "float32",
        "text",
        "dtype of Adam's two moments; bfloat16: rounded at random, so that a parameter in training takes 8 bytes, not 12",
        choices=("float32", "bfloat16"),
    )
    compute: str = _key(
        "auto",
        "text",
        "dtype that models compute in, whatever their weights are stored in; auto: as stored, or float32 where that is faster "
        "on this device, which is measured",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    precision: str = _key(
        "auto",
        "text",
        "compute of the layers in training; auto: as compute says, or else bf16 autocast where that is faster on this device",
        choices=("auto", "fp32", "bf16"),
    )
    selection: str = _key(
        "auto",
        "text",
        "precision in which all N experts are ranked, the best of them again in fp32; auto: as compute says, or else bf16 "
        "where that is faster on this device",
        choices=("auto", "fp32", "bf16"),
    )
    dtype: str = _key(
        "auto",
        "text",
        "dtype that the base model and the result are stored in; auto: the base checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _key(
        "auto",
        "text",
        "where to run; auto: what torch finds here beside the CPU, else the CPU",
        choices=("auto", "cpu", "cuda", "mps", "xpu"),
    )
    memory: float | None = _key(
        None,
        "number",
        "GiB that a conversion may take; layers that do not fit in it together take turns; default: 90% of what is free",
        low=0.001,
    )
    threads: int | None = _key(
        None, "count", "CPU threads to compute on; default: torch's own choice, most often one for each core", low=1, high=1024
    )
    parallel: str = _key(
        "data",
        "text",
        "what several processes (accelerate launch) share: the text, gradients averaged; or the layers, each process some",
        choices=("data", "layers"),
    )
    seed: int = _key(0, "count", "seed of every random choice", low=0, high=2**32 - 1)
    checkpoint_every: int | None = _key(
        None, "count", "steps between two checkpoints to --resume from; default: by checkpoint_minutes alone", low=1
    )
    checkpoint_minutes: float = _key(
        10.0, "number", "minutes between two checkpoints; more where writing them would take over 5 % of the time", low=0.0
    )
    keep_checkpoints: int = _key(2, "count", "checkpoints that stay until the result is written; 0: none is written", low=0)
    tracker: str = _key("none", "text", "where to log the training", choices=("none", "tensorboard", "wandb"))
    # Where to
    out: str | None = _key(None, "text", "folder to write; default: ./<model's name>-mxd")
    format: str = _key(
        "checkpoint",
        "text",
        "what is written: a whole checkpoint, or an adapter: only what differs from the base model",
        choices=("checkpoint", "adapter"),
    )
    overwrite: bool = _key(False, "flag", "replace the folder if it exists")

    def __post_init__(self) -> None:
        for name, key in RECIPE_KEYS.items():
            object.__setattr__(self, name, key.parse(name, getattr(self, name)))
        if self.batch is None:
            object.__setattr__(self, "batch", max(self.context, usual_batch(self.tokens)))
        if self.n_experts is not None and self.k > self.n_experts:
            raise RecipeError(
                f"recipe key 'k' is {self.k}, more than n_experts = {self.n_experts}",
                expected="k of at most n_experts",
                fix="lower --k, or raise --n-experts",
                keys=("k", "n_experts"),
            )
        if self.batch < self.context:
            raise RecipeError(
                f"recipe key 'batch' is {self.batch} tokens, less than one context of {self.context}",
                expected="at least one context per step",
                fix="raise --batch, or lower --context",
                keys=("batch", "context"),
            )
        if 0 < self.activation_buffer < 2 * self.batch:
            raise RecipeError(
                f"recipe key 'activation_buffer' is {self.activation_buffer}, less than two batches of {self.batch}",
                expected=f"0, or at least {2 * self.batch}: from less, nothing can be mixed across batches",
                fix="raise --activation-buffer, or lower --batch",
                keys=("activation_buffer", "batch"),
            )
        if self.offload == "disk" and self.inputs != "converted":
            raise RecipeError(
                f"recipe keys 'offload' and 'inputs' are 'disk' and {self.inputs!r}",
                expected="inputs: converted, where one decoder layer at a time is enough",
                fix="--inputs converted, or --offload auto",
                keys=("offload", "inputs"),
            )
        if self.cache_activations is not None and self.inputs != "original":
            raise RecipeError(
                f"recipe keys 'cache_activations' and 'inputs' are {self.cache_activations!r} and {self.inputs!r}",
                expected="inputs: original: what else layers learn on depends on other layers in training",
                fix="leave out --cache-activations, or train with --inputs original",
                keys=("cache_activations", "inputs"),
            )
        if self.expert_share and self.specialise is not None:
            raise RecipeError(
                f"recipe keys 'expert_share' and 'specialise' are {self.expert_share:g} and {self.specialise:g}",
                expected="one of them: a share to reach, or a fixed weight of the penalty",
                fix="leave out --specialise, or leave out --expert-share",
                keys=("expert_share", "specialise"),
            )
        if self.expert_share and self.inputs == "joint":
            raise RecipeError(
                f"recipe keys 'expert_share' and 'inputs' are {self.expert_share:g} and 'joint'",
                expected="inputs: original, or converted: end to end, no share is steered toward",
                fix="leave out --expert-share, or train with --inputs original, or --inputs converted",
                keys=("expert_share", "inputs"),
            )
        if self.auxk > 0 and self.inputs == "joint":
            raise RecipeError(
                f"recipe keys 'auxk' and 'inputs' are {self.auxk:g} and 'joint'",
                expected="auxk: 0, as nothing revives dead experts end to end",
                fix="leave out --auxk, or train with --inputs original, or --inputs converted",
                keys=("auxk", "inputs"),
            )
        if self.warmup + self.decay > 1.0:
            raise RecipeError(
                f"recipe keys 'warmup' and 'decay' are {self.warmup} and {self.decay}, together more than 1",
                expected="shares of the steps that do not overlap",
                fix="lower --warmup, or lower --decay",
                keys=("warmup", "decay"),
            )

    @property
    def start(self) -> str:
        """How layers start: ``init``, or what suits what is asked of the experts."""
        return self.init or ("encoder" if self.share_target is None else "shared")

    @property
    def share_target(self) -> float | None:
        """The `expert_share` that a Mixture of Decoders is trained to reach; None where it comes as it may."""
        if self.expert_share is not None:
            return self.expert_share or None
        steered = self.specialise is None and self.inputs != "joint" and self.init != "pretrained"
        return EXPERT_SHARE if steered else None

    @property
    def penalty(self) -> float:
        """The fixed weight of the penalty on what could be done with frozen experts; 0 where there is none."""
        if self.specialise is not None:
            return self.specialise
        return SPECIALISE if self.expert_share is None and self.share_target is None else 0.0

    @property
    def first_k(self) -> int:
        """K at the first step, at least k."""
        return self.first_k_of(self.k)

    def first_k_of(self, k: int) -> int:
        """K at the first step of a layer that ends with k, at least k."""
        return max(k, min(8 * k, _MOST_K_START) if self.k_start is None else self.k_start)

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, in order."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads back to the same values, except that it trusts no code."""
        return yaml.safe_dump(self.to_dict() | {"trust_remote_code": False}, sort_keys=False, allow_unicode=True)


RECIPE_KEYS: dict[str, Key] = {f.name: f.metadata["key"] for f in dataclasses.fields(Recipe)}
# The dtypes to compute in: auto is decided by measuring the device.
COMPUTE_KEYS = ("compute", "precision", "selection")
# When checkpoints are written: they change nothing of what is computed.
CHECKPOINT_KEYS = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")

# `match` says which base models a recipe file is meant for; it is the one entry of a file that is no key of the recipe.
_MATCH_KEYS = ("model_type", "d_model", "n_layers")
_MOST_BYTES = 2**20


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, its names checked."""
    try:
        content = read_yaml(path, _MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {first_line(error)}") from None
    except ValueError as error:
        raise RecipeError(f"the recipe {path} {first_line(error)}", expected="lines of the form 'key: value'") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {path} holds a {type(content).__name__}", expected="a mapping of keys to values")
    check_names(content, f"in {path}", extra=("match",))
    return content


def usual_batch(tokens: int) -> int:
    """Tokens per step of a training on so many: a power of two near a quarter of their root, within limits.

    With the same tokens, more and smaller steps lose less, and each of them takes time of its own: docs/controls.md.
    """
    least, most = _BATCHES
    return min(max(2 ** round(math.log2(max(1, tokens) ** 0.5 / 4)), least), most)


def check_names(values: Mapping[str, Any], where: str, extra: tuple[str, ...] = ()) -> None:
    """Raises RecipeError for the first name that is no recipe key."""
    for name in values:
        if name not in RECIPE_KEYS and name not in extra:
            raise RecipeError(
                f"unknown recipe key {shown(name)} {where}", expected="one of " + ", ".join((*RECIPE_KEYS, *extra))
            )


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The keys that a recipe file sets, each checked; the keys that it leaves out are not in the result.

    Args:
        path: a file, or the name of one in the recipes that come with mxdsurgery (``gpt2`` or ``gpt2.yaml``).

    Raises:
        RecipeError: no such file, not YAML, an unknown key, a wrong type or a value out of range.
    """
    file = Path(path)
    if not file.is_file():
        shipped = RECIPES_FOLDER / f"{file.name.removesuffix('.yaml')}.yaml"
        if len(file.parts) > 1 or not shipped.is_file():
            names = ", ".join(sorted(p.stem for p in RECIPES_FOLDER.glob("*.yaml")))
            raise RecipeError(f"no recipe file {str(path)!r}", expected=f"a YAML file, or the name of one of: {names}")
        file = shipped
    content = _read(file)
    content.pop("match", None)
    values = {name: RECIPE_KEYS[name].parse(name, value) for name, value in content.items()}
    if values.get("trust_remote_code"):  # a recipe may come from others, with the model
        raise RecipeError(
            f"recipe key 'trust_remote_code' is {shown(content['trust_remote_code'])} in {file}",
            expected="false: no file decides that code is run",
            fix="if you trust the base model's code, say so yourself: --trust-remote-code",
        )
    return values


def find_recipe(model: str, model_type: str, d_model: int, n_layers: int) -> Path:
    """The shipped recipe meant for a model: the one whose ``match`` names the most of its properties.

    Args:
        model: as the user gave it; the demo models have a recipe by name.
        model_type: transformers' name of the architecture.
        d_model: D.
        n_layers: decoder layers.
    """
    if model in DEMO_MODELS:
        return RECIPES_FOLDER / "demo.yaml"
    found: list[tuple[int, Path]] = []
    for path in sorted(RECIPES_FOLDER.glob("*.yaml")):
        match = _read(path).get("match")
        if match is not None and _matches(match, path, model_type, d_model, n_layers):
            found.append((len(match), path))
    return max(found)[1] if found else RECIPES_FOLDER / "default.yaml"


def _matches(match: object, path: Path, model_type: str, d_model: int, n_layers: int) -> bool:
    """Whether ``match`` (a value, or a [low, high] range, per property) fits."""
    if not isinstance(match, dict) or not set(match) <= set(_MATCH_KEYS):
        raise RecipeError(f"recipe entry 'match' in {path} is {match!r}", expected=f"a mapping of {', '.join(_MATCH_KEYS)}")
    actual = {"model_type": model_type, "d_model": d_model, "n_layers": n_layers}
    return all(
        wanted[0] <= actual[name] <= wanted[1] if isinstance(wanted, list) else wanted == actual[name]
        for name, wanted in match.items()
    )
