"""The MLP blocks of a model: found by structure, proven by recomputation.

Nothing here knows a family's name. A candidate is a module (or a decoder layer itself) that holds two or three linear maps
whose shapes fit the roles in/out or gate/up/down. It is then run on random input, and every reading of its parts (which map
is which, which activation, which half of a fused map is the gate) is tried: the one that reproduces the hidden units and the
output to fp32 rounding is the block's structure. What no reading reproduces is refused.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.model import decoder_layers
from mxdsurgery.offload import resident

# Largest |difference| / largest |value| that still is fp32 rounding; the activations differ from each other by far more.
TOLERANCE = 2e-5
_PROOF_TOKENS = 7

# Activations to try after those that the config names, most used first; names that compute the same function stand once.
_COMMON_ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "quick_gelu",
    "gelu_fast",
    "tanh",
    "sigmoid",
)


@dataclass(frozen=True)
class Part:
    """One linear map of a block, or the share of a fused map that plays one role.

    Attributes:
        path: the module, from the base model (``layers.3.mlp.gate_proj``).
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.
        outputs: (start, stop, step) of the fused map's outputs; None for all.
    """

    path: str
    transposed: bool = False
    outputs: tuple[int, int, int] | None = None

    def weight(self, root: nn.Module) -> Tensor:
        """(out, in), a view of the module's own weight."""
        weight = root.get_submodule(self.path).weight
        weight = weight.T if self.transposed else weight
        return weight if self.outputs is None else weight[slice(*self.outputs)]

    def bias(self, root: nn.Module) -> Tensor | None:
        """(out,), a view, or None where the map has no bias."""
        bias = root.get_submodule(self.path).bias
        return bias if bias is None or self.outputs is None else bias[slice(*self.outputs)]


@dataclass(frozen=True)
class Block:
    """An MLP block: where it is, what it computes and which weights play which role. Plain data: goes through JSON.

    Attributes:
        layer: index of the decoder layer.
        path: the module that is replaced, from the base model.
        bypass: modules beside it that become identities (only where the maps stand in the decoder layer itself).
        kind: ``mlp``, ``D act(E x)``, or ``glu``, ``D (act(E_g x) * E_u x)``.
        activation: transformers' name of it.
        d_model: D.
        d_hidden: H.
        encoder: E, or E_g of a GLU.
        encoder_up: E_u of a GLU.
        decoder: D.
        encoder_bias: whether E (and E_u) have a bias.
        decoder_bias: whether D has one.
        parameters: of all its maps.
    """

    layer: int
    path: str
    bypass: tuple[str, ...]
    kind: str
    activation: str
    d_model: int
    d_hidden: int
    encoder: Part
    encoder_up: Part | None
    decoder: Part
    encoder_bias: bool
    decoder_bias: bool
    parameters: int

    @property
    def output_path(self) -> str:
        """The module whose output is the block's: the replaced one, or the last of the bypassed ones."""
        return self.bypass[-1] if self.bypass else self.path

    @property
    def parts(self) -> list[Part]:
        """Its parts, in the order of the dataflow."""
        return [part for part in (self.encoder, self.encoder_up, self.decoder) if part is not None]

    def relocate(self, old: str, new: str, layer: int) -> "Block":
        """The same structure seen from elsewhere: the leading modules ``old`` of every path replaced by ``new``."""

        def move(part: Part | None) -> Part | None:
            return part and dataclasses.replace(part, path=_rebase(part.path, old, new))

        return dataclasses.replace(
            self,
            layer=layer,
            path=_rebase(self.path, old, new),
            bypass=tuple(_rebase(path, old, new) for path in self.bypass),
            encoder=move(self.encoder),
            encoder_up=move(self.encoder_up),
            decoder=move(self.decoder),
        )

    def hidden(self, root: nn.Module, x: Tensor) -> Tensor:
        """The hidden units recomputed from the extracted weights: x (..., D) -> z (..., H)."""
        act = ACT2FN[self.activation]
        z = act(nn.functional.linear(x, self.encoder.weight(root), self.encoder.bias(root)))
        if self.encoder_up is None:
            return z
        return z * nn.functional.linear(x, self.encoder_up.weight(root), self.encoder_up.bias(root))

    def output(self, root: nn.Module, z: Tensor) -> Tensor:
        """The block's output from its hidden units: z (..., H) -> y (..., D)."""
        return nn.functional.linear(z, self.decoder.weight(root), self.decoder.bias(root))


@dataclass(frozen=True)
class Finding:
    """What a decoder layer holds: a block, or the reason why it cannot be converted; and the proof's error.

    ``error`` is the largest |recomputed - original| / largest |original| over hidden units and output, in fp32.
    """

    layer: int
    path: str
    block: Block | None
    error: float | None
    reason: str | None


def find_blocks(model: PreTrainedModel) -> list[Finding]:
    """What each decoder layer of a model holds, in order.

    Works on a skeleton (meta device): the proof then runs on a copy of the block with random weights, once for all layers of
    the same structure. On a model with weights use `prove_block` besides, which runs the proof on the weights themselves.

    Raises:
        UnknownFamilyError: the model has no list of decoder layers.
    """
    path, layers = decoder_layers(model)
    known: dict[tuple, Finding] = {}
    findings = []
    for index, layer in enumerate(layers):
        here = f"{path}.{index}"
        signature = tuple((name, type(module).__name__, _shapes(module)) for name, module in layer.named_modules())
        if signature not in known:
            known[signature] = _find_block(layer, here, index, model.config)
        first = known[signature]
        block = first.block and first.block.relocate(first.path, here, index)
        findings.append(dataclasses.replace(first, layer=index, path=here, block=block))
    return findings


def prove_block(model: PreTrainedModel, block: Block) -> float:
    """Recomputes a block's output from the weights extracted from it, on random input, in fp32.

    Returns:
        The largest |difference| / largest |value|.

    Raises:
        UnsupportedBlockError: more than fp32 rounding.
    """
    root = model.base_model
    holder_path = block.path if not block.bypass else block.path.rpartition(".")[0]
    with resident(root.get_submodule(holder_path)):
        holder = _unhooked_copy(root.get_submodule(holder_path)).to(torch.float32)
    local = block.relocate(holder_path, "", block.layer)
    trace = _run(holder, block.d_model, local.parts, whole=not block.bypass)
    error = _error(local, holder, trace)
    if not error <= TOLERANCE:
        raise UnsupportedBlockError(
            f"{block.path}: its output differs from the recomputed one by {error:.1e} of its largest value",
            expected=f"at most {TOLERANCE:.0e}, fp32 rounding",
            fix="leave this layer out with --layers",
        )
    return error


def _rebase(path: str, old: str, new: str) -> str:
    """A module path with its leading modules ``old`` replaced by ``new``; either may be empty."""
    inner = path[len(old) :].lstrip(".")
    return ".".join(piece for piece in (new, inner) if piece)


# --- by structure: shapes ---------------------------------------------------------------------------------------------


def _shapes(module: nn.Module) -> tuple:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear map."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _find_block(layer: nn.Module, path: str, index: int, config: PreTrainedConfig) -> Finding:
    """The one candidate of a decoder layer that can be proven, or the reason why there is none."""
    d_model = config.get_text_config(decoder=True).hidden_size
    proven: list[tuple[Block, float]] = []
    reasons: list[str] = []
    for name, inline in _candidates(layer, d_model):
        try:
            proven.append(_read_block(layer, name, inline, d_model, config))
        except UnsupportedBlockError as error:
            reasons.append(error.found)
    if len(proven) == 1:
        block, error = proven[0]
        return Finding(index, path, block.relocate("", path, index), error, None)
    if proven:
        reason = f"holds {len(proven)} MLP blocks (a mixture of experts?)"
    else:
        reason = "; ".join(reasons) or "holds no module with two or three linear maps of an MLP's shapes"
    return Finding(index, path, None, None, reason)


def _candidates(layer: nn.Module, d_model: int) -> Iterator[tuple[str, bool]]:
    """Modules whose linear maps fit an MLP's shapes, innermost only; ("", True) for the layer itself, maps inline."""
    fitting = [
        name for name, module in layer.named_modules() if name and not _is_linear(module) and _fits(_linears(module), d_model)
    ]
    for name in fitting:
        if not any(other.startswith(name + ".") for other in fitting):
            yield name, False
    inline = {name: module for name, module in layer.named_children() if _is_linear(module)}
    if _fits(inline, d_model):
        yield "", True


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if _is_linear(child)}


def _fits(linears: dict[str, nn.Module], d_model: int) -> bool:
    shapes = [_linear_shape(module) for module in linears.values()]
    for position, (d_in, d_out) in enumerate(shapes):
        if d_out != d_model:
            continue
        others = shapes[:position] + shapes[position + 1 :]
        if others in ([(d_model, d_in)], [(d_model, 2 * d_in)], [(d_model, d_in)] * 2):
            return True
    return False


# --- by dataflow: the proof -------------------------------------------------------------------------------------------


@dataclass
class _Trace:
    """What went through a module in one run: its input and output, and those of the maps and activations in it."""

    x: Tensor
    y: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _read_block(layer: nn.Module, name: str, inline: bool, d_model: int, config: PreTrainedConfig) -> tuple[Block, float]:
    """The reading of a candidate's parts that reproduces it, and its error. Paths are from the decoder layer.

    Raises:
        UnsupportedBlockError: it cannot be run alone, or no reading reproduces it.
    """
    holder = _with_random_weights(layer if inline else layer.get_submodule(name))
    linears = {n: m for n, m in holder.named_children() if _is_linear(m)} if inline else _linears(holder)
    where = name or "the decoder layer"
    trace = _run(holder, d_model, [Part(path) for path in linears], whole=not inline, where=where)
    best = float("inf")
    for block in _readings(holder, linears, trace, inline, config):
        error = _error(block, holder, trace)
        if error <= TOLERANCE:
            return block.relocate("", name, 0), error
        best = min(best, error)
    raise UnsupportedBlockError(
        f"{where}: no reading of its linear maps reproduces its output (nearest: {best:.0e} off, relative)"
    )


def _unhooked_copy(module: nn.Module) -> nn.Module:
    """A copy that computes by itself: without the hooks by which Accelerate moves weights, which would run the original."""
    hooks = {id(part._hf_hook): None for part in module.modules() if hasattr(part, "_hf_hook")}
    copied = copy.deepcopy(module, hooks)
    for part in copied.modules():
        if "_hf_hook" in part.__dict__:
            for name in ("_hf_hook", "_old_forward", "forward"):
                part.__dict__.pop(name, None)
    return copied


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU with random weights of unit gain, biases and norms included."""
    module = _unhooked_copy(module).to_empty(device="cpu").to(torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                scale = max(tensor.shape[0], tensor.shape[-1]) ** -0.5 if tensor.ndim > 1 else 0.5
                tensor.uniform_(-2 * scale, 2 * scale, generator=generator)
    return module


def _run(holder: nn.Module, d_model: int, parts: list[Part], whole: bool, where: str = "") -> _Trace:
    """Runs a block (``whole``) or a decoder layer with the maps inline, on random input, and records the dataflow."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module, args, output) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name], outputs[name] = args[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    weight = next(holder.parameters())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, _PROOF_TOKENS, d_model, generator=generator).to(weight.device)
    hooks = [module.register_forward_hook(record(name)) for name, module in holder.named_modules() if name]
    try:
        with torch.no_grad():
            y = holder(x)
    except Exception as error:  # a module that wants more than hidden states
        raise UnsupportedBlockError(f"{where or 'the block'}: cannot be run on hidden states alone ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    y = y[0] if isinstance(y, tuple) else y
    if not whole:  # the layer goes on after the block: the block's output is its last map's
        down = next((p.path for p in reversed(parts) if p.path in outputs), None)
        y = outputs[down] if down else y
        x = inputs[parts[0].path] if parts[0].path in inputs else x
    if not isinstance(y, Tensor) or y.shape[-1] != d_model or any(part.path not in inputs for part in parts):
        raise UnsupportedBlockError(f"{where or 'the block'}: its linear maps do not all take part in its output")
    return _Trace(x.flatten(0, -2), y.flatten(0, -2), inputs, outputs)


def _readings(
    holder: nn.Module, linears: dict[str, nn.Module], trace: _Trace, inline: bool, config: PreTrainedConfig
) -> Iterator[Block]:
    """Every way to assign roles that the dataflow allows, with every activation that comes into question."""
    fed_by_x = [name for name in linears if _same(trace.inputs[name], trace.x)]
    rest = [name for name in linears if name not in fed_by_x]
    if len(rest) != 1:
        return
    down = rest[0]
    d_hidden, d_model = _linear_shape(linears[down])
    bypass: tuple[str, ...] = ()
    if inline:
        act = [n for n in trace.inputs if n not in linears and _same(trace.inputs[n], trace.outputs[fed_by_x[0]])]
        act = [n for n in act if _same(trace.outputs[n], trace.inputs[down])]
        if len(fed_by_x) != 1 or not act:
            return  # the activation is no module: nothing to put an identity in place of
        bypass = (act[0], down)
    for (encoder, up), activation in itertools.product(_encoder_roles(linears, fed_by_x, d_hidden), _activation_names(config)):
        yield Block(
            layer=0,
            path=fed_by_x[0] if inline else "",
            bypass=bypass,
            kind="mlp" if up is None else "glu",
            activation=activation,
            d_model=d_model,
            d_hidden=d_hidden,
            encoder=encoder,
            encoder_up=up,
            decoder=_part(linears, down),
            encoder_bias=linears[fed_by_x[0]].bias is not None,
            decoder_bias=linears[down].bias is not None,
            parameters=sum(p.numel() for module in linears.values() for p in module.parameters()),
        )


def _part(linears: dict[str, nn.Module], name: str, outputs: tuple[int, int, int] | None = None) -> Part:
    return Part(name, transposed=isinstance(linears[name], Conv1D), outputs=outputs)


def _encoder_roles(linears: dict[str, nn.Module], fed_by_x: list[str], d_hidden: int) -> Iterator[tuple[Part, Part | None]]:
    """(E, None) for an MLP; (E_g, E_u) both ways round for a GLU, from two maps or from the halves of a fused one."""
    if len(fed_by_x) == 2:
        first, second = (_part(linears, name) for name in fed_by_x)
        yield first, second
        yield second, first
    elif len(fed_by_x) == 1 and _linear_shape(linears[fed_by_x[0]])[1] == 2 * d_hidden:
        halves = ((0, d_hidden, 1), (d_hidden, 2 * d_hidden, 1)), ((0, 2 * d_hidden, 2), (1, 2 * d_hidden, 2))
        for first, second in halves:
            yield _part(linears, fed_by_x[0], first), _part(linears, fed_by_x[0], second)
            yield _part(linears, fed_by_x[0], second), _part(linears, fed_by_x[0], first)
    elif len(fed_by_x) == 1:
        yield _part(linears, fed_by_x[0]), None


def _activation_names(config: PreTrainedConfig) -> list[str]:
    """The activations that the config names, then the common ones."""
    values = config.get_text_config(decoder=True).to_dict().values()
    named = [value for value in values if isinstance(value, str) and value in ACT2FN]
    return list(dict.fromkeys((*named, *_COMMON_ACTIVATIONS)))


def _error(block: Block, holder: nn.Module, trace: _Trace) -> float:
    """The larger relative error of hidden units and output, recomputed from the parts; NaN counts as infinite."""
    with torch.no_grad():
        z = block.hidden(holder, trace.x)
        y = block.output(holder, z)
    errors = [_relative(z, trace.inputs[block.decoder.path]), _relative(y, trace.y)]
    return max(errors) if all(e == e for e in errors) else float("inf")


def _relative(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    return ((value - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
