"""The Mixture-of-Decoders layer. It travels with every exported checkpoint, beside sparse.py: torch and transformers only.

Source: Oldfield et al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with Mixture of
Decoders", NeurIPS 2025, arXiv 2505.21364. With D the model width, H the hidden width, N the experts and K the active ones:

    a = TopK(relu(G x + b_g))              (N,)  the expert coefficients, K of them nonzero
    z = phi(E x + b_e)                     (H,)  the hidden units of an MLP block, or
        psi(E_g x + b_eg) * (E_u x + b_eu)       those of a GLU block
    y = (Cᵀ a) * (D z) + b                 (D,)  elementwise product

so that expert n is the linear map ``W_n = diag(c_n) D`` of the hidden units and ``y = Σ_n a_n W_n z + b`` exactly.

Shapes: x and y (..., D); G and C (N, D); E (H, D); D (D, H); "..." is any number of batch dimensions, usually (B, T).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .sparse import mix, sparse_gate


class Coefficients(NamedTuple):
    """The expert coefficients of some tokens, sparsely: ``a[indices] = values`` and zero elsewhere.

    ``values`` (..., K) are non-negative, float32 or wider; ``indices`` (..., K) int64 in [0, N), in no particular order, each
    at most once per token. A hook may return more or fewer than K of them.
    """

    values: Tensor
    indices: Tensor

    def dense(self, n_experts: int) -> Tensor:
        """The same coefficients as a dense (..., N) tensor, in the dtype of ``values``."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_experts)
        return zeros.scatter_add(-1, self.indices, self.values)


class Gate(nn.Module):
    """Chooses the experts: ``a = TopK(relu(G x + b_g))``.

    Its output, a `Coefficients`, is the one place where the expert coefficients can be read and changed: an ordinary
    forward hook on this module sees them, and what it returns is what the experts get.
    """

    def __init__(self, d_model: int, n_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.selection: torch.dtype | None = None  # of the ranking of all N experts; None: the weight's own
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # G
        self.bias = nn.Parameter(torch.empty(n_experts))  # b_g
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """G as a default linear layer, uniform in +-1/sqrt(D); b_g zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def pre_activations(self, x: Tensor) -> Tensor:
        """``G x + b_g``: (..., D) -> (..., N). Dense; for the slow path and for looking at."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Coefficients:
        """(..., D) -> coefficients (..., K)."""
        flat = x.reshape(-1, x.shape[-1])
        values, indices = sparse_gate(flat, self.weight, self.bias, self.k, self.selection)
        shape = (*x.shape[:-1], self.k)
        return Coefficients(values.view(shape), indices.view(shape))


class Experts(nn.Module):
    """The experts' output scales: row n of C, ``c_n`` (D,), says how expert n scales the decoder's output."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # C
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random rows, uniform in the cube and then of unit length."""
        nn.init.uniform_(self.weight, -1.0, 1.0)
        self.normalize()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scales each row of C to unit length, in place."""
        self.weight.div_(torch.linalg.vector_norm(self.weight, dim=1, keepdim=True).clamp_min(1e-12))

    def forward(self, a: Coefficients) -> Tensor:
        """``Cᵀ a``: coefficients (..., K) -> (..., D), touching only the K chosen rows of C."""
        active = a.values.shape[-1]
        mixed = mix(a.values.reshape(-1, active), a.indices.reshape(-1, active), self.weight)
        return mixed.view(*a.values.shape[:-1], -1)


class MxDLayer(nn.Module):
    """A drop-in replacement for an MLP block: x (..., D) -> y (..., D).

    Args:
        d_model: D, model width.
        d_hidden: H, hidden width.
        n_experts: N.
        k: K, experts active per token, at most N.
        kind: ``mlp`` or ``glu``, as the block that is replaced.
        activation: transformers' name of the activation, for example ``silu`` or ``gelu_new``.
        encoder_bias: whether the encoder has biases, as the block's.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_hidden: int,
        n_experts: int,
        k: int,
        kind: str,
        activation: str,
        encoder_bias: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.gate = Gate(d_model, n_experts, k)
        self.experts = Experts(d_model, n_experts)
        self.encoder = nn.Linear(d_model, d_hidden, bias=encoder_bias)  # E; E_g of a GLU
        self.encoder_up = nn.Linear(d_model, d_hidden, bias=encoder_bias) if kind == "glu" else None  # E_u
        self.activation = ACT2FN[activation]
        self.decoder = nn.Linear(d_hidden, d_model, bias=False)  # D
        self.bias = nn.Parameter(torch.empty(d_model))  # b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's start: E and G as default linear layers, C random unit rows, D and all biases zero."""
        for linear in (self.encoder, self.encoder_up):
            if linear is not None and linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.bias)

    def hidden(self, x: Tensor) -> Tensor:
        """``z``, the block's own kind of hidden units: (..., D) -> (..., H)."""
        z = self.activation(self.encoder(x))
        return z if self.encoder_up is None else z * self.encoder_up(x)

    def forward(self, x: Tensor) -> Tensor:
        """``y = (Cᵀ a) * (D z) + b``."""
        return self.combine(self.gate(x), x)

    def combine(self, a: Coefficients, x: Tensor) -> Tensor:
        """The output for given coefficients: a (..., K), x (..., D) -> (..., D)."""
        return self.experts(a) * self.decoder(self.hidden(x)) + self.bias

    def forward_dense(self, x: Tensor) -> Tensor:
        """The same by the formula as it is written, with every expert: (tokens, N) matrices, autograd through all of it.

        Slow; here to be read and to test `forward` against.
        """
        pre = self.gate.pre_activations(x).relu()
        top = torch.topk(pre, self.gate.k, dim=-1)
        a = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        return (a @ self.experts.weight) * self.decoder(self.hidden(x)) + self.bias


class MxDSurgeryMixin:
    """Makes a transformers model class into one whose chosen MLP blocks are `MxDLayer`s.

    Put before the family's own class: ``class MxDLlamaForCausalLM(MxDSurgeryMixin, LlamaForCausalLM)``. The config's
    ``mxd["layers"]`` says what stands where: ``path`` (relative to the base model) is the module that is replaced,
    ``bypass`` the modules beside it that become identities, ``shape`` the `MxDLayer`'s arguments.
    """

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        for entry in config.mxd["layers"]:
            for path in entry["bypass"]:
                self.base_model.set_submodule(path, nn.Identity())
            self.base_model.set_submodule(entry["path"], MxDLayer(**entry["shape"]))

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights for a model made from a config. What a checkpoint has loaded, transformers does not touch."""
        if isinstance(module, (MxDLayer, Gate, Experts)):
            module.reset_parameters()
        else:
            super()._init_weights(module)
