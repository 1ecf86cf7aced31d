"""LoRA on the attention projections of a converted model: peft's own adapters, merged into the weights or kept beside them.

peft comes with ``pip install 'mxdsurgery[lora]'``.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.dtypes import stored_in
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.errors import LoRAError
from mxdsurgery.hardware.randomness import OwnNumbers

ADAPTER_FOLDER = "lora"


def check_peft() -> None:
    """Raises LoRAError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise LoRAError("LoRA needs peft, which is not installed", fix="pip install 'mxdsurgery[lora]'")


def projections(original: PreTrainedModel) -> list[str]:
    """The linear maps of the decoder layers outside their MLP blocks, by path from the base model: the attention's.

    Args:
        original: the unconverted model, or its skeleton.

    Raises:
        LoRAError: there are none.
    """
    path, layers = decoder_layers(original)
    blocks = [finding.block for finding in find_blocks(original) if finding.block is not None]
    taken = {part.path for block in blocks for part in block.parts} | {block.path for block in blocks}
    found = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            full = f"{path}.{index}.{name}"
            inside = any(full == other or full.startswith(f"{other}.") for other in taken)
            if isinstance(module, (nn.Linear, Conv1D)) and not inside:
                found.append(full)
    if not found:
        raise LoRAError(
            f"{type(original).__name__} has no linear maps in its decoder layers beside the MLP blocks",
            expected="attention projections that are nn.Linear or Conv1D",
            fix="train the new layers alone: --mode mxd",
        )
    return found


class Adapters:
    """LoRA adapters in a model, which stays the same object; only the adapters have gradients.

    Args:
        model: the model; its other weights are frozen.
        paths: of the linear maps, from the base model.
        rank: of each adapter.
        seed: of the random half of their weights.
    """

    def __init__(self, model: PreTrainedModel, paths: Sequence[str], rank: int, seed: int = 0) -> None:
        check_peft()
        from peft import LoraConfig, get_peft_model

        prefix = model.base_model_prefix + "."
        maps = [model.base_model.get_submodule(path) for path in paths]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[prefix + path for path in paths],
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps),
            task_type="CAUSAL_LM",
        )
        with OwnNumbers(seed):
            self._peft = get_peft_model(model, config)
        self._paths = list(paths)
        self._model = model

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that learn, fp32."""
        return [parameter for parameter in self._peft.parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """The adapters' weights, by name."""
        return {name: p.detach() for name, p in self._peft.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Puts weights back that `state` gave."""
        for name, parameter in self._peft.named_parameters():
            if name in state:
                parameter.copy_(state[name])

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """While open, the adapters are merged into the weights, rounded to the stored dtype; afterwards they are as before."""
        layers = [self._model.base_model.get_submodule(path) for path in self._paths]
        before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        try:
            for layer in layers:
                layer.merge()
                weight = layer.get_base_layer().weight
                weight.data = weight.to(stored_in(self._model)).to(weight.dtype)
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.unmerge()
                with torch.no_grad():
                    layer.get_base_layer().weight.copy_(weight)

    def merge(self) -> None:
        """Merges the adapters into the weights for good; the model then holds plain linear maps again."""
        self._peft.merge_and_unload()

    def remove(self) -> None:
        """Takes the adapters out; the model is then as it was before."""
        self._peft.unload()

    def save(self, folder: Path) -> None:
        """Writes them as an ordinary PEFT adapter, for `PeftModel.from_pretrained`; nothing in it names a local path."""
        self._peft.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def healed_maps(config: dict[str, Any], kept: str) -> list[str]:
    """Paths, from the base model, of the linear maps that LoRA changed, from the ``mxd`` entry of a converted model's config.

    Args:
        config: the entry.
        kept: ``merged``, in the weights, or ``adapter``, beside them.
    """
    steps = [step for step in config.get("healed", []) if step.get("lora") == kept]
    return sorted({path for step in steps for path in step["maps"]})


def with_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Puts the adapter that `Adapters.save` wrote in a converted model's folder into the model, in place.

    Raises:
        LoRAError: peft is missing.
    """
    check_peft()
    from peft import PeftModel

    PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER))
