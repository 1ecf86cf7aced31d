"""Whether a layer computes the same function near the text's points, too: how far its Jacobian is from its block's.

    jacobian_nmse = E ‖J_layer(x) v - J_block(x) v‖² / E ‖J_block(x) v‖²

over inputs x of the original block on held-out text, position 0 left out, and a random direction v of each: a standard normal
one, so that the mean over directions is the squared Frobenius norm (Hutchinson's estimate). 0: the same derivative everywhere;
1: as far from it as a layer that is constant. A layer can have small errors and another derivative, as it can look up what the
block computes. Where the choice of experts jumps, the derivative is that of the experts chosen.

Shapes: S contexts, B of them at a time, T tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jvp  # by two backward passes, which every device has

from mxdsurgery.base.activations import Activations
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.offload import resident
from mxdsurgery.hardware.device import widest
from mxdsurgery.measuring.intervals import Table, with_interval
from mxdsurgery.planning.effort import jacobian_inputs


class JacobianErrors:
    """Sums the errors of layers' Jacobians over the contexts of a text, batch by batch.

    Args:
        blocks: whose inputs are given to `add`, of the model ``root``.
        root: the base model.
        candidates: sets of layers that replace the blocks.
        contexts: S.
        length: T.

    Attributes:
        inputs: at how many inputs derivatives are taken, in all contexts together.
    """

    def __init__(
        self, blocks: Sequence[Block], root: nn.Module, candidates: Sequence[dict[int, nn.Module]], contexts: int, length: int
    ) -> None:
        self.blocks, self.root, self.candidates = {block.layer: block for block in blocks}, root, candidates
        self.each = jacobian_inputs(contexts, length)
        self.inputs = contexts * self.each
        self.generator = torch.Generator().manual_seed(0)
        self.table = Table()

    @torch.no_grad()
    def add(self, recorded: Mapping[int, Activations]) -> None:
        """Counts a batch in: the blocks' activations (B, T, D), by layer; all have the same positions and directions."""
        some = next(iter(recorded.values())).x
        rows, length, width = some.shape
        order = torch.rand(rows, length - 1, generator=self.generator).argsort(dim=1)
        positions = (1 + order[:, : self.each]).to(some.device)
        v = torch.randn(rows * self.each, width, generator=self.generator).to(some)
        for layer, activations in recorded.items():
            x = activations.x.gather(1, positions[:, :, None].expand(-1, -1, width)).flatten(0, 1)
            wanted = self._block_product(self.blocks[layer], x, v)
            self._add(f"{layer}", wanted, rows)
            for number, layers in enumerate(self.candidates):
                with resident(layers[layer]):  # where weights lie on disk, reading them is nothing to differentiate
                    product = jvp(layers[layer], x, v)[1]
                self._add(f"{number} at {layer}", product - wanted, rows)

    def _block_product(self, block: Block, x: Tensor, v: Tensor) -> Tensor:
        """``J_block(x) v``: x and v (n, D) -> (n, D)."""
        with ExitStack() as stack:
            for path in {part.path for part in block.parts} | ({block.activation_path} - {None}):
                stack.enter_context(resident(self.root.get_submodule(path)))
            return jvp(lambda x: block.output(self.root, block.hidden(self.root, x)), x, v)[1]

    def _add(self, name: str, product: Tensor, rows: int) -> None:
        squares = product.to(widest(product.device)).square().sum(-1)
        self.table.add(name, {"square": squares.view(rows, -1).sum(1).cpu().double()})

    def figure(self, number: int, layers: Sequence[int]) -> dict[str, Any]:
        """``jacobian_nmse`` of a candidate with its interval: the mean over some layers, each on the original's inputs."""
        columns = self.table.columns()
        error, size = (torch.stack([columns[f"{name}{layer}.square"] for layer in layers]) for name in (f"{number} at ", ""))
        return with_interval("jacobian_nmse", error, size)
