"""The proof that a block is what we say: its hidden units and output, recomputed from the parts taken out of it.

A candidate is run on random input. Every reading of its parts (which map is which, which activation, which half of a fused
map is the gate, what is multiplied with what) is tried: the one that reproduces the hidden units and the output to fp32
rounding is the block's structure. A candidate that no reading reproduces is refused.
"""

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from mxdsurgery.base.blocks import Block, Part
from mxdsurgery.base.families import Family
from mxdsurgery.base.offload import resident
from mxdsurgery.errors import UnsupportedBlockError, first_line

# Largest |difference| / largest |value| that still is fp32 rounding; the activations differ from each other by far more.
TOLERANCE = 2e-5
# The sizes of the random tokens that a block is run on; the large ones show what it does to large values only: a clamp.
_TOKEN_SIZES = (1.0, 1.0, 1.0, 1.0, 1.0, 100.0, 1000.0)
# A measured factor counts as a number of the config or the module if their relative difference is at most this.
_SAME_FACTOR = 1e-4

# Activations to try after those that the config names, most used first; of names for the same function, one is listed.
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


def prove_block(model: PreTrainedModel, block: Block) -> float:
    """Recomputes a block's output from the weights extracted from it, on random input, in fp32.

    Returns:
        The largest |difference| / largest |value|.

    Raises:
        UnsupportedBlockError: that is more than fp32 rounding.
    """
    original = model.base_model.get_submodule(block.holder_path)
    with resident(original):
        holder = _unhooked_copy(original).to(torch.float32).eval()
    local = block.relocate(block.holder_path, "", block.layer)
    trace = _run(holder, block.d_model, [part.path for part in local.parts], whole=not block.bypass)
    error = _largest(_errors(local, holder, trace))
    if not error <= TOLERANCE:
        raise UnsupportedBlockError(
            f"{block.path}: its output differs from the recomputed one by {error:.1e} of its largest value",
            expected=f"at most {TOLERANCE:.0e}, fp32 rounding",
            fix="leave this layer out with --layers",
        )
    return error


def read_block(
    module: nn.Module, name: str, inline: bool, d_model: int, config: PreTrainedConfig, family: Family
) -> tuple[Block, float]:
    """The reading of a candidate's parts that reproduces it, and its error. Paths are from the decoder layer.

    Args:
        module: the candidate; its weights may be on the meta device, and are not looked at.
        name: its path from the decoder layer.
        inline: whether the maps are to be replaced one by one, not the module.
        d_model: D.
        config: the model's.
        family: what is known of the model's family.

    Raises:
        UnsupportedBlockError: it cannot be run alone, or no reading reproduces it.
    """
    holder = _with_random_weights(module)
    linears = {n: m for n, m in holder.named_children() if family.is_linear(m)} if inline else family.linears_in(holder)
    where = name or "the decoder layer"
    trace = _run(holder, d_model, list(linears), whole=not inline, where=where)
    best, clamps = float("inf"), False
    for block in _readings(holder, linears, trace, inline, config, family):
        errors = _errors(block, holder, trace)
        error = _largest(errors)
        if error <= TOLERANCE:
            return block.relocate("", name, 0), error
        best, clamps = min(best, error), clamps or _largest(errors[: _TOKEN_SIZES.count(1.0)]) <= TOLERANCE
    what = "it clamps large values" if clamps else _what_differs(holder, linears, trace)
    raise UnsupportedBlockError(
        f"{where}: no reading of its linear maps reproduces its output ({what or f'nearest: {best:.0e} off, relative'})"
    )


Scaling = Callable[[Part], Part]  # a part, multiplied with some number


@dataclass
class _Trace:
    """What went through a module in one run: its input and output, and those of the maps and activations in it."""

    x: Tensor
    y: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _unhooked_copy(module: nn.Module) -> nn.Module:
    """A copy without the hooks by which Accelerate moves weights: they would run the original module."""
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


def _run(holder: nn.Module, d_model: int, maps: list[str], whole: bool, where: str = "the block") -> _Trace:
    """Runs a block (``whole``), or the module in which its maps stand, on random input, and records the dataflow."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module, args, output) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name], outputs[name] = args[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    weight = next(holder.parameters())
    generator = torch.Generator().manual_seed(1)
    count = 1 if whole else arguments(holder)
    sizes = torch.tensor(_TOKEN_SIZES)[:, None]
    given = [(torch.randn(1, len(sizes), d_model, generator=generator) * sizes).to(weight.device) for _ in range(count)]
    hooks = [module.register_forward_hook(record(name)) for name, module in holder.named_modules() if name]
    try:
        with torch.no_grad():
            y = holder(*given)
    except Exception as error:  # a module that wants more than hidden states
        raise UnsupportedBlockError(f"{where}: cannot be run on hidden states alone ({first_line(error)})") from None
    finally:
        for hook in hooks:
            hook.remove()
    x, y = given[0], y[0] if isinstance(y, tuple) else y
    if not whole:  # the module computes more after the block, whose output is that of its last map
        down = next((path for path in reversed(maps) if path in outputs), None)
        y = outputs[down] if down else y
        x = inputs[maps[0]] if maps[0] in inputs else x
    if not isinstance(y, Tensor) or y.shape[-1] != d_model or any(path not in inputs for path in maps):
        raise UnsupportedBlockError(f"{where}: its linear maps do not all take part in its output")
    return _Trace(x.flatten(0, -2), y.flatten(0, -2), inputs, outputs)


def arguments(module: nn.Module) -> int:
    """How many arguments a module's forward needs: hidden states and, say, a residual that is added to them."""
    parameters = inspect.signature(module.forward).parameters.values()
    return max(1, sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))


def _readings(
    holder: nn.Module, linears: dict[str, nn.Module], trace: _Trace, inline: bool, config: PreTrainedConfig, family: Family
) -> Iterator[Block]:
    """Every assignment of roles that the dataflow allows, with every activation to try; those with scaled maps last."""
    fed_by_x = [name for name in linears if _same(trace.inputs[name], trace.x)]
    rest = [name for name in linears if name not in fed_by_x]
    if len(rest) != 1 or not fed_by_x:
        return
    down = rest[0]
    d_hidden, d_model = family.linear_shape(linears[down])
    bypass: tuple[str, ...] = ()
    if inline:
        acts = [n for n in trace.inputs if n not in linears and _same(trace.inputs[n], trace.outputs[fed_by_x[0]])]
        acts = [n for n in acts if _same(trace.outputs[n], trace.inputs[down])]
        if len(fed_by_x) != 1 or not acts:
            return  # the activation is no module, so no identity can take its place
        bypass = (acts[0], down)
    found = []
    for (encoder, up), (activation, path) in itertools.product(
        _encoder_roles(linears, fed_by_x, d_hidden, family), _activations(holder, config, family)
    ):
        block = Block(
            layer=0,
            path=fed_by_x[0] if inline else "",
            bypass=bypass,
            kind="mlp" if up is None else "glu",
            activation=activation,
            d_model=d_model,
            d_hidden=d_hidden,
            encoder=encoder,
            encoder_up=up,
            decoder=_part(linears, down, family),
            encoder_bias=linears[fed_by_x[0]].bias is not None,
            decoder_bias=linears[down].bias is not None,
            parameters=sum(p.numel() for module in linears.values() for p in module.parameters()),
            activation_path=path,
        )
        found.append(block)
        yield block
    if found:
        yield from _scaled(found, holder, trace, _numbers(holder, config))


def _part(linears: dict[str, nn.Module], name: str, family: Family, outputs: tuple[int, int, int] | None = None) -> Part:
    return Part(name, transposed=family.transposed(linears[name]), outputs=outputs)


def _encoder_roles(
    linears: dict[str, nn.Module], fed_by_x: list[str], d_hidden: int, family: Family
) -> Iterator[tuple[Part, Part | None]]:
    """(E, None) for an MLP; (E_g, E_u) both ways round for a GLU, from two maps or from the halves of a fused one."""
    if len(fed_by_x) == 2:
        first, second = (_part(linears, name, family) for name in fed_by_x)
        yield first, second
        yield second, first
    elif len(fed_by_x) == 1 and family.linear_shape(linears[fed_by_x[0]])[1] == 2 * d_hidden:
        halves = ((0, d_hidden, 1), (d_hidden, 2 * d_hidden, 1)), ((0, 2 * d_hidden, 2), (1, 2 * d_hidden, 2))
        for first, second in halves:
            yield _part(linears, fed_by_x[0], family, first), _part(linears, fed_by_x[0], family, second)
            yield _part(linears, fed_by_x[0], family, second), _part(linears, fed_by_x[0], family, first)
    elif len(fed_by_x) == 1:
        yield _part(linears, fed_by_x[0], family), None


def _activations(holder: nn.Module, config: PreTrainedConfig, family: Family) -> list[tuple[str, str | None]]:
    """The activations that family and config name, then the common ones; with their path where they have parameters."""
    values = config.get_text_config(decoder=True).to_dict().values()
    named = [value for value in (family.activation, *values) if isinstance(value, str) and value in ACT2FN]
    found: list[tuple[str, str | None]] = []
    for name in dict.fromkeys((*named, *_COMMON_ACTIVATIONS)):
        made = ACT2FN[name]
        if any(True for _ in made.parameters()):
            found += [(name, path) for path, module in holder.named_modules() if type(module) is type(made)]
        else:
            found.append((name, None))
    return found


# --- scalings ---------------------------------------------------------------------------------------------------------


def _numbers(holder: nn.Module, config: PreTrainedConfig) -> dict[float, Scaling]:
    """Factors on maps that a block may have: 1, and numbers of config and module; each with what applies it to a part."""
    numbers: dict[float, Scaling] = {1.0: lambda part: part}
    own = (value for module in holder.modules() for value in vars(module).values())
    for value in _floats((*config.get_text_config(decoder=True).to_dict().values(), *own)):
        if 1e-3 <= abs(value) <= 1e3:
            numbers.setdefault(value, lambda part, value=value: dataclasses.replace(part, scale=value))
    for name, parameter in holder.named_parameters():
        if parameter.numel() == 1:
            numbers.setdefault(parameter.item(), lambda part, name=name: dataclasses.replace(part, scaled_by=name))
    return numbers


def _floats(values: Iterable[object]) -> Iterator[float]:
    for value in values:
        if isinstance(value, float):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _floats(value)


def _scaled(blocks: list[Block], holder: nn.Module, trace: _Trace, numbers: dict[float, Scaling]) -> Iterator[Block]:
    """The blocks that reproduce the hidden units and the output once their maps are multiplied with some of the numbers."""
    down = blocks[0].decoder.path
    out = _named(_factor(trace.y, trace.outputs[down]), numbers)
    if out is None:
        return
    for block, number in itertools.product(blocks, numbers):
        with torch.no_grad():
            z = block.act(holder)(_outputs(block.encoder, trace) * number)
            z = z if block.encoder_up is None else z * _outputs(block.encoder_up, trace)
        up = numbers[1.0] if block.encoder_up is None else _named(_factor(trace.inputs[down], z), numbers)
        if up is not None:
            yield dataclasses.replace(
                block,
                encoder=numbers[number](block.encoder),
                encoder_up=block.encoder_up and up(block.encoder_up),
                decoder=out(block.decoder),
            )


def _outputs(part: Part, trace: _Trace) -> Tensor:
    return trace.outputs[part.path] if part.outputs is None else trace.outputs[part.path][..., slice(*part.outputs)]


def _factor(value: Tensor, reference: Tensor) -> float:
    """The c for which c * reference is nearest to value."""
    if value.shape != reference.shape:
        return float("nan")
    return ((value * reference).sum() / reference.square().sum().clamp_min(1e-30)).item()


def _named(factor: float, numbers: dict[float, Scaling]) -> Scaling | None:
    return next((scale for number, scale in numbers.items() if abs(factor - number) <= _SAME_FACTOR * abs(number)), None)


# --- comparing --------------------------------------------------------------------------------------------------------


def _what_differs(holder: nn.Module, linears: dict[str, nn.Module], trace: _Trace) -> str | None:
    """Why no reading fits, where the dataflow shows it."""
    outputs = [trace.outputs[name] for name in linears]
    inputs = [trace.inputs[name] for name in linears]
    for name, module in holder.named_modules():
        learns = any(True for _ in module.parameters())
        if name in trace.inputs and name not in linears and learns and not any(name.startswith(f"{n}.") for n in linears):
            before = any(_same(trace.inputs[name], value) for value in outputs)
            after = any(_same(trace.outputs[name], value) for value in inputs)
            if before or after:
                return f"{type(module).__name__} stands between its maps"
    return None


def _errors(block: Block, holder: nn.Module, trace: _Trace) -> Tensor:
    """By token: the larger of the relative errors of its hidden units and its output, recomputed from the parts."""
    with torch.no_grad():
        z = block.hidden(holder, trace.x)
        y = block.output(holder, z)
    return torch.maximum(_relative(z, trace.inputs[block.decoder.path]), _relative(y, trace.y))


def _relative(value: Tensor, reference: Tensor) -> Tensor:
    """By token: the largest |difference| / the largest |value|; infinite where the shapes differ."""
    if value.shape != reference.shape:
        return torch.full((len(reference),), float("inf"))
    return (value - reference).abs().amax(-1) / reference.abs().amax(-1).clamp_min(1e-30)


def _largest(errors: Tensor) -> float:
    """The largest of some errors; NaN counts as infinite."""
    return errors.nan_to_num(nan=float("inf")).max().item()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
