"""What a vector in a model's residual stream does to the next token directly: through the last norm and the unembedding."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.decoder import decoder_layers


@dataclass(frozen=True)
class Unembedding:
    """The linear map from a direction of the residual stream to logits, up to the last norm's scale.

    The norm divides by a size that depends on the whole stream, not on the direction; the rest of it is linear: a gain for
    each dimension and, in a LayerNorm, subtracting the mean.

    Attributes:
        weight: (V, D) float32: all of that in one matrix, less its mean over the vocabulary.
    """

    weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Unembedding":
        """Of a causal language model. The last norm is found by structure, its gain by running it."""
        weight = model.get_output_embeddings().weight.float()
        path, _ = decoder_layers(model)
        last = None
        for name, module in model.base_model.named_modules():
            outside = not name.startswith(f"{path}.")
            if outside and getattr(module, "weight", None) is not None and module.weight.shape == weight.shape[1:]:
                last = module
        if last is not None:
            signs = torch.ones_like(weight[0])
            signs[1::2] = -1  # of mean zero and size one, so that a norm leaves its gain
            weight = weight * ((_run(last, signs) - _run(last, -signs)) / 2 * signs)
            if isinstance(last, nn.LayerNorm) or torch.allclose(_run(last, signs + 3), _run(last, signs), atol=1e-3):
                weight = weight - weight.mean(-1, keepdim=True)
        return cls(weight - weight.mean(0))

    def logits(self, directions: Tensor) -> Tensor:
        """What directions (n, D) add to the logits: (n, V) float32, each less its mean over the vocabulary."""
        return directions.float() @ self.weight.T


def _run(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype)).float()
