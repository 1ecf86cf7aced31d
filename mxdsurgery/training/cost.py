"""What a conversion takes: bytes and FLOPs, by arithmetic alone, from shapes and the recipe. No device is queried.

Layers are trained in groups: all layers of a group from one pass over the text, as many as the memory budget allows.

Shapes: D model width, H hidden width, N experts, K active; ``batch`` is tokens per step. Bytes are on the device that trains.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mxdsurgery.base.blocks import Block, distinct
from mxdsurgery.base.offload import SHARD_BYTES
from mxdsurgery.hardware.device import shares_host_memory
from mxdsurgery.layers.layer import BATCH_TOP_K_LIMIT
from mxdsurgery.layers.low_rank import total_rank
from mxdsurgery.layers.sparse import EXTRA_CANDIDATES, TOP_K_GROUP, chunk_bytes
from mxdsurgery.recipe import Recipe
from mxdsurgery.training import adam
from mxdsurgery.training.activation_cache import caching_bytes
from mxdsurgery.training.parameters import layer_parameters

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# New layers are trained in fp32: bytes of a parameter and of its gradient, beside Adam's two moments.
WEIGHT, _GRADIENT = 4, 4
# Evaluation holds the final hidden states of variants up to so many bytes; then it compares their predictions at once.
HELD_BYTES = 2**28
# Variants of a layer that are scored in an evaluation, and while it learns.
_VARIANTS, _LOOKED_AT = 9, 4
# Evaluation fits the dense paths of so many layers anew in one pass as need no more than so many bytes, or of one.
FIT_BYTES = 2**29
# Bytes of a token in the buffer that shuffles the text: an int64, and its share of Python's overhead for a context.
TEXT_BYTES = 13


@dataclass(frozen=True)
class LayerPlan:
    """One layer's conversion.

    Attributes:
        block: what is replaced.
        n_experts: N; 0 for a layer without experts.
        k: K.
        parameters: how many are trained.
        kind: of the new layer; see `mxdsurgery.layers.replacement`.
        sparsity: ``topk``, ``batchtopk`` or ``jumprelu``.
        shared: whether it has a shared expert; see `mxdsurgery.layers.layer.Experts`.
    """

    block: Block
    n_experts: int
    k: int
    parameters: int
    kind: str = "mxd"
    sparsity: str = "topk"
    shared: bool = False

    @property
    def what(self) -> str:
        """Its kind and K, for people."""
        return f"{self.kind}, K = {self.k}" if self.n_experts else self.kind

    @property
    def name(self) -> str:
        """For people."""
        return f"layer {self.block.layer} ({self.what})"

    @property
    def all_parameters(self) -> int:
        """Parameters of the new layer, with those of the block itself where the layer holds the block."""
        return self.parameters + (layer_parameters(self.block, 0, "dense") if self.kind == "topk-sae" else 0)

    @property
    def hidden(self) -> int:
        """H where the new layer has hidden units in training, else 0; of a MOLT, what a token's transforms have on average."""
        if self.kind == "molt":
            return self.active * total_rank(self.block.d_model, self.n_experts) // self.n_experts
        return self.block.d_hidden if self.kind in ("mxd", "dense") else 0

    @property
    def active(self) -> int:
        """Coefficients of a token that can be nonzero."""
        most = BATCH_TOP_K_LIMIT * self.k if self.sparsity != "topk" else self.k
        return min(most, self.n_experts)


@dataclass(frozen=True)
class BaseShape:
    """What the arithmetic needs to know of the base model.

    Attributes:
        parameters: of all of it, tied weights counted once.
        layer_parameters: of each decoder layer.
        d_model: D.
        vocabulary: entries of its output.
        dtype: of its weights in memory, and of its activations: ``float32``, ``bfloat16`` or ``float16``.
        offloaded: whether its weights, and those of finished layers, lie on disk, except the current decoder layer.
        states_on_disk: whether the hidden states that are kept from layer to layer lie on disk.
    """

    parameters: int
    layer_parameters: tuple[int, ...]
    d_model: int
    vocabulary: int
    dtype: str
    offloaded: bool = False
    states_on_disk: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return self.element_bytes * self.parameters

    @property
    def held_bytes(self) -> int:
        """Bytes of weights in memory at a time: all; or, offloaded, the largest decoder layer or the embeddings."""
        if not self.offloaded:
            return self.weight_bytes
        return self.element_bytes * max(*self.layer_parameters, self.vocabulary * self.d_model)


@dataclass(frozen=True)
class Machine:
    """What the layers are trained on.

    Attributes:
        device: its type, as ``cpu`` or ``cuda``.
        bf16: whether the layers in training compute under bf16 autocast.
        selection: whether their experts are ranked in bf16.
        memory: budget in bytes; None where it is not known, and nothing is limited.
        memory_source: where the budget comes from, in words.
        threads: on the CPU; None in what an older version wrote.
        compute: dtype that both models compute in; None in what an older version wrote: as stored.
        compute_why: why that dtype, in words.
    """

    device: str
    bf16: bool
    selection: bool
    memory: int | None
    memory_source: str
    threads: int | None = None
    compute: str | None = None
    compute_why: str = ""


@dataclass(frozen=True)
class Group:
    """Layers that are trained together, from one pass over the text, and what that takes.

    Attributes:
        layers: their indices.
        parameters: of the new layers.
        base_bytes: weights of the base model that are in memory.
        finished_bytes: new layers of earlier groups, in the base model's dtype in memory. 0 on a GPU: there they lie in host
            memory; and where they lie on disk.
        new_bytes: weights of the new layers, fp32.
        gradient_bytes: of the largest layer; a layer's gradients are freed after its own step.
        adam_bytes: both moments of all new layers.
        activation_bytes: recorded inputs and outputs of one batch, the shuffle buffer, and the working memory of the base
            model's pass or of one layer's step, whichever is larger.
        text_bytes: what shuffles the text, and activations that go to or from the disk. 0 on a GPU: they lie in host memory.
        flops: per token of the text: ``base_forward``, ``gate``, ``encoder_decoder``, ``experts``.
        seconds: of training; None where it was not measured.
        state_bytes: the hidden states that are kept from layer to layer. 0 where they lie in a GPU's host memory or on disk.
    """

    layers: list[int]
    parameters: int
    base_bytes: int
    finished_bytes: int
    new_bytes: int
    gradient_bytes: int
    adam_bytes: int
    activation_bytes: int
    text_bytes: int
    flops: dict[str, int]
    seconds: float | None = None
    state_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device, of the base model and of all new layers."""
        return self.base_bytes + self.finished_bytes + self.new_bytes

    @property
    def peak_bytes(self) -> int:
        """All of it together."""
        held = self.weight_bytes + self.gradient_bytes + self.adam_bytes + self.activation_bytes
        return held + self.text_bytes + self.state_bytes

    @property
    def step_flops(self) -> int:
        """FLOPs per token of the new layers, without the base model's."""
        return sum(self.flops.values()) - self.flops["base_forward"]


def layer_flops(layer: LayerPlan) -> dict[str, int]:
    """FLOPs per token, forward and backward; a multiply-add counts as two."""
    d, h = layer.block.d_model, layer.hidden
    if layer.kind == "molt":  # of K rows of G as below; of V x and U h the products, and the gradients of U, V and h
        rows = 2 * layer.n_experts * d, 4 * layer.active * d + 10 * d * h
        return {"gate": rows[0], "encoder_decoder": 0, "experts": rows[1]}
    encoders = 2 if layer.block.kind == "glu" else 1
    skip = 4 * d * d if layer.kind == "skip-transcoder" else 0
    return {
        # G x for all N. Its backward touches K rows only and is counted with the experts.
        "gate": 2 * layer.n_experts * d,
        # Forward and the gradients of the weights: 4DH each; of the hidden units: 2DH. Nothing needs the gradient of x.
        "encoder_decoder": (4 * encoders + 6) * d * h + skip,
        # K rows: exact coefficients, Cᵀa, and the gradients of a, C and G.
        "experts": 10 * layer.active * d,
    }


def largest_layer(layers: Sequence[LayerPlan]) -> LayerPlan:
    """The one that takes the most FLOPs."""
    return max(layers, key=lambda layer: sum(layer_flops(layer).values()))


def base_forward_flops(base: BaseShape, last: int, context: int, first: int = 0) -> int:
    """FLOPs per token of the base model's pass from layer ``first`` up to ``last``: products with weights, and attention."""
    layers = base.layer_parameters[first : last + 1]
    return 2 * sum(layers) + 4 * context * base.d_model * len(layers)


def kept_batches(recipe: Recipe) -> int:
    """Batches of the text whose hidden states are kept from layer to layer."""
    return max(1, min(recipe.kept_tokens or recipe.tokens, recipe.tokens) // tokens_per_step(recipe))


def _models_run(recipe: Recipe) -> int:
    """How many, with inputs: converted: the converted model, and the original where its outputs are wanted."""
    return 1 if recipe.target == "own" else 2


def states_bytes(base: BaseShape, recipe: Recipe) -> int:
    """Bytes of the hidden states that are kept from layer to layer, of one model or two; 0 where none are kept."""
    if recipe.inputs != "converted":
        return 0
    return _models_run(recipe) * kept_batches(recipe) * tokens_per_step(recipe) * base.d_model * base.element_bytes


def fed_flops(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe) -> int:
    """FLOPs per token that the base model takes to feed the layers."""
    last = max(layer.block.layer for layer in layers)
    if recipe.inputs == "converted":  # each kept token also goes through the layer again, on to the next one
        return 2 * _models_run(recipe) * base_forward_flops(base, last, recipe.context, first=last)
    if recipe.inputs == "joint":  # the original, and the converted model forward and backward
        return 4 * base_forward_flops(base, len(base.layer_parameters) - 1, recipe.context)
    return base_forward_flops(base, last, recipe.context)


def step_bytes(d: int, h: int, n: int, k: int, kind: str, batch: int, bf16: bool, selection: bool, device: str) -> int:
    """Working memory of one layer's training step, beside its weights, gradients and Adam state.

    Args:
        d: D.
        h: H.
        n: N.
        k: coefficients of a token that can be nonzero.
        kind: ``mlp`` or ``glu``.
        batch: tokens.
        bf16: under bf16 autocast.
        selection: whether the experts are ranked in bf16.
        device: its type, as ``cpu`` or ``cuda``.
    """
    encoders = 2 if kind == "glu" else 1
    width = 2 if bf16 else 4  # bytes of a hidden unit
    candidates = k + EXTRA_CANDIDATES if selection else k
    inputs = 2 * batch * d * 4  # x and y in fp32
    chosen = batch * candidates * (4 + 8)  # values and indices of the coefficients
    # First the experts are selected. A bf16 copy of G and of x:
    ranking = 2 * (n + batch) * d if selection else 0
    # one chunk of pre-activations with its maxima, and the columns (index, position, value) that the top-k compares.
    row = max(1, n) * (2 if selection else 4)
    rows = min(batch, max(1, chunk_bytes(device) // row))
    chunk = rows * (row + row // (TOP_K_GROUP - 1) + candidates * TOP_K_GROUP * (8 + 8 + 4))
    # Then forward and backward. Autocast's bf16 copies of E, E_up and D, one bf16 gradient of a weight, and x in bf16:
    copies = 2 * ((encoders + 2) * d * h + batch * d) if bf16 else 0
    # what backward needs of the hidden units (pre-activations, activations, z), and as many again while it runs;
    hidden = 2 * (2 * encoders if kind == "glu" else 3) * batch * h * width
    # D z, Cᵀ a, ŷ, its error, what frozen experts could do, and gradients, in fp32.
    outputs = 8 * batch * d * 4
    return inputs + chosen + max(ranking + chunk, copies + hidden + outputs)


def forward_bytes(base: BaseShape, d_hidden: int, batch: int) -> int:
    """Working memory of the base model's pass over one batch: about four tensors of hidden and eight of model width."""
    return batch * (4 * d_hidden + 8 * base.d_model) * base.element_bytes


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens in a batch, rounded down to whole contexts."""
    return recipe.batch // recipe.context * recipe.context


def first_k(layer: LayerPlan, recipe: Recipe) -> int:
    """The layer's K at the first step."""
    return min(recipe.first_k_of(layer.k), max(layer.n_experts, 1))


def steered(layers: Sequence[LayerPlan], recipe: Recipe) -> list[LayerPlan]:
    """The layers whose experts are trained to carry a share that is asked for: elsewhere, experts multiply nothing."""
    return [layer for layer in layers if layer.kind == "mxd" and recipe.share_target is not None]


def make_group(
    layers: Sequence[LayerPlan], finished: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine
) -> Group:
    """What it takes to train some layers together, after others are finished."""
    batch = tokens_per_step(recipe)
    blocks = distinct(layer.block for layer in layers)
    recorded = sum(2 * batch * block.d_model * base.element_bytes for block in blocks)  # x and y of one batch
    room = recipe.activation_buffer // batch  # batches in the buffer that mixes positions
    drawn = recorded if room else 0  # the batch that is drawn, beside the one that takes its place
    steps = [
        step_bytes(
            layer.block.d_model,
            layer.hidden,
            layer.n_experts,
            dataclasses.replace(layer, k=first_k(layer, recipe)).active,
            layer.block.kind,
            batch,
            machine.bf16,
            machine.selection,
            machine.device,
        )
        for layer in layers
    ]
    widest = max(layer.block.d_hidden for layer in layers)
    parameters = sum(layer.parameters for layer in layers)
    by_kind = [layer_flops(layer) for layer in layers]
    flops = {name: sum(row[name] for row in by_kind) for name in by_kind[0]}
    on_host = not shares_host_memory(machine.device)  # what is not computed with lies in host memory, apart from the device
    whole = recipe.inputs == "joint"  # one backward pass through all layers, with both models' logits
    logits = batch * base.vocabulary * 3 * base.element_bytes
    moving = adam.step_bytes(recipe, max(layer.parameters for layer in layers), machine.device)
    working = sum(steps) + logits if whole else max(*steps, forward_bytes(base, widest, batch), drawn, moving)
    if mine := steered(layers, recipe):  # now and then it is measured what their experts carry
        working = max(working, forward_bytes(base, widest, batch) + _scoring_bytes(mine, _LOOKED_AT, base, batch, machine))
    return Group(
        layers=[layer.block.layer for layer in layers],
        parameters=parameters,
        base_bytes=base.held_bytes,
        finished_bytes=0 if on_host or base.offloaded else base.element_bytes * sum(old.all_parameters for old in finished),
        new_bytes=WEIGHT * parameters,
        gradient_bytes=_GRADIENT * (parameters if whole else max(layer.parameters for layer in layers)),
        adam_bytes=adam.moment_bytes(recipe) * parameters,
        activation_bytes=recorded * (1 + room) + working,
        text_bytes=0 if on_host else recipe.shuffle * TEXT_BYTES + caching_bytes(blocks, recipe, base.element_bytes),
        flops={"base_forward": fed_flops(layers, base, recipe)} | flops,
        state_bytes=0 if on_host or base.states_on_disk else states_bytes(base, recipe),
    )


def make_groups(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> list[Group]:
    """Groups of consecutive layers, as many as fit the budget; a layer that does not fit is a group of its own.

    With inputs: converted each layer is a group of its own; with inputs: joint all layers are one group.
    """
    if recipe.inputs == "joint":
        return [make_group(layers, [], base, recipe, machine)]
    if recipe.inputs == "converted":
        return [make_group([layer], layers[:index], base, recipe, machine) for index, layer in enumerate(layers)]
    groups: list[Group] = []
    start = 0
    while start < len(layers):
        end = start + 1
        group = make_group(layers[start:end], layers[:start], base, recipe, machine)
        while end < len(layers):
            larger = make_group(layers[start : end + 1], layers[:start], base, recipe, machine)
            if machine.memory is not None and larger.peak_bytes > machine.memory:
                break
            group, end = larger, end + 1
        groups.append(group)
        start = end
    return groups


def checkpoint_bytes(layers: Sequence[LayerPlan], base: BaseShape) -> int:
    """Bytes of the converted model's weights."""
    return base.weight_bytes + base.element_bytes * sum(layer.all_parameters - layer.block.parameters for layer in layers)


def evaluation_bytes(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> int:
    """Peak bytes of evaluation and export: the base model and all new layers in its dtype, and the larger of two things.

    Evaluation needs the logits of as many tokens as go through the head together, with about five tensors of the same shape
    in fp32; the final hidden states of several variants of a batch; and what decoder layers and blocks gave. Before that it
    holds what the controls of the choice of experts are made from. Export reloads the checkpoint in another process. With
    weights on disk, only what is computing is in memory, and a shard of the checkpoint while it is written.
    """
    batch, widest = tokens_per_step(recipe), max(layer.block.d_hidden for layer in layers)
    figures = (
        max(_scoring_bytes(layers, _VARIANTS, base, batch, machine), _fitting_bytes(layers))
        + _control_bytes(layers, base)
        + forward_bytes(base, widest, batch)
    )
    if base.offloaded:
        largest = base.element_bytes * max(layer.all_parameters for layer in layers)
        return max(base.held_bytes, largest) + max(figures, SHARD_BYTES)
    new = base.element_bytes * sum(layer.all_parameters for layer in layers)
    return base.weight_bytes + new + max(figures, checkpoint_bytes(layers, base))


def _scoring_bytes(layers: Sequence[LayerPlan], variants: int, base: BaseShape, batch: int, machine: Machine) -> int:
    """To score layers and what they are compared with, a batch at a time: logits, hidden states, what decoder layers gave."""
    rows = min(batch, max(1, chunk_bytes(machine.device) // (4 * base.vocabulary)))
    states = variants * (len(layers) + 1) * batch * base.d_model * base.element_bytes
    logits = rows * base.vocabulary * (base.element_bytes + 5 * 4) + min(HELD_BYTES, states)
    widest = max(layer.block.d_hidden for layer in layers)
    kept = base.d_model * (len(base.layer_parameters) + len(layers) + 2) + widest  # elements of a token; one layer remembers z
    return logits + batch * kept * base.element_bytes


def _features(block: Block, kind: str) -> int:
    """F, in how many features of the input the dense path of such a layer is linear."""
    return {"mxd": block.d_hidden, "skip-transcoder": block.d_model}.get(kind, 0)


def fit_bytes(block: Block, kind: str) -> int:
    """Bytes of the sums from which a layer's dense path is fitted anew: its features' products, of four parts of the text."""
    features = _features(block, kind)
    return 4 * 8 * (features + 1) * (features + 1 + block.d_model) if features else 0


def fit_flops(block: Block, kind: str) -> int:
    """FLOPs in the widest dtype of solving it: for each half of the text 13 systems (F, F) for (F, D), and 12 losses."""
    f, d = _features(block, kind) + 1, block.d_model
    return 2 * (13 * (f**3 // 3 + 2 * f * f * d) + 12 * 2 * f * f * d) if f > 1 else 0


def _fitting_bytes(layers: Sequence[LayerPlan]) -> int:
    """The most that is held while dense paths are fitted anew; solving one layer takes three matrices (F, F) more."""
    each = [fit_bytes(layer.block, layer.kind) for layer in layers]
    return max(max(each), min(sum(each), FIT_BYTES)) + max(each) * 3 // 4


def _control_bytes(layers: Sequence[LayerPlan], base: BaseShape) -> int:
    """The fitted maps, one for each half of the text, and the products (D, D) of what the experts of each layer give."""
    maps = sum(2 * _features(layer.block, layer.kind) * layer.block.d_model for layer in layers)
    return maps * base.element_bytes + sum(8 * layer.block.d_model**2 for layer in layers if layer.n_experts)
