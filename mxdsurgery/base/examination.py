"""What is checked before a model is trusted: its files, weights and blocks, and that no prediction depends on later tokens.

One pass over the weights, a module at a time, also where they lie on disk, checks that they are finite, takes their digest
and proves the blocks.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils.peft_utils import find_adapter_config_file

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.digest import tensor_bytes
from mxdsurgery.base.offload import execution_device, resident
from mxdsurgery.base.proof import prove_block
from mxdsurgery.base.running import logits_of
from mxdsurgery.errors import NotCausalLMError, WeightsError, first_line
from mxdsurgery.outside import fix_of, stored_shapes

# A context of so many tokens shows whether predictions depend on later ones.
_CAUSAL_TOKENS = 6
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Examination:
    """What was found out of a model's weights.

    Attributes:
        digest: see `weights_digest`.
        error: the largest relative error of its blocks, recomputed from their parts; 0.0 without blocks.
    """

    digest: str
    error: float


def examine(name: str, model: PreTrainedModel, blocks: Sequence[Block] = ()) -> Examination:
    """Walks once over all weights of a model: checks that they are finite, takes their digest and proves the blocks.

    Args:
        name: of the model, for people.
        model: its weights may lie on disk; they are read a module at a time.
        blocks: to recompute; see `prove_block`.

    Raises:
        WeightsError: a weight is NaN or infinite.
        UnsupportedBlockError: a block's output is not what is recomputed from its parts.
    """
    digest, errors, seen = hashlib.sha256(), [0.0], set()
    for layer, path, module in _walk(model):
        with resident(module):
            for key, weight in module.named_parameters(prefix=path):
                _check_finite(name, key, weight)
                seen.add(key)
            _add(digest, module)
            errors += [prove_block(model, block) for block in blocks if block.layer == layer]
    check_finite(name, model, leaving=seen)
    return Examination(digest.hexdigest(), max(errors))


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights of a model's embeddings and decoder layers, wherever they lie."""
    digest = hashlib.sha256()
    for _, _, module in _walk(model):
        with resident(module):
            _add(digest, module)
    return digest.hexdigest()


def check_finite(name: str, model: PreTrainedModel, leaving: Collection[str] = ()) -> None:
    """Raises WeightsError for the first weight that holds NaN or infinity; those on disk are read one after the other."""
    for key, weight in model.named_parameters():
        if key not in leaving:
            _check_finite(name, key, load_offloaded_parameter(model, key) if weight.is_meta else weight)


def _walk(model: PreTrainedModel) -> Iterator[tuple[int | None, str, nn.Module]]:
    """The embeddings, and each decoder layer with its index; with their paths from the model."""
    paths = {module: path for path, module in model.named_modules()}
    embeddings = model.get_input_embeddings()
    yield None, paths[embeddings], embeddings
    for index, layer in enumerate(decoder_layers(model)[1]):
        yield index, paths[layer], layer


def _add(digest: "hashlib._Hash", module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor).cpu().numpy())


def _check_finite(name: str, key: str, weight: Tensor) -> None:
    if weight.numel() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
        raise WeightsError(
            f"the weight {key} of {name!r} holds {'NaN' if weight.isnan().any() else 'infinity'}",
            expected="finite weights",
            fix="fetch the model again; if it was trained so, take an earlier checkpoint of it",
        )


@torch.no_grad()
def check_causal(name: str, model: PreTrainedModel) -> None:
    """Raises NotCausalLMError for a model in which a token changes what is predicted before it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _CAUSAL_TOKENS).view(2, -1).remainder(vocabulary)
    ids[1] = ids[0]
    ids[1, -1] = (ids[0, -1] + 1) % vocabulary
    logits = logits_of(model, ids.to(execution_device(model)))[:, :-1].float()
    difference, largest = (logits[0] - logits[1]).abs().max().item(), logits.abs().max().item()
    if difference > torch.finfo(model.dtype).eps ** 0.5 * largest:  # far from rounding
        raise NotCausalLMError(
            f"{name!r} ({model.config.model_type}) reads the tokens to come: the last of {_CAUSAL_TOKENS} tokens changes "
            f"what is predicted before it by {difference / largest:.0e} of the largest logit",
            expected="a decoder-only causal language model",
        )


def check_files(name: str, source: str, revision: str | None, parameters: int) -> None:
    """Checks, before any weight is read, that there are weights, in a format that we read.

    Args:
        name: of the model, for people.
        source: folder or hub id.
        revision: on the hub.
        parameters: how many the config asks for.

    Raises:
        WeightsError: they are pickled, an adapter's, outside their folder or far fewer than the config asks for.
    """
    folder = Path(source)
    try:
        if find_adapter_config_file(source, revision=revision) is not None:
            raise WeightsError(
                f"{name!r} is a model with a PEFT adapter beside it",
                expected="a model whole",
                fix="merge the adapter into it: merge_and_unload(), then save_pretrained()",
            )
        if not os.path.isdir(source):
            return
        if not any(folder.glob("*.safetensors")):
            raise pickled(name, ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)) or "no weights")
        held = sum(torch.Size(shape).numel() for shape in stored_shapes(folder).values())
    except (ValueError, OSError) as error:
        raise WeightsError(f"the weights of {name!r} cannot be loaded: {first_line(error)}", fix=fix_of(error)) from None
    if parameters > 2 * held:  # transformers would initialise what is missing, in memory, before it says so
        raise WeightsError(
            f"the weights of {name!r} are missing for the most part: its config asks for {parameters:,}, its files hold "
            f"{held:,}",
            expected="a complete checkpoint of this architecture",
        )


def pickled(name: str, found: str) -> WeightsError:
    """The error for weights that are not safetensors; ``found``: what the model holds instead."""
    return WeightsError(
        f"{name!r} holds {found}",
        expected="weights as .safetensors (pickled weights can run code and are never opened)",
        fix="where you trust it, load it with from_pretrained() and save_pretrained() it into a new folder, which writes "
        "safetensors; its tokenizer too",
    )


def other_shape(name: str, folder: Path, skeleton: PreTrainedModel) -> WeightsError:
    """The error for weights that transformers refused because the config asks for other shapes."""
    asked = {key: list(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    wrong = [(key, shape) for key, shape in stored_shapes(folder).items() if asked.get(key, shape) != shape]
    listed = "; ".join(f"{key} has shape {shape}, and its config asks for {asked[key]}" for key, shape in wrong[:3])
    return WeightsError(
        f"the weights of {name!r} are not those that its config asks for: {listed or 'their shapes differ'}",
        expected="a config.json and weights of the same model",
        fix="take both from one place",
    )


def check_complete(model: str, info: dict[str, Any]) -> None:
    """Raises WeightsError if transformers' loading info says that weights were missing or of another shape."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise WeightsError(
            f"{len(missing)} weights of {model!r} are missing or of another shape: {', '.join(missing[:3])} ...",
            expected="a complete checkpoint of this architecture",
        )
