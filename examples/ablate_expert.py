"""Looks at and ablates one expert of a converted model, with torch and transformers only: mxdsurgery is not needed.

    python examples/ablate_expert.py demo-glu-mxd [--layer 2]

The coefficients of a layer's experts are the output of its `gate`, a pair (values, indices), each (batch, tokens, K). This
reads them with an ordinary forward hook, finds the expert with the largest total coefficient on a piece of Python, ablates it
by a second hook that sets its coefficient to 0, and shows which next-token predictions that changed.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = Path(__file__).read_text()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--layer", type=int, help="default: the last converted one")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
entries = {entry["layer"]: entry for entry in model.config.mxd["layers"]}
layer = max(entries) if args.layer is None else args.layer
mxd = model.base_model.get_submodule(entries[layer]["path"])
ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :128]


@torch.no_grad()
def losses() -> torch.Tensor:
    """Cross-entropy of each next token, in nats."""
    logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


seen = []
handle = mxd.gate.register_forward_hook(lambda module, inputs, a: seen.append(a))
before = losses()
handle.remove()

total = torch.zeros(mxd.gate.weight.shape[0]).index_add_(0, seen[0].indices.flatten(), seen[0].values.float().flatten())
expert = total.argmax().item()
fired = ((seen[0].indices == expert) & (seen[0].values > 0)).any(-1)[0]


def ablate(module, inputs, a):
    return type(a)(a.values.masked_fill(a.indices == expert, 0), a.indices)


handle = mxd.gate.register_forward_hook(ablate)
after = losses()
handle.remove()

change = after - before
print(f"layer {layer}, expert {expert}: the largest total coefficient, fired on {fired.sum()} of {fired.numel()} tokens")
print(f"ablated, the mean loss goes from {before.mean():.4f} to {after.mean():.4f} nats; the tokens that change the most:")
for position in change.abs().topk(5).indices.tolist():
    context, token = (tokenizer.decode(part) for part in (ids[0, max(0, position - 6) : position + 1], ids[0, position + 1]))
    print(f"  {change[position]:+.3f}  {context!r} -> {token!r}")
assert torch.equal(losses(), before), "without the hook the model is what it was"
