"""Reads the expert coefficients of all layers and changes one expert in two ways that agree: torch and transformers only.

    python examples/hooks.py demo-glu-mxd [--text "def read(path):"] [--layer 2]

A layer's coefficients are the output of its `gate`, a pair (values, indices), each (batch, tokens, K); `model.mxd.layers` are
the layers by number. So an ordinary forward hook reads them all, and what a hook returns is what the experts get. `model.mxd`
changes them without a hook, and takes the change back by itself.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--text", default="def read(path):\n    with open(path) as file:\n        return", help="what to read")
parser.add_argument("--layer", type=int, help="the layer to show; default: the last one with experts")
args = parser.parse_args()

# float32 runs well on any processor; where a GPU or processor multiplies bfloat16 matrices, that takes half the memory.
model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
ids = tokenizer(args.text, return_tensors="pt")["input_ids"]  # (1, T)
gates = {at: module.gate for at, module in model.mxd.layers.items()}
layer = max(gates) if args.layer is None else args.layer
if layer not in gates:
    parser.error(f"layer {layer} has no experts; layers that have: {', '.join(map(str, gates))}")

# Reading: one hook on each gate.
coefficients = {}


def keep(at):
    def hook(gate, inputs, a):
        coefficients[at] = a

    return hook


handles = [gate.register_forward_hook(keep(at)) for at, gate in gates.items()]
with torch.no_grad():
    before = model(ids).logits
for handle in handles:
    handle.remove()

for at, a in coefficients.items():
    print(f"layer {at}: {int((a.values > 0).sum())} coefficients on {ids.shape[1]} tokens, the largest {a.values.max():.2f}")
print(f"\nThe strongest experts of layer {layer} on each token, with their coefficients:")
values, order = coefficients[layer].values[0].topk(min(5, coefficients[layer].values.shape[-1]))  # (T, 5)
experts = coefficients[layer].indices[0].gather(-1, order)
for token, row, strengths in zip(ids[0].tolist(), experts.tolist(), values.tolist(), strict=True):
    shown = "  ".join(f"{expert:>6}: {strength:5.2f}" for expert, strength in zip(row, strengths, strict=True) if strength > 0)
    print(f"{tokenizer.decode([token])!r:>14}  {shown}")

# Changing: the last token's strongest expert counts double, by a hook and by model.mxd.
chosen = experts[-1, 0].item()


def double(gate, inputs, a):
    return type(a)(torch.where(a.indices == chosen, 2 * a.values, a.values), a.indices)


handle = gates[layer].register_forward_hook(double)
with torch.no_grad():
    by_hook = model(ids).logits
handle.remove()

with torch.no_grad(), model.mxd.scale({layer: {chosen: 2.0}}):
    by_mxd = model(ids).logits
with torch.no_grad():
    after = model(ids).logits

print(
    f"\nExpert {chosen} of layer {layer}, twice as strong, changes the logits by at most {(by_mxd - before).abs().max():.3g};"
)
print(
    f"by the hook and by model.mxd they differ by {(by_hook - by_mxd).abs().max():.0e}, and afterwards nothing is left of it."
)
assert torch.equal(by_hook, by_mxd) and not torch.equal(by_mxd, before) and torch.equal(after, before)
