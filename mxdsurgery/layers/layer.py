"""The Mixture-of-Decoders layer. It travels with every exported checkpoint, with sparse.py: torch and transformers only.

Source: Oldfield et al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with Mixture of
Decoders", NeurIPS 2025, arXiv 2505.21364. With D the model width, H the hidden width, N the experts and K the active ones:

    a = TopK(relu(G x + b_g))              (N,)  the expert coefficients, K of them nonzero
    z = phi(E x + b_e)                     (H,)  the hidden units of an MLP block, or
        psi(E_g x + b_eg) * (E_u x + b_eu)       those of a GLU block
    y = (Cᵀ a) * (D z) + b                 (D,)  elementwise product

so that expert n is the linear map ``W_n = diag(c_n) D`` of the hidden units and ``y = Σ_n a_n W_n z + b`` exactly. Where there
is a shared expert, ``c_0`` is added to ``Cᵀ a`` for every token: ``y = W_0 z + Σ_n a_n W_n z + b``.

Shapes: x and y (..., D); G and C (N, D); E (H, D); D (D, H); "..." is any number of batch dimensions, usually (B, T).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .sparse import is_transformed, mix, sparse_gate

# With `batchtopk` and `jumprelu` no token keeps more than so many times K experts, which bounds the memory.
BATCH_TOP_K_LIMIT = 4
# The moving average of the `batchtopk` threshold follows the batches with a time constant of about so many steps.
_THRESHOLD_STEPS = 20


class Coefficients(NamedTuple):
    """The expert coefficients of some tokens, stored sparsely: ``a[indices] = values`` and zero elsewhere.

    ``values`` (..., K) are non-negative, float32 or wider; ``indices`` (..., K) int64 in [0, N), in no particular order, each
    at most once per token. A hook or an intervention may give more or fewer than K of them, of any sign, and several for one
    expert, which then add up.
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
    forward hook on this module sees them, and what it returns is what the experts get. ``interventions``, which
    ``model.mxd`` sets and takes away, changes them before that.

    Args:
        d_model: D.
        n_experts: N.
        k: K.
        sparsity: ``topk``: each token keeps its K largest pre-activations. ``batchtopk`` (Bussmann et al., arXiv 2412.06410):
            in training, a batch of n tokens keeps its n K largest, so that a token has K on average and at most
            ``BATCH_TOP_K_LIMIT`` K; afterwards, each token keeps those that reach the threshold from training. ``jumprelu``
            (Rajamanoharan et al., arXiv 2407.14435): each expert has a threshold of its own, and fires where its
            pre-activation exceeds it, with that pre-activation as its coefficient; a token keeps the ``BATCH_TOP_K_LIMIT`` K
            that exceed theirs by most. Training learns the thresholds such that it is K on average.
    """

    # Stays in float32 whatever the layer is cast to: rounded to bfloat16, the threshold keeps some per cent more or fewer.
    IN_FLOAT32 = ("threshold",)

    def __init__(self, d_model: int, n_experts: int, k: int, sparsity: str = "topk") -> None:
        super().__init__()
        self.k, self.sparsity = k, sparsity
        self.selection: torch.dtype | None = None  # dtype of the ranking of all N experts; None: the weight's own
        self.interventions: Callable[[Gate, Tensor], Coefficients] | None = None
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # G
        self.bias = nn.Parameter(torch.empty(n_experts))  # b_g
        # The smallest pre-activation that `batchtopk` keeps, or each expert's (N,) of `jumprelu`; None: each token keeps K.
        shape = {"batchtopk": (), "jumprelu": (n_experts,)}.get(sparsity)
        self.register_buffer("threshold", None if shape is None else torch.zeros(shape, dtype=torch.float32))
        self.learning: Any = None  # what learns the thresholds of `jumprelu` while it trains
        self.reset_parameters()

    def _apply(self, fn, recurse=True):
        """What ``.to()``, ``.half()`` and the like do with every module, without rounding the threshold."""
        exact = self.threshold
        super()._apply(fn, recurse)
        if exact is not None and self.threshold.dtype != torch.float32:
            self.threshold = exact.to(self.threshold.device, torch.float32)
        return self

    def reset_parameters(self) -> None:
        """G as a default linear layer, uniform in +-1/sqrt(D); b_g zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    @property
    def n_experts(self) -> int:
        """N."""
        return len(self.weight)

    @property
    def active(self) -> int:
        """How many coefficients of a token can be nonzero: K, or the limit of ``batchtopk`` and ``jumprelu``."""
        return self.k if self.threshold is None else min(BATCH_TOP_K_LIMIT * self.k, self.n_experts)

    def pre_activations(self, x: Tensor) -> Tensor:
        """``G x + b_g``: (..., D) -> (..., N). Dense; for `MxDLayer.forward_dense` and for inspection."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Coefficients:
        """(..., D) -> coefficients (..., K), or where there are thresholds (..., `active`), zero where not kept."""
        interventions = self.interventions  # another thread may take them away
        return self.choose(x, self.bias) if interventions is None else interventions(self, x)

    def choose(self, x: Tensor, bias: Tensor, spare: int = 0) -> Coefficients:
        """As `forward`, with another bias (N,), and with the ``spare`` experts that rank next: (..., `active` + ``spare``)."""
        active, flat = min(self.active + spare, self.n_experts), x.reshape(-1, x.shape[-1])
        if self.threshold is not None and self.threshold.ndim:
            values, indices = self._jump(flat, bias, active)
        else:
            values, indices = sparse_gate(flat, self.weight, bias, active, self.selection)
            if self.threshold is not None:
                kept = self._batch_threshold(values) if self.training else self.threshold
                values = values * (values >= kept)
        shape = (*x.shape[:-1], active)
        return Coefficients(values.view(shape), indices.view(shape))

    def _jump(self, x: Tensor, bias: Tensor, active: int) -> tuple[Tensor, Tensor]:
        """``z H(z - θ)`` of the pre-activations z that exceed their thresholds by most: (n, D) -> (n, ``active``) each."""
        learning = self.learning if self.training and not is_transformed() else None
        if learning is not None and not learning.begun:
            learning.begin(x)
        margins, indices = sparse_gate(x, self.weight, bias - self.threshold, active, self.selection, relu=False)
        values = torch.where(margins > 0, margins + self.threshold[indices], 0)
        if learning is not None:
            values = learning.watched(values, margins, indices)
        return values, indices

    @torch.no_grad()
    def _batch_threshold(self, values: Tensor) -> Tensor:
        """The (n K)-th largest of the values (n, `active`) of a batch; updates the moving average with it."""
        kept = values.flatten().topk(self.k * len(values), sorted=False).values.min()
        if is_transformed():  # a derivative is no step of training, and torch.func has no room for the update
            return kept
        exact, first = kept.to(self.threshold.dtype), self.threshold == 0
        self.threshold.copy_(torch.where(first, exact, torch.lerp(self.threshold, exact, 1 / _THRESHOLD_STEPS)))
        return kept


class Experts(nn.Module):
    """The experts' output scales: row n of C, ``c_n`` (D,), says how expert n scales the decoder's output.

    Args:
        d_model: D.
        n_experts: N.
        bias: whether there is a shared expert ``c_0`` (D,), that is added to the chosen experts' sum for every token: as
            training starts with (`init: shared`), or where a model was steered for good. After DeepSeekMoE, arXiv 2401.06066.
    """

    def __init__(self, d_model: int, n_experts: int, bias: bool = False) -> None:
        super().__init__()
        self.interventions: Callable[[Experts, Coefficients], Tensor] | None = None  # replaces rows of C
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # C
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random rows, uniform in [-1, 1]^D and then scaled to unit length; the constant is zero."""
        nn.init.uniform_(self.weight, -1.0, 1.0)
        self.normalize()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def normalize(self) -> None:
        """Scales each row of C to unit length, in place."""
        self.weight.div_(torch.linalg.vector_norm(self.weight, dim=1, keepdim=True).clamp_min(1e-12))

    def forward(self, a: Coefficients) -> Tensor:
        """``Cᵀ a``: coefficients (..., K) -> (..., D), touching only the K chosen rows of C."""
        interventions = self.interventions
        return self.mix(a) if interventions is None else interventions(self, a)

    def term(self, n: Tensor, said: Tensor) -> Tensor:
        """What experts n (E,) add, each for its own said = ``a_n m`` (E, ..., D) or (E, ..., 1): ``c_n * said``."""
        return self.weight[n].view(len(n), *[1] * (said.ndim - 2), -1) * said

    def mix(self, a: Coefficients) -> Tensor:
        """As `forward`, with the module's own C whatever ``interventions`` says."""
        active = a.values.shape[-1]
        mixed = mix(a.values.reshape(-1, active), a.indices.reshape(-1, active), self.weight)
        mixed = mixed.view(*a.values.shape[:-1], -1)
        return mixed if self.bias is None else mixed + self.bias


class DenseLayer(nn.Module):
    """An MLP block with plain linear maps, ``y = D z + b``: an MxD layer without its experts, which also serves as a control.

    Args:
        d_model: D, model width.
        d_hidden: H, hidden width.
        kind: ``mlp`` or ``glu``, as the block that is replaced.
        activation: transformers' name of the activation, for example ``silu`` or ``gelu_new``.
        encoder_bias: whether the encoder has biases, as the block's.
    """

    def __init__(self, *, d_model: int, d_hidden: int, kind: str, activation: str, encoder_bias: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_model, d_hidden, bias=encoder_bias)  # E; E_g of a GLU
        self.encoder_up = nn.Linear(d_model, d_hidden, bias=encoder_bias) if kind == "glu" else None  # E_u
        self.activation = ACT2FN[activation].to(torch.get_default_dtype())  # ACT2FN makes one with parameters in bf16
        self.decoder = nn.Linear(d_hidden, d_model, bias=False)  # D
        self.bias = nn.Parameter(torch.empty(d_model))  # b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E as a default linear layer, D and all biases zero."""
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
        """``y = D z + b``: (..., D) -> (..., D)."""
        return self.decoder(self.hidden(x)) + self.bias

    def dense_path(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts' sum, if any, is multiplied with, and what is then added: ``D z`` (..., D), ``b`` (D,)."""
        return self.decoder(self.hidden(x)), self.bias


class MxDLayer(DenseLayer):
    """A drop-in replacement for an MLP block: x (..., D) -> y (..., D).

    Args:
        n_experts: N.
        k: K, experts active per token, at most N.
        sparsity: ``topk``, ``batchtopk`` or ``jumprelu``; see `Gate`.
        expert_bias: see `Experts`.
        block: the arguments of `DenseLayer`.
    """

    def __init__(self, *, n_experts: int, k: int, sparsity: str = "topk", expert_bias: bool = False, **block) -> None:
        super().__init__(**block)
        self.gate = Gate(block["d_model"], n_experts, k, sparsity)
        self.experts = Experts(block["d_model"], n_experts, expert_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``y = (Cᵀ a) * (D z) + b``."""
        return self.combine(self.coefficients(x), x)

    def coefficients(self, x: Tensor) -> Coefficients:
        """The experts' coefficients for the block's input x (..., D)."""
        return self.gate(x)

    def combine(self, a: Coefficients, x: Tensor) -> Tensor:
        """The output for given coefficients: a (..., K), x (..., D) -> (..., D)."""
        scale, rest = self.dense_path(x)
        return self.mixture(a, x) * scale + rest

    def mixture(self, a: Coefficients, x: Tensor) -> Tensor:
        """The experts' sum ``Cᵀ a`` (..., D), which does not depend on x otherwise."""
        return self.experts(a)

    def forward_dense(self, x: Tensor) -> Tensor:
        """`forward` of ``topk`` by the formula as it is written, over all N experts: (tokens, N) matrices, all by autograd.

        Slow; a reference to read and to test `forward` against.
        """
        pre = self.gate.pre_activations(x).relu()
        top = torch.topk(pre, self.gate.k, dim=-1)
        a = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        mixed = a @ self.experts.weight
        mixed = mixed if self.experts.bias is None else mixed + self.experts.bias
        return mixed * self.decoder(self.hidden(x)) + self.bias
