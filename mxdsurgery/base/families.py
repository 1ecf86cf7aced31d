"""What the structure of a model does not show: the few families that need an entry, and how to add one.

Everything else is found by shapes and dataflow. What an entry says is proven like the rest, by recomputation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from mxdsurgery.errors import UnknownFamilyError


@dataclass(frozen=True)
class Family:
    """What is known of a family (a config's ``model_type``) beside its structure.

    Attributes:
        reason: why the structure does not show it; for people.
        layers: the list of decoder layers, from the base model (``transformer.h``); default: the outermost list of the
            config's number of layers.
        block: the module, from a decoder layer, that holds the MLP block (``ffn``); default: the one that can be proven.
        activation: transformers' name of it, tried first; default: those that the config names, then the common ones.
        linears: names of classes that are linear maps, beside nn.Linear, Conv1D and their subclasses; they have ``weight`` and
            ``bias`` (or None). The value: True where the weight is stored (in, out), False where (out, in).
        refused: why it cannot be converted at all.
    """

    reason: str
    layers: str | None = None
    block: str | None = None
    activation: str | None = None
    linears: Mapping[str, bool] = field(default_factory=dict)
    refused: str | None = None

    def is_linear(self, module: nn.Module) -> bool:
        """Whether a module is a linear map."""
        return isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in self.linears

    def transposed(self, linear: nn.Module) -> bool:
        """Whether a linear map's weight is stored (in, out)."""
        return isinstance(linear, Conv1D) or self.linears.get(type(linear).__name__, False)

    def linear_shape(self, linear: nn.Module) -> tuple[int, int]:
        """(in, out) of a linear map."""
        rows, columns = linear.weight.shape
        return (rows, columns) if self.transposed(linear) else (columns, rows)

    def linears_in(self, module: nn.Module) -> dict[str, nn.Module]:
        """The linear maps in a module, at any depth, by path."""
        return {name: child for name, child in module.named_modules() if self.is_linear(child)}


_ASSISTANT = Family(
    "its class is mapped to a causal language model like any other",
    refused="guesses ahead for a larger model, whose hidden states it has to be given",
)
_BY_STRUCTURE = Family("found by its structure")
_FAMILIES: dict[str, Family] = {
    "cpmant": Family(
        "its mask lets every token of the given text see the others",
        refused="reads the tokens to come: its text before the answer is read as a whole",
    ),
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}


def register_family(model_type: str, family: Family) -> None:
    """Registers, in this process, what the structure of a family does not show; for architectures of one's own.

    Args:
        model_type: the config's.
        family: what to know.

    Raises:
        UnknownFamilyError: the family is registered already, or its model_type or reason is empty.
    """
    if model_type in _FAMILIES:
        raise UnknownFamilyError(f"family {model_type!r} is registered already", expected="another model_type")
    if not model_type or not family.reason:
        raise UnknownFamilyError(
            f"family {model_type!r} is registered without a model_type or a reason",
            expected="a model_type, and why it needs a word",
        )
    _FAMILIES[model_type] = family


def family_of(model_type: str) -> Family:
    """What is known of a family; nothing, for most."""
    return _FAMILIES.get(model_type.removeprefix("mxd-"), _BY_STRUCTURE)
