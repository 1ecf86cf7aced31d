"""Writes a converted model as a folder that plain transformers loads, and checks that it does.

The folder appears whole or not at all: it is written beside its place (`written_as`), reloaded there in a fresh process that
cannot import mxdsurgery, compared with what the model in memory computed (`check_reload`), and only then renamed. Whoever
wrote it lets go of the model before the check: two of them may be more than the memory holds.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

import mxdsurgery.layers
from mxdsurgery.aside import file_aside
from mxdsurgery.base.dtypes import as_stored, computed_in
from mxdsurgery.base.offload import SHARD_BYTES, adopt_hooks, execution_device, is_offloaded
from mxdsurgery.base.running import RUN, logits_of, run_base
from mxdsurgery.base.surgery import replaced
from mxdsurgery.checkpoint.adapter import check_base, write_adapter
from mxdsurgery.checkpoint.card import model_card
from mxdsurgery.checkpoint.converted import (
    EVALUATION_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    converted_config,
    converted_model_class,
    read_config,
)
from mxdsurgery.checkpoint.readme import CARD, keep_words, merged, read_card, write_card
from mxdsurgery.checkpoint.trained_on import TrainedOn
from mxdsurgery.checkpoint.writing import write_json, written_whole
from mxdsurgery.errors import ExportError, OutputError, first_line
from mxdsurgery.hardware.device import empty_cache
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.owner import my_turn

# The code of ours that travels with a checkpoint is in this room.
_LAYERS = Path(mxdsurgery.layers.__file__).parent
TRAVELLING = tuple(sorted(path.name for path in _LAYERS.glob("*.py") if path.name != "__init__.py"))

_LICENSE = "# Written by mxdsurgery (Apache-2.0). It imports torch and transformers only, and only defines classes.\n"

_CONFIGURATION = '''"""The config of a Mixture-of-Decoders model: {config}, with what stands where the MLP blocks were."""

from {config_module} import {config}

from .peft_targets import FamilyTargets


class MxD{config}(FamilyTargets, {config}):
    """{config} with one more entry, ``mxd``: which modules are MxD layers, and their shapes."""

    model_type = "mxd-{model_type}"
    mxd: dict | None = None
'''

_MODELING = '''"""{causal} whose MLP blocks are Mixtures of Decoders; everything else is the family's own code.

The coefficients of a layer's experts are the output of its ``gate``: an ordinary forward hook there reads and changes them,
and ``with model.mxd.ablate({{12: [4031]}}):`` changes them without one; interventions.py has all that ``model.mxd`` can do.
"""

{model_imports}

from .configuration_mxd import MxD{config}
from .replacement import MxDSurgeryMixin


class MxD{base}(MxDSurgeryMixin, {base}):
    """{base} with MxD layers."""

    config_class = MxD{config}


class MxD{causal}(MxDSurgeryMixin, {causal}):
    """{causal} with MxD layers."""

    config_class = MxD{config}
'''

# What a process says that had not enough memory, in lower case: torch on a device, on the CPU, Python, the system.
_NO_MEMORY = ("outofmemoryerror", "out of memory", "not enough memory", "memoryerror", "cannot allocate memory")
# Runs in a fresh interpreter that cannot import mxdsurgery, as on a machine without it.
_RELOAD = (
    RUN
    + """
import sys
sys.modules["mxdsurgery"] = None
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
folder, given, result, device, dtype, *offloaded = sys.argv[1:]
place = {"device_map": {"": "disk"}, "offload_folder": result + ".offload"} if offloaded else {"device_map": device}
device, dtype = torch.device("cpu" if offloaded else device), getattr(torch, dtype)
ids = load_file(given)["input_ids"].to(device)
def output(kind):
    model = kind.from_pretrained(folder, trust_remote_code=True, **place).eval()
    wide = torch.promote_types(model.dtype, dtype) == dtype
    for held in (*model.parameters(), *model.buffers()):
        if wide and held.dtype == model.config.dtype:
            held.data = held.data.to(dtype)
    with torch.autocast(device.type, dtype, enabled=not wide):
        return first_tensor(run(model, ids))  # never two models at a time
with torch.no_grad():
    logits, hidden = output(AutoModelForCausalLM), output(AutoModel)
save_file({"logits": logits.cpu().contiguous(), "hidden": hidden.cpu().contiguous()}, result)
"""
)


class Reference(NamedTuple):
    """What a model in memory computes for ids (B, T): ``logits`` and ``hidden`` states by name; the device and the dtype; and
    whether its weights lie on disk."""

    ids: Tensor
    outputs: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    offloaded: bool = False


def write_converted(
    folder: Path,
    model: PreTrainedModel,
    layers: dict[int, nn.Module],
    plan: Plan,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    check_ids: Tensor,
    terms: Sequence[Path] = (),
    trained_on: TrainedOn | None = None,
) -> Reference:
    """Writes the converted model's folder, all but evaluation and card.

    Args:
        folder: to write into; see `written_as`.
        model: the original model. Its weights are left as they are stored: see `mxdsurgery.base.dtypes.as_stored`.
        layers: by layer index, in the model's dtype and on its device.
        plan: which layers were converted, and into what.
        recipe: how.
        tokenizer: the model's.
        check_ids: (B, T) int64 token ids to compare the reloaded model's logits on.
        terms: the base model's licence and what belongs to it, which go with the result.
        trained_on: the record of what the layers were trained on.

    Returns:
        What the converted model computes, for `check_reload`.
    """
    with replaced(model, plan.blocks, layers):
        reference = reference_outputs(model, check_ids)
        as_stored(model)
        _save_weights(model, plan, folder)
    tokenizer.save_pretrained(folder)
    write_code(model, folder)
    for path in terms:
        shutil.copyfile(path, folder / path.name)
    if trained_on is not None:
        trained_on.write(folder)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / PLAN_FILE, plan.to_dict())
    return reference


def write_evaluation(folder: Path, evaluation: dict[str, Any], plan: Plan, recipe: Recipe) -> None:
    """Writes evaluation.json, and the section of the model card that shows it; each file is whole at any time.

    Both are of one evaluation in the end, also where two write at once.

    Raises:
        OutputError: they cannot be written.
    """
    new = model_card(plan, recipe, evaluation, read_config(folder)["mxd"].get("edits", []))
    card = folder / CARD
    try:
        with my_turn(folder / ".evaluation.turn"):
            text = merged(read_card(card), new) if card.is_file() else new
            write_json(folder / EVALUATION_FILE, evaluation)
            with file_aside(card) as file:
                write_card(file, text)
    except OSError as error:
        raise OutputError(f"{str(card)!r} cannot be written: {error.strerror or first_line(error)}") from None


def _save_weights(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    """Writes weights, config and generation config, by the converted class itself."""
    config = converted_config(model.config, plan)
    with torch.device("meta"):
        converted = converted_model_class(type(model), type(config))(config)
    converted.load_state_dict(model.state_dict(), assign=True)
    converted.tie_weights()
    if is_offloaded(model):
        adopt_hooks(converted, model)
    if hasattr(model, "generation_config"):  # not where code of its own cannot generate
        converted.generation_config = model.generation_config
    converted.config.dtype = model.dtype  # some classes keep a copy of the config that they are given
    converted.config.auto_map = {
        "AutoConfig": f"configuration_mxd.{type(config).__name__}",
        "AutoModel": f"modeling_mxd.MxD{type(model.base_model).__name__}",
        "AutoModelForCausalLM": f"modeling_mxd.MxD{type(model).__name__}",
    }
    # Tensors are named as the modules are now, not as the family once named them: transformers maps old names back for some
    # classes of a family only.
    shard = SHARD_BYTES if is_offloaded(model) else "5GB"
    converted.save_pretrained(folder, max_shard_size=shard, save_original_format=False)


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Writes the Python files that travel with a model's checkpoint, original or converted; also the model's own code."""
    families = {"config": type(model.config), "base": type(model.base_model), "causal": type(model)}
    names = {"model_type": model.config.model_type.removeprefix("mxd-")}
    for role, made in families.items():
        own = next(base for base in made.__mro__ if base.__module__.startswith(("transformers.", "transformers_modules.")))
        names |= {role: own.__name__, f"{role}_module": _module_in(folder, own)}
    where = dict.fromkeys((names["base_module"], names["causal_module"]))
    named = {
        module: ", ".join(names[role] for role in ("base", "causal") if names[f"{role}_module"] == module) for module in where
    }
    names["model_imports"] = "\n".join(f"from {module} import {classes}" for module, classes in named.items())
    for name in TRAVELLING:
        code = (_LAYERS / name).read_text(encoding="utf-8")
        (folder / name).write_text(_LICENSE + code, encoding="utf-8")
    (folder / "configuration_mxd.py").write_text(_LICENSE + _CONFIGURATION.format(**names), encoding="utf-8")
    (folder / "modeling_mxd.py").write_text(_LICENSE + _MODELING.format(**names), encoding="utf-8")


def _module_in(folder: Path, made: type) -> str:
    """The module that a checkpoint's code imports a family's class from; copies it if it came with the base model."""
    if made.__module__.startswith("transformers."):
        return "transformers" if hasattr(transformers, made.__name__) else made.__module__
    file = Path(sys.modules[made.__module__].__file__)
    for path in (file, *map(Path, get_relative_import_files(file))):
        if path.name in (*TRAVELLING, "configuration_mxd.py", "modeling_mxd.py"):
            raise ExportError(f"the base model's code has a file {path.name!r}, as mxdsurgery has", expected="another name")
        shutil.copyfile(path, folder / path.name)
    return f".{file.stem}"


@torch.no_grad()
def reference_outputs(model: PreTrainedModel, ids: Tensor) -> Reference:
    """Runs the model in memory, for `check_reload` to compare with."""
    device = execution_device(model)
    here = ids.to(device)
    outputs = {
        "logits": logits_of(model, here).cpu(),
        "hidden": run_base(model, here).cpu(),  # logits, where a family has no base model
    }
    return Reference(ids.cpu(), outputs, device, computed_in(model), is_offloaded(model))


def _run_reload(words: Sequence[str], environment: Mapping[str, str], folder: str) -> subprocess.CompletedProcess[str]:
    """Runs `_RELOAD` with the arguments ``words`` in a fresh interpreter, in ``folder``."""
    command = (sys.executable, "-I", "-c", _RELOAD, *words)
    return subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace", cwd=folder, check=False
    )


def _ended_for_memory(process: subprocess.CompletedProcess[str]) -> bool:
    """Whether a process ended because there was not enough memory: it said so, or the system killed it."""
    said = process.stderr.lower()
    return process.returncode == -signal.SIGKILL or any(words in said for words in _NO_MEMORY)


def _reloaded(folder: Path, reference: Reference) -> tuple[dict[str, Tensor], str]:
    """What a fresh process without mxdsurgery computes, and on which device: the reference's, or the CPU if it is too full."""
    gc.collect()  # of a model that was let go, what refers to itself is still there,
    for held in {reference.device.type, "cpu"}:
        empty_cache(held)  # and of its memory, this process still holds what it does not use
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "given.safetensors", Path(scratch) / "result.safetensors"
        save_file({"input_ids": reference.ids.contiguous()}, given)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TQDM_DISABLE": "1"}
        for device in dict.fromkeys((str(reference.device), "cpu")):
            words = [str(folder), str(given), str(result), device, str(reference.dtype).removeprefix("torch.")]
            process = _run_reload([*words, *(["offloaded"] if reference.offloaded else [])], environment, scratch)
            if process.returncode == 0:
                return load_file(result), device
            if not _ended_for_memory(process):
                reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
                raise ExportError(
                    f"the exported checkpoint does not load without mxdsurgery: {reason}",
                    fix="this is a fault of mxdsurgery: please report it with the model's name",
                )
    raise ExportError(
        "there is not enough memory to load the exported checkpoint in a process of its own, to compare what it computes",
        expected="room for it beside what this machine holds already, on the device or in the host's memory",
        fix="end other programs, and give the same command again",
    )


def check_reload(folder: Path, reference: Reference) -> dict[str, float]:
    """Loads the folder in a fresh process without mxdsurgery and compares outputs, on the reference's device and in its dtype.

    Where the device has no room for it, it is loaded on the CPU, whose products are rounded otherwise. Where the model in
    memory had its weights on disk, that process also reads weights only as it needs them.

    Returns:
        The largest absolute difference of the reloaded model's ``logits`` and ``hidden`` states from the reference's.

    Raises:
        ExportError: the folder does not load, there is no memory for it, or outputs differ by more than the dtype's rounding.
    """
    reloaded, device = _reloaded(folder, reference)
    differences = {}
    roundings = 8 if torch.device(device).type == reference.device.type else 64
    for name, wanted in reference.outputs.items():
        difference = (reloaded[name].float() - wanted.float()).abs().max().item()
        differences[name] = difference
        limit = roundings * torch.finfo(reference.dtype).eps * wanted.float().abs().max().item()
        if not difference <= limit:
            raise ExportError(
                f"the exported checkpoint, reloaded, gives other {name}: they differ by {difference:.3g}",
                expected=f"equal up to rounding ({limit:.1g})",
                fix="this is a fault of mxdsurgery: please report it with the model's name",
            )
    return differences


@contextmanager
def written_as(
    out: Path,
    form: str,
    model: str,
    revision: str | None,
    within: Path | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Path]:
    """`written_whole` for a recipe's ``format``: a folder to write a checkpoint into, of which only an adapter may be kept.

    Args:
        out: the final place.
        form: ``checkpoint``, or ``adapter``: on success, only what differs from the base model becomes ``out``.
        model: the base model, as the plan names it.
        revision: its commit on the hub.
        within: see `written_whole`.
        trust_remote_code: for an adapter, whether the base model's own code may be run.

    Raises:
        OutputError: as `written_whole`.
        BaseModelError: the base model is not there any more.
    """
    if form == "adapter":
        check_base(model, revision, trust_remote_code)
    with written_whole(out, within) as staging:
        if form == "checkpoint":
            yield staging
        else:
            checkpoint = staging / "checkpoint"
            checkpoint.mkdir()
            yield checkpoint
            write_adapter(checkpoint, staging, model, revision, trust_remote_code=trust_remote_code)
            shutil.rmtree(checkpoint)
        keep_words(out, staging)
