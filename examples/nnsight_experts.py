"""Reads and ablates experts of a converted model with nnsight (pip install nnsight; tried with 0.8.1).

    python examples/nnsight_experts.py demo-glu-mxd [--text "def read(path):"] [--layer 2]

Nothing is special about a converted model: plain transformers loads it, nnsight wraps it, and a layer's `gate` is a module as
any other. Its output is a pair (values, indices), each (batch, tokens, K): the chosen experts and their coefficients.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    from nnsight import NNsight
except ImportError as error:
    print(f"this example needs nnsight: pip install nnsight ({error})", file=sys.stderr)
    sys.exit(2)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--text", default="def read(path):\n    with open(path) as file:\n        return", help="what to read")
parser.add_argument("--layer", type=int, help="the layer to look at; default: the last one with experts")
args = parser.parse_args()

# float32 runs well on any processor; where a GPU or processor multiplies bfloat16 matrices, that takes half the memory.
model = (
    AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=torch.float32).eval().requires_grad_(False)
)
tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
ids = tokenizer(args.text, return_tensors="pt")["input_ids"]
paths = {entry["layer"]: entry["path"] for entry in model.config.mxd["layers"] if "n_experts" in entry["shape"]}
layer = max(paths) if args.layer is None else args.layer
if layer not in paths:
    parser.error(f"layer {layer} has no experts; layers that have: {', '.join(map(str, paths))}")

traced = NNsight(model)
gate = traced.get(f"{model.base_model_prefix}.{paths[layer]}.gate")

# Reading.
with traced.trace(ids):
    a = gate.output.save()
    before = traced.output.logits.save()
strongest, order = a.values[0].max(-1)  # (T,)
experts = a.indices[0].gather(-1, order[:, None])[:, 0]
print(f"The strongest expert of layer {layer} on each token, with its coefficient:")
for token, expert, coefficient in zip(ids[0].tolist(), experts.tolist(), strongest.tolist(), strict=True):
    print(f"{tokenizer.decode([token])!r:>14}  {expert:>6}: {coefficient:5.2f}")

# Ablating the last token's strongest expert: another pair takes the place of the gate's output.
chosen = experts[-1].item()
with traced.trace(ids):
    found = gate.output
    gate.output = type(found)(found.values.masked_fill(found.indices == chosen, 0), found.indices)
    after = traced.output.logits.save()

with model.mxd.ablate({layer: [chosen]}):
    same = model(ids).logits
print(f"\nWithout expert {chosen} the logits differ by at most {(after - before).abs().max():.3g}, and from those of")
print(f"model.mxd.ablate by {(after - same).abs().max():.0e}.")
assert torch.equal(after, same) and not torch.equal(after, before)
