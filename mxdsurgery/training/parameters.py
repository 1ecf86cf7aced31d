"""How many parameters a layer of each kind has, and the N with which it has as many as a budget allows.

Shapes: D model width, H hidden width, N experts.
"""

import bisect

from mxdsurgery.base.blocks import Block
from mxdsurgery.layers.low_rank import total_rank


def layer_parameters(block: Block, n_experts: int, kind: str = "mxd", shared: bool = False) -> int:
    """Parameters that a layer of some kind for a block trains: its dense part, bias, gate with biases, experts."""
    d, h = block.d_model, block.d_hidden
    encoder = h * (d + block.encoder_bias) * (2 if block.kind == "glu" else 1)
    dense = {"mxd": encoder + h * d, "dense": encoder + h * d, "skip-transcoder": d * d}.get(kind, 0)
    each = n_experts * (d + 1) + 2 * d * total_rank(d, n_experts) if kind == "molt" else n_experts * (2 * d + 1)
    return dense + d * (1 + shared) + each


def transcoder_parameters(block: Block, expansion: float) -> float:
    """Parameters of a transcoder of ``expansion`` times D features: the budget that other layers are matched to."""
    return expansion * block.d_model * (2 * block.d_model + 1) + block.d_model


def matched_n_experts(block: Block, budget: float, kind: str = "mxd") -> int:
    """N such that a layer of some kind has about as many parameters as a budget allows; at least 1, 0 for kind dense.

    A transcoder with ``m D`` features has ``P = m D (2D + 1) + D``; an MxD layer of as many solves ``P = enc + H D + D +
    N (2D + 1)``, where ``enc = H (D + 1)`` for an MLP and twice that for a GLU. Source: arXiv 2505.21364. A MOLT's transform
    of rank r has ``(2r + 1) D + 1``.
    """
    if kind == "dense":
        return 0
    if kind == "molt":
        most = range(1, int(budget // block.d_model) + 2)  # each has more parameters than D
        return max(1, bisect.bisect_right(most, budget, key=lambda n: layer_parameters(block, n, kind)))
    d, h = block.d_model, block.d_hidden
    encoder = h * (d + 1) * (2 if block.kind == "glu" else 1)
    dense = {"mxd": encoder + h * d, "skip-transcoder": d * d}.get(kind, 0)
    return max(1, int((budget - dense - d) / (2 * d + 1)))
