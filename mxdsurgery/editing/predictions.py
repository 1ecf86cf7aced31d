"""A converted model with a text that it predicts, and how much a prediction changed: what `effect` and `sweep` start from.

Shapes: S contexts, B of them at a time, T tokens, V vocabulary, n predictions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.decoder import decoder_layers, vocabulary_size
from mxdsurgery.checkpoint.converted import Converted, load_with_recipe
from mxdsurgery.hardware.device import widest
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.measuring.intervals import scored_predictions
from mxdsurgery.text.packing import in_batches
from mxdsurgery.text.places import check_there, text_name

# What passes through a model together may take so many bytes of logits, or of what is copied for it.
HELD_BYTES = 2**30
# exp of this still fits float32.
_LARGEST_SHIFT = 80.0


@dataclass(frozen=True)
class Opened:
    """A converted model and a text, on the device.

    Attributes:
        converted: the model.
        input_ids: contexts, (S, T) int64.
        batch: tokens per forward pass.
        data: the text's name.
        trained_on: how many of the contexts the model was trained on; None: that is not recorded.
    """

    converted: Converted
    input_ids: Tensor
    batch: int
    data: str
    trained_on: int | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.converted.model

    @property
    def decoder(self) -> nn.ModuleList:
        """Its decoder layers."""
        return decoder_layers(self.model)[1]

    def batches(self) -> tuple[Tensor, ...]:
        """The contexts, as many at a time as ``batch`` and the memory for two models' logits hold: (B, T) each."""
        return in_batches(self.input_ids, fewer_for_logits(self.batch, self.model))

    def rests_on(self) -> dict[str, Any]:
        """What figures rest on: the text, how many predictions are scored, and how many contexts were trained on."""
        sequences, context = self.input_ids.shape
        tokens = sequences * scored_predictions(self.input_ids)
        rests_on = {"data": self.data, "tokens": tokens, "sequences": sequences, "context": context}
        return rests_on | {"trained_on": self.trained_on}


def open_on_text(
    folder: str | Path,
    *,
    data: str | None,
    tokens: int | None,
    text_column: str | None,
    device: str | None,
    compute: str,
    trust_remote_code: bool = False,
) -> Opened:
    """Loads a converted model and the text to run it on, as `evaluate` does.

    Raises:
        NotConvertedError: the folder is not one of ours.
        DataError: the text cannot be read or is too short.
        DeviceError: the device is not there.
    """
    check_there(data)
    converted, recipe = load_with_recipe(folder, device, compute, trust_remote_code=trust_remote_code)
    ids = held_out(converted, recipe, data, tokens, text_column, any_text=True).to(converted.model.device)
    name = text_name(data or recipe.eval_data or recipe.data)
    return Opened(converted, ids, recipe.batch, name, **trained_share(converted, ids))


def fewer_for_logits(batch: int, model: PreTrainedModel) -> int:
    """So many tokens a pass, or fewer where the logits of two passes (tokens, V) would take more than `HELD_BYTES`."""
    return max(1, min(batch, HELD_BYTES // (2 * vocabulary_size(model) * model.dtype.itemsize)))


def widened(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def prediction_shifts(original: Tensor, changed: Tensor, next_ids: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ΔCE and KL(original ‖ changed) of n predictions, in nats, accurate also where they are tiny.

    With d the change of the logits, less its mean under the original prediction p, ``KL = log Σ p exp(d)`` and
    ``ΔCE = KL - d[next]``. The difference of two cross-entropies would lose all that is smaller than their rounding error.

    Args:
        original: logits, (n, V).
        changed: logits, (n, V).
        next_ids: the true next tokens, (n,).
        p: ``original.softmax(-1)``, if it is known already.

    Returns:
        ΔCE (n,), KL (n,).
    """
    p = original.softmax(-1) if p is None else p
    shift = changed - original
    shift -= torch.linalg.vecdot(p, shift)[:, None]
    if len(shift) and shift.amax() > _LARGEST_SHIFT:
        log_p, log_q = (logits.log_softmax(-1, dtype=widest(logits.device)) for logits in (original, changed))
        lost = log_p - log_q
        return lost.gather(1, next_ids[:, None])[:, 0].to(p), (log_p.exp() * lost).sum(-1).to(p)
    at_next = shift.gather(1, next_ids[:, None])[:, 0]
    kl = torch.linalg.vecdot(p, shift.expm1_()).clamp_min(0).log1p()
    return kl - at_next, kl
