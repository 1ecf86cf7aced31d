"""``analyze``: which MLP blocks a model has, from its config alone."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import width
from mxdsurgery.base.finding import Finding, find_blocks
from mxdsurgery.base.model import BaseModel, open_model
from mxdsurgery.base.selection import select_layers, write_layers
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.terminal.console import compact

_CONVERTIBLE = "an MLP (out act(in x)) or GLU (down (act(gate x) * up x)) block whose output can be recomputed"


@dataclass(frozen=True)
class Analysis:
    """A model's decoder layers and the block in each.

    Attributes:
        model: as it was named.
        revision: the commit on the hub, where it came from there.
        model_type: transformers' name of the architecture.
        architecture: the causal language model's class.
        d_model: D.
        parameters: of the whole model, tied weights counted once.
        layers: what each decoder layer holds.
    """

    model: str
    revision: str | None
    model_type: str
    architecture: str
    d_model: int
    parameters: int
    layers: list[Finding]

    def select(self, selection: str) -> tuple[list[Block], dict[str, str]]:
        """The blocks that a ``layers`` value names; and the layers that ``all`` leaves out, as a selection, by reason.

        Some models mix kinds of layers: ``all`` means all that can be converted; a layer named by its number has to be one.

        Raises:
            LayerSelectionError: the value cannot be read, or names a layer that the model does not have.
            UnsupportedBlockError: a named layer cannot be converted, or no layer can.
        """
        chosen = select_layers(selection, len(self.layers))
        left: dict[str, list[int]] = {}
        if selection.strip() == "all":
            for finding in self.layers:
                if finding.block is None:
                    left.setdefault(finding.reason, []).append(finding.layer)
            chosen = [finding.layer for finding in self.layers if finding.block is not None]
        reasons = {reason: write_layers(layers) for reason, layers in left.items()}
        if not chosen:
            raise UnsupportedBlockError(
                f"no layer of {self.model!r} can be converted: "
                + "; ".join(f"layers {layers}: {reason}" for reason, layers in reasons.items()),
                expected=_CONVERTIBLE,
            )
        return [self._block(index) for index in chosen], reasons

    def _block(self, index: int) -> Block:
        finding = self.layers[index]
        if finding.block is None:
            able = [other.layer for other in self.layers if other.block is not None]
            raise UnsupportedBlockError(
                f"layer {index} ({finding.path}) of {self.model!r} cannot be converted: {finding.reason}",
                expected=_CONVERTIBLE,
                fix=f"choose among the others: --layers {write_layers(able)}" if able else None,
            )
        return finding.block

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a row per layer, with ``reason`` in place of a block where it cannot be converted."""
        rows = []
        for finding in self.layers:
            row: dict[str, Any] = {
                "layer": finding.layer,
                "path": finding.path,
                "convertible": finding.block is not None,
            }
            if finding.block is None:
                row["reason"] = finding.reason
            else:
                block = dataclasses.asdict(finding.block)
                row |= block | {"share": finding.block.parameters / self.parameters, "proof_error": finding.error}
            rows.append(row)
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "layers": rows}

    def table(self) -> Table:
        """For a terminal."""
        title = f"{escape(self.model)}: {self.architecture}, {compact(self.parameters)} parameters, D = {self.d_model}"
        table = Table("layer", "block", "kind", "activation", "H", "biases", "parameters", "share", title=title)
        for finding in self.layers:
            block = finding.block
            if block is None:
                table.add_row(str(finding.layer), finding.path, "-", f"[red]{finding.reason}[/red]")
                continue
            biases = "+".join(n for n, has in (("in", block.encoder_bias), ("out", block.decoder_bias)) if has) or "none"
            table.add_row(
                str(block.layer),
                block.path,
                block.kind,
                block.activation,
                str(block.d_hidden),
                biases,
                compact(block.parameters),
                f"{block.parameters / self.parameters:.1%}",
            )
        return table


@guarded
def analyze(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Analysis:
    """Finds the MLP block of each decoder layer, on the meta device: no weights are read, a 70 B model takes seconds.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: see `open_model`.

    Raises:
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError: see `open_model`.
    """
    return analysis_of(open_model(model, revision, trust_remote_code))


def analysis_of(base: BaseModel) -> Analysis:
    """As `analyze`, of a model that is open already."""
    return Analysis(
        model=base.name,
        revision=base.commit,
        model_type=base.config.model_type,
        architecture=type(base.skeleton).__name__,
        d_model=width(base.skeleton),
        parameters=base.skeleton.num_parameters(),
        layers=find_blocks(base.skeleton),
    )
