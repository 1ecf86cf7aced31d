"""Runs a converted model that does not fit: Accelerate keeps some blocks in memory and fetches the others as they are needed.

    python examples/offload.py demo-glu-mxd [--disk 2] [--device cuda]

A `device_map` says where each part of the model is: on a device, in the machine's memory ("cpu") or in files ("disk"). A part
on disk is read when it runs and dropped afterwards. Here the first blocks stay in memory and the last ones, --disk of them, go
to disk, MxD layers and all; the logits are the same, and `model.mxd` works on experts that are on disk, too. The loaded model
is compared with one that is wholly in memory.

A device_map places modules, and an MxD layer has a bias of its own: place whole layers or whole blocks, as "auto" does.
Outside of `forward`, what is on disk is not there: call the modules, and read coefficients by a hook on the gate.
"""

import argparse
import re
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--disk", type=int, help="how many blocks go to disk; default: half of them")
parser.add_argument("--device", default="cpu", help="where the others are and where everything is computed")
parser.add_argument(
    "--dtype", default="float32", help="what is computed in; bfloat16 takes half the memory, where the device has it"
)
parser.add_argument("--text", default="def read(path):\n    with open(path) as file:\n        return", help="what to read")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
ids = tokenizer(args.text, return_tensors="pt")["input_ids"].to(args.device)  # (1, T)
model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=args.dtype).to(args.device).eval()


@torch.no_grad()
def logits(model, ablated: dict[int, list[int]]) -> torch.Tensor:
    """Of the text, without some experts: (1, T, V)."""
    with model.mxd.ablate(ablated):
        return model(ids).logits


def megabytes(model) -> float:
    """What of its tensors is in memory. Those on disk are on torch's `meta` device, which holds no numbers."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict(keep_vars=True).values() if not tensor.is_meta}
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def device_map(model, disk: int) -> dict[str, str]:
    """The last blocks on disk, everything else on the device. No entry lies within another."""
    where = {}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        block = re.match(r"(.*?\.(\d+))\.", name)  # such as model.layers.2 in model.layers.2.mlp.bias
        away = block and int(block[2]) >= model.config.num_hidden_layers - disk
        where[block[1] if block else name.rpartition(".")[0]] = "disk" if away else args.device
    return where


whole = megabytes(model)
blocks = model.config.num_hidden_layers
disk = blocks // 2 if args.disk is None else args.disk
if not 0 < disk <= blocks:
    parser.error(f"--disk {disk}: the model has {blocks} blocks")
where = device_map(model, disk)
some = {layer: range(0, mxd.gate.n_experts, 2) for layer, mxd in model.mxd.layers.items()}
expected, expected_ablated = logits(model, {}), logits(model, some)
del model

with tempfile.TemporaryDirectory() as folder:  # for parts whose files are not safetensors; those are read where they lie
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, trust_remote_code=True, dtype=args.dtype, device_map=where, offload_folder=folder
    ).eval()
    away = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    layers = [layer for layer, mxd in model.mxd.layers.items() if mxd.gate.weight.is_meta]
    print(f"{disk} of {blocks} blocks are on disk: {len(away)} tensors, with them the MxD layers {layers or '(none)'}.")
    print(f"In memory: {megabytes(model):.1f} MB of {whole:.1f} MB.")
    got, got_ablated = logits(model, {}), logits(model, some)
    print(f"Logits differ from those of the model in memory by at most {(got - expected).abs().max():.3g},")
    print(f"with half of all experts ablated by at most {(got_ablated - expected_ablated).abs().max():.3g}")
    print(f"(the ablation itself changes them by up to {(expected_ablated - expected).abs().max():.3g}).")
    assert all(model.get_parameter(name).is_meta for name in away), "after a pass they are on disk again"
