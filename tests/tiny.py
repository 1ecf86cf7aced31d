"""Small deterministic models, layers and exported folders for the tests."""

import itertools
from types import SimpleNamespace

import tiny_models
import torch
from accelerate import Accelerator

from mxdsurgery.base.activations import record_activations, stream_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.checkpoint.converted import converted_config_class, converted_model_class
from mxdsurgery.checkpoint.export import check_reload, write_converted, write_evaluation, written_as
from mxdsurgery.editing.predictions import Opened
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.planning.plan import Plan, plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.distill import Progress, distill
from mxdsurgery.training.initialize import initial_layer, measure_statistics

# The families that tests run over one by one: kind and activation of their blocks.
FAMILIES = {
    "gpt2": ("mlp", "gelu_new"),
    "gpt_neo": ("mlp", "gelu_new"),
    "gpt_neox": ("mlp", "gelu"),
    "opt": ("mlp", "relu"),
    "phi": ("mlp", "gelu_new"),
    "phi3": ("glu", "silu"),
    "llama": ("glu", "silu"),
    "mistral": ("glu", "silu"),
    "qwen2": ("glu", "silu"),
    "qwen3": ("glu", "silu"),
    "gemma": ("glu", "gelu_pytorch_tanh"),
    "gemma2": ("glu", "gelu_pytorch_tanh"),
    "olmo2": ("glu", "silu"),
}
# Where a family can, two queries share a key; token 0 is every special one.
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_CONFIG = {"layers": 2, "vocabulary": 64, "context": 64, "num_key_value_heads": 2} | _SPECIAL

# A start from which experts matter after few steps, and a penalty of one weight.
FROM_ENCODER = {"init": "encoder", "specialise": 0.003}
RECIPE = Recipe(k=4, n_experts=64, data="stdlib", batch=512, context=16, lr=3e-3, **FROM_ENCODER)
IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))
S, T, N, K = 4, 20, 24, 3  # contexts, tokens, experts and active ones of `tiny_opened`


def tiny_config(family, **changes):
    """A config of two layers, 32 wide, of any family."""
    return tiny_models.tiny_config(family, **_CONFIG | changes)


def tiny_model(family, seed=0, **changes):
    """A random model of `tiny_config`, in fp32, with biases and norms that are not at their trivial start."""
    return tiny_models.tiny_model(family, seed, noise=0.1, **_CONFIG | changes)


def make_layer(kind="glu", activation="silu", encoder_bias=False, dtype=torch.float64, n_experts=40, k=5):
    """A random `MxDLayer`, D 12, H 20."""
    torch.manual_seed(0)
    layer = MxDLayer(
        d_model=12, d_hidden=20, n_experts=n_experts, k=k, kind=kind, activation=activation, encoder_bias=encoder_bias
    ).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def batches(seed=0):
    """Random tokens without end, (32, 16) each."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(1, 64, (32, 16), generator=generator)


def fed(model, blocks, stream=None):
    """What `distill` is fed: what blocks saw, and what they made of it."""
    return stream_activations(model, blocks, stream or batches(), torch.device("cpu"))


def train(model, recipe=RECIPE, steps=60, layers=(0, 1), stream=None, reports=None):
    """Layers that learn their blocks: by number, with progress and blocks. Each step's errors go to ``reports``."""
    blocks = [find_blocks(model)[layer].block for layer in layers]
    statistics = measure_statistics(model, blocks, list(itertools.islice(batches(), 2)))
    made = {
        plan: initial_layer(model, plan, recipe, statistics[plan.block.layer])
        for plan in (plan_layer(block, recipe) for block in blocks)
    }
    progress = Progress(steps, 512)
    report = (lambda p: reports.append(list(p.nmse.values()))) if reports is not None else (lambda p: None)
    distill(made, fed(model, blocks, stream), recipe, Accelerator(cpu=True), progress, report)
    return {plan.block.layer: layer for plan, layer in made.items()}, progress, blocks


def nmse(model, blocks, layers):
    """Each layer's error on tokens that it was not trained on, by its number."""
    recorded = record_activations(model, blocks, next(batches(seed=99)))
    errors = {}
    for layer, (x, y) in recorded.items():
        errors[layer] = ((layers[layer](x) - y).square().sum() / y.square().sum()).item()
    return errors


def busy_layer(kind, sparsity, *, d_model, d_hidden, n_experts, k, std):
    """An untrained layer in fp32, all of whose parameters matter; of a GLU block where its kind has a block's hidden units."""
    torch.manual_seed(0)
    block = {"d_hidden": d_hidden, "kind": "glu", "activation": "silu", "encoder_bias": False}
    shape = {"d_model": d_model, "n_experts": n_experts, "k": k, "sparsity": sparsity}
    layer = LAYER_KINDS[kind](**shape | (block if kind in ("mxd", "topk-sae") else {}))
    for parameter in layer.parameters():
        parameter.data.normal_(std=std)
    if sparsity != "topk":
        layer.gate.threshold.uniform_(0.5, 0.9)
    return layer.eval()


def export_tiny(family, out, layers=(0, 1), dtype=torch.float32, recipe=RECIPE, **changes):
    """A tiny model with untrained but busy new layers, exported; the model, its layers and the differences."""
    model = tiny_model(family, **changes).to(dtype)
    blocks = [find_blocks(model)[layer].block for layer in layers]
    statistics = measure_statistics(model, blocks, [IDS])
    made = {}
    for block in blocks:
        layer = initial_layer(model, plan_layer(block, recipe), recipe, statistics[block.layer])
        for weight in layer.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight)
        made[block.layer] = layer.to(dtype).eval().requires_grad_(False)
    plans = [plan_layer(block, recipe) for block in blocks]
    name = str(dtype).removeprefix("torch.")
    plan = Plan(family, None, family, type(model).__name__, name, model.num_parameters(), "small.yaml", 1, plans)
    evaluation = measure(model, blocks, made, IDS, batch=64)
    with written_as(out, "checkpoint", plan.model, plan.revision) as folder:
        reference = write_converted(folder, model, made, plan, recipe, load_tokenizer("demo-glu"), IDS)
        differences = check_reload(folder, reference)
        write_evaluation(folder, evaluation, plan, recipe)
    return model, blocks, made, differences


def tiny_opened(family="llama", kind="mxd", batch=3 * T, **changes):
    """A random model of two layers, both of them converted, in float64, and random text."""
    base = tiny_model(family, **changes)
    blocks = [finding.block for finding in find_blocks(base)]
    entries = []
    for block in blocks:
        shape = {"d_model": block.d_model, "n_experts": N, "k": K}
        if kind in ("mxd", "topk-sae"):
            shape |= {name: getattr(block, name) for name in ("d_hidden", "kind", "activation", "encoder_bias")}
        bypass = list(block.bypass)
        entries.append({"layer": block.layer, "path": block.path, "bypass": bypass, "kind": kind, "shape": shape})
    config_class = converted_config_class(type(base.config))
    values = {name: value for name, value in base.config.to_dict().items() if name not in ("model_type", "architectures")}
    model = converted_model_class(type(base), config_class)(config_class(**values, mxd={"layers": entries}))
    mine = model.state_dict()
    weights = base.state_dict().items()
    model.load_state_dict({n: w for n, w in weights if n in mine and mine[n].shape == w.shape}, strict=False)
    torch.manual_seed(1)
    layers = {block.layer: model.base_model.get_submodule(block.path) for block in blocks}
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.3)
    model.double().eval().requires_grad_(False)
    converted = SimpleNamespace(model=model, layers=layers, plan=SimpleNamespace(blocks=blocks))
    ids = torch.randint(1, 64, (S, T), generator=torch.Generator().manual_seed(2))
    return Opened(converted, ids, batch, "random")


def coefficients(opened, layer):
    """(S, T, N), as the gate gives them when the whole model runs."""
    seen = []
    module = opened.converted.layers[layer]
    handle = module.gate.register_forward_hook(lambda _m, _x, a: seen.append(a))
    opened.model(input_ids=opened.input_ids)
    handle.remove()
    return seen[0].dense(N).view(S, T, N)
