"""How alike experts are: the cosine of any two.

Shapes: N experts, D model width, R the sum of the ranks of transforms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdsurgery.layers.baselines import Transforms
from mxdsurgery.layers.layer import Experts

# Elements of the products of rows that are formed at once.
_ELEMENTS = 2**24


class Cosines:
    """Cosines of experts, of vectors c_n (N, D) or of the matrices ``U_n V_n`` of transforms.

    ``<U_n V_n, U_m V_m>`` is the sum of the products of ``U_nᵀ U_m`` and ``V_n V_mᵀ``, so no matrix (D, D) is formed.

    Attributes:
        n_experts: N.
        device: where they are computed.
    """

    def __init__(self, experts: Experts | Transforms | Tensor) -> None:
        self.table: Tensor | None = None
        self.device = (experts if isinstance(experts, Tensor) else experts.weight).device
        if isinstance(experts, Transforms):
            products = _products(experts)
            size = products.diagonal().clamp_min(1e-24).sqrt()
            self.table = products / size / size[:, None]
        else:
            self.unit = F.normalize((experts if isinstance(experts, Tensor) else experts.weight).float(), dim=1)
        self.n_experts = len(self.unit if self.table is None else self.table)

    def of(self, n: Tensor) -> Tensor:
        """Those of some experts (E,) with all: (E, N), a new tensor."""
        return self.unit[n] @ self.unit.T if self.table is None else self.table[n]


def _products(experts: Transforms) -> Tensor:
    """``<U_n V_n, U_m V_m>``: (N, N)."""
    write, read = experts.weight.float(), experts.reads.float()
    ranks = torch.tensor([rank for rank, count in experts.ranks for _ in range(count)], device=write.device)
    owner = torch.arange(len(ranks), device=write.device).repeat_interleave(ranks)  # (R,)
    found = write.new_zeros(len(ranks), len(ranks))
    for rows in torch.arange(len(owner), device=write.device).split(max(1, _ELEMENTS // len(owner))):
        product = (write[rows] @ write.T) * (read[rows] @ read.T)  # (some, R)
        by_expert = product.new_zeros(len(rows), len(ranks)).index_add(1, owner, product)
        found.index_add_(0, owner[rows], by_expert)
    return found
