"""Which MLP block each decoder layer of a model holds, by structure.

A candidate is a module (or a decoder layer itself) that holds two or three linear maps whose shapes fit the roles in/out or
gate/up/down; `mxdsurgery.base.proof` says what it computes. Nothing here knows a family's name.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers, width
from mxdsurgery.base.families import Family, family_of
from mxdsurgery.base.proof import arguments, read_block
from mxdsurgery.errors import UnsupportedBlockError

# How the names of attributes end that hold a module's index in the model.
_NUMBERS = ("idx", "index", "layer_id", "block_id", "layer_number")


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
    the same structure. On a model with weights also use `prove_block`, which runs the proof on the weights themselves.

    Raises:
        UnknownFamilyError: the model has no list of decoder layers.
        NotCausalLMError: the layers are an encoder's.
    """
    path, layers = decoder_layers(model)
    family = family_of(model.config.model_type)
    known: dict[tuple, Finding] = {}
    findings = []
    for index, layer in enumerate(layers):
        here = f"{path}.{index}"
        signature = tuple((name, type(module).__name__, _features(module)) for name, module in layer.named_modules())
        if signature not in known:
            known[signature] = _find_block(layer, here, index, width(model), model.config, family)
        first = known[signature]
        block = first.block and first.block.relocate(first.path, here, index)
        findings.append(dataclasses.replace(first, layer=index, path=here, block=block))
    return _without_shared(model, findings)


def _without_shared(model: PreTrainedModel, findings: list[Finding]) -> list[Finding]:
    """The findings; a block whose weights another layer shares gives way to a reason: replacing it would change both."""
    owners: dict[int, list[int]] = {}
    for finding in findings:
        for part in finding.block.parts if finding.block else []:
            owners.setdefault(id(model.base_model.get_submodule(part.path).weight), []).append(finding.layer)
    shared = {layer: layers for layers in owners.values() if len(set(layers)) > 1 for layer in layers}
    return [
        dataclasses.replace(finding, block=None, error=None, reason=f"shares its block with layers {shared[finding.layer]}")
        if finding.layer in shared
        else finding
        for finding in findings
    ]


def _features(module: nn.Module) -> tuple:
    """What distinguishes a module from others of its class: the shapes of its weights, and its settings except its index."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and not name.endswith(_NUMBERS)
    )
    return shapes, settings


def _find_block(layer: nn.Module, path: str, index: int, d_model: int, config: PreTrainedConfig, family: Family) -> Finding:
    """The one candidate of a decoder layer that can be proven, or the reason why there is none."""
    proven: list[tuple[Block, float]] = []
    reasons: list[str] = []
    for name, inline in _candidates(layer, d_model, family):
        try:
            proven.append(read_block(layer.get_submodule(name), name, inline, d_model, config, family))
        except UnsupportedBlockError as error:
            reasons.append(error.found)
    most = max(proven, key=lambda found: found[0].parameters, default=None)
    if most is not None and 2 * most[0].parameters > sum(block.parameters for block, _ in proven):
        block, error = most  # small ones beside it are gates or adapters
        return Finding(index, path, block.relocate("", path, index), error, None)
    if proven:
        reason = f"holds {len(proven)} MLP blocks of one size (a mixture of experts?)"
    else:
        reason = "; ".join(reasons) or _why_none(layer)
    return Finding(index, path, None, None, reason)


def _why_none(layer: nn.Module) -> str:
    """The reason why a decoder layer has no candidate."""
    experts = [tuple(parameter.shape) for parameter in layer.parameters() if parameter.ndim == 3 and parameter.shape[1] > 1]
    if experts:
        return f"is a mixture of experts (weights of shape {list(experts[0])}) without a dense block beside them"
    return "holds no module with two or three linear maps of an MLP's shapes"


def _candidates(layer: nn.Module, d_model: int, family: Family) -> Iterator[tuple[str, bool]]:
    """Modules, by path, whose linear maps fit an MLP's shapes, innermost only; True where the maps are replaced one by one.

    "" is the layer itself. A module that takes more than hidden states (a residual, say) has them replaced one by one, too.
    """
    fitting = [
        name
        for name, module in layer.named_modules()
        if name and not family.is_linear(module) and _fits(family.linears_in(module), d_model, family)
    ]
    if family.block is not None:
        fitting = [name for name in fitting if name == family.block]
    for name in fitting:
        if not any(other.startswith(name + ".") for other in fitting):
            yield name, arguments(layer.get_submodule(name)) > 1
    inline = {name: module for name, module in layer.named_children() if family.is_linear(module)}
    if _fits(inline, d_model, family):
        yield "", True


def _fits(linears: dict[str, nn.Module], d_model: int, family: Family) -> bool:
    shapes = [family.linear_shape(module) for module in linears.values()]
    for position, (d_in, d_out) in enumerate(shapes):
        if d_out != d_model:
            continue
        others = shapes[:position] + shapes[position + 1 :]
        if others in ([(d_model, d_in)], [(d_model, 2 * d_in)], [(d_model, d_in)] * 2):
            return True
    return False
