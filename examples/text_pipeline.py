"""Writes text with transformers' pipeline, a batch of prompts at once, then again without some experts of a layer.

    python examples/text_pipeline.py demo-glu-mxd [--prompt "def read(path):" ...] [--layer 2] [--experts 17,203]

A converted model is one for the pipeline like any other: mxdsurgery is not needed. `model.mxd.ablate` sets the coefficients of
experts to 0 for as long as its `with` lasts, whoever calls the model meanwhile, here the pipeline. Without --experts it
takes those that weigh most on the prompts: the largest sums of coefficients.
"""

import argparse

import torch
from transformers import pipeline

PROMPTS = ["def read(path):\n    with open(path) as file:\n", "class Queue:\n    def __init__(self", "import os\nimport sys\n"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="what to continue; default: three beginnings of Python code")
parser.add_argument("--layer", type=int, help="the layer to ablate in; default: the last one with experts")
parser.add_argument("--experts", help="which, between commas; default: the five that weigh most on the prompts")
parser.add_argument("--tokens", type=int, default=24, help="how many to write after each prompt")
args = parser.parse_args()

# float32 runs well on any processor; where a GPU or processor multiplies bfloat16 matrices, that takes half the memory.
writer = pipeline("text-generation", model=args.folder, trust_remote_code=True, dtype=torch.float32)
model, tokenizer = writer.model, writer.tokenizer
tokenizer.padding_side = "left"  # the prompts end together, where the text goes on
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
layers = model.mxd.layers
layer = max(layers) if args.layer is None else args.layer
if layer not in layers:
    parser.error(f"layer {layer} has no experts; layers that have: {', '.join(map(str, layers))}")


def continuations() -> list[str]:
    """What the model writes after each prompt, always taking the likeliest token."""
    found = writer(
        args.prompt,
        batch_size=len(args.prompt),
        do_sample=False,
        max_new_tokens=args.tokens,
        max_length=None,
        return_full_text=False,
    )
    return [texts[0]["generated_text"] for texts in found]


def strongest(count: int) -> list[int]:
    """The experts with the largest sums of coefficients over the prompts."""
    gate, total = layers[layer].gate, 0
    for prompt in args.prompt:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        seen = []
        handle = gate.register_forward_hook(lambda module, inputs, a, seen=seen: seen.append(a))
        with torch.no_grad():
            model(ids)
        handle.remove()
        total = total + seen[0].dense(gate.n_experts)[0, 1:].sum(0)  # without position 0, which is like no other
    return total.topk(min(count, gate.n_experts)).indices.tolist()


experts = strongest(5) if args.experts is None else [int(number) for number in args.experts.split(",")]
whole = continuations()
with model.mxd.ablate({layer: experts}):
    ablated = continuations()

changed = 0
for prompt, before, after in zip(args.prompt, whole, ablated, strict=True):
    print(f"{prompt!r}\n  whole    {before!r}\n  ablated  {after!r}")
    changed += before != after
shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
print(f"\nAblating {len(experts)} experts of layer {layer} ({shown}) changed {changed} of {len(whole)} continuations;")
assert continuations() == whole
print("afterwards the pipeline writes what it wrote before.")
