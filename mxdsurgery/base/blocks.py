"""What is known of an MLP block: where it is, what it computes and which weights play which role.

Plain data, which goes through JSON, and what can be recomputed from it and a model's weights. `mxdsurgery.base.finding` finds
blocks in a model, `mxdsurgery.base.proof` makes sure that they compute what is said here.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxdsurgery.base.offload import resident


@dataclass(frozen=True)
class Part:
    """One linear map of a block, or the share of a fused map that plays one role.

    Attributes:
        path: the module, from the base model (``layers.3.mlp.gate_proj``).
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.
        outputs: (start, stop, step) of the fused map's outputs; None for all.
        scale: what the block multiplies the map's output with; for an encoder, before the activation.
        scaled_by: path, from the base model, of a parameter of one element that the output is also multiplied with.
    """

    path: str
    transposed: bool = False
    outputs: tuple[int, int, int] | None = None
    scale: float = 1.0
    scaled_by: str | None = None

    def weight(self, root: nn.Module) -> Tensor:
        """(out, in): this part's share of the module's weight, multiplied with the block's factors."""
        weight = root.get_submodule(self.path).weight
        return self._share(root, weight.T if self.transposed else weight)

    def bias(self, root: nn.Module) -> Tensor | None:
        """(out,): the same of the bias; None where the map has none."""
        bias = root.get_submodule(self.path).bias
        return None if bias is None else self._share(root, bias)

    def _share(self, root: nn.Module, tensor: Tensor) -> Tensor:
        tensor = tensor if self.outputs is None else tensor[slice(*self.outputs)]
        if self.scaled_by is not None:
            owner, _, name = self.scaled_by.rpartition(".")
            with resident(root.get_submodule(owner)):
                tensor = tensor * root.get_submodule(owner).get_parameter(name)
        return tensor if self.scale == 1.0 else tensor * self.scale

    def relocate(self, old: str, new: str) -> "Part":
        """See `Block.relocate`."""
        scaled_by = self.scaled_by and rebase(self.scaled_by, old, new)
        return dataclasses.replace(self, path=rebase(self.path, old, new), scaled_by=scaled_by)


@dataclass(frozen=True)
class Block:
    """An MLP block of a decoder layer.

    Attributes:
        layer: index of the decoder layer.
        path: the module that is replaced, from the base model.
        bypass: other modules of the block, which become identities. Empty unless its maps stand in the decoder layer itself,
            or in a module that takes more than hidden states: there, no single module can be replaced.
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
        activation_path: the activation's module, from the base model, if it has parameters; else None.
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
    activation_path: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Block":
        """From what `dataclasses.asdict` gave, by way of JSON."""
        read = dict(values) | {"bypass": tuple(values["bypass"])}
        for name in ("encoder", "encoder_up", "decoder"):
            part = values[name]
            if part is not None:
                outputs = part["outputs"]
                read[name] = Part(part["path"], part["transposed"], outputs and tuple(outputs))
        return cls(**read)

    @property
    def output_path(self) -> str:
        """The module whose output is the block's: the replaced one, or the last of the bypassed ones."""
        return self.bypass[-1] if self.bypass else self.path

    @property
    def holder_path(self) -> str:
        """The module that holds all of it: the replaced one, or the one in which it and the bypassed ones stand."""
        return self.path.rpartition(".")[0] if self.bypass else self.path

    @property
    def parts(self) -> list[Part]:
        """Its parts, in the order of the dataflow."""
        return [part for part in (self.encoder, self.encoder_up, self.decoder) if part is not None]

    def relocate(self, old: str, new: str, layer: int) -> "Block":
        """The same structure seen from elsewhere: the leading modules ``old`` of every path replaced by ``new``."""
        return dataclasses.replace(
            self,
            layer=layer,
            path=rebase(self.path, old, new),
            bypass=tuple(rebase(path, old, new) for path in self.bypass),
            encoder=self.encoder.relocate(old, new),
            encoder_up=self.encoder_up and self.encoder_up.relocate(old, new),
            decoder=self.decoder.relocate(old, new),
            activation_path=self.activation_path and rebase(self.activation_path, old, new),
        )

    def act(self, root: nn.Module) -> nn.Module:
        """Its activation, with the parameters that it has learned, if any."""
        return ACT2FN[self.activation] if self.activation_path is None else root.get_submodule(self.activation_path)

    def hidden(self, root: nn.Module, x: Tensor) -> Tensor:
        """The hidden units recomputed from the extracted weights: x (..., D) -> z (..., H)."""
        z = self.act(root)(nn.functional.linear(x, self.encoder.weight(root), self.encoder.bias(root)))
        if self.encoder_up is None:
            return z
        return z * nn.functional.linear(x, self.encoder_up.weight(root), self.encoder_up.bias(root))

    def output(self, root: nn.Module, z: Tensor) -> Tensor:
        """The block's output from its hidden units: z (..., H) -> y (..., D)."""
        return nn.functional.linear(z, self.decoder.weight(root), self.decoder.bias(root))


def distinct(blocks: Iterable[Block]) -> list[Block]:
    """Each block once: several new layers may stand for the same one."""
    return list({block.layer: block for block in blocks}.values())


def rebase(path: str, old: str, new: str) -> str:
    """A module path with its leading modules ``old`` replaced by ``new``; either may be empty."""
    inner = path[len(old) :].lstrip(".")
    return ".".join(piece for piece in (new, inner) if piece)
