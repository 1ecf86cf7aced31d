"""Looks at and ablates one expert of a converted model, with torch and transformers only: mxdsurgery is not needed.

    python examples/ablate_expert.py demo-glu-mxd [--layer 2]

The coefficients of a layer's experts are the output of its `gate`, a pair (values, indices), each (batch, tokens, K). This
reads them with an ordinary forward hook on some Python source, takes the expert with the largest coefficient among those that
fire on few tokens, ablates it by a second hook that sets its coefficient to 0, and shows what that does to the predictions.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--layer", type=int, help="default: the last converted one")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
entries = {entry["layer"]: entry for entry in model.config.mxd["layers"]}
layer = max(entries) if args.layer is None else args.layer
mxd = model.base_model.get_submodule(entries[layer]["path"])
source = Path(textwrap.__file__).read_text(encoding="utf-8")
ids = torch.tensor(tokenizer(source, verbose=False)["input_ids"])
ids = ids[: len(ids) // 128 * 128].view(-1, 128)  # (B, T)


@torch.no_grad()
def losses() -> torch.Tensor:
    """Cross-entropy of each next token, in nats: (B, T - 1)."""
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def excerpt(row: int, position: int) -> str:
    """The tokens around a position, the token itself between marks."""
    before, at, after = (
        tokenizer.decode(ids[row, part])
        for part in (slice(max(0, position - 6), position), slice(position, position + 1), slice(position + 1, position + 4))
    )
    return repr(f"{before}[{at}]{after}")


seen = []
handle = mxd.gate.register_forward_hook(lambda module, inputs, a: seen.append(a))
before = losses()
handle.remove()

dense = seen[0].dense(mxd.gate.weight.shape[0])  # (B, T, N)
rare = (dense > 0).float().mean((0, 1)) < 0.02
expert = (dense.amax((0, 1)) * rare).argmax().item()
coefficients = dense[..., expert]
fires = (coefficients > 0).sum()
print(f"layer {layer}, expert {expert} fires on {fires} of {ids.numel()} tokens, most strongly on the marked one of")
for index in coefficients.flatten().topk(5).indices.tolist():
    row, position = divmod(index, ids.shape[1])
    print(f"  {coefficients[row, position]:.2f}  {excerpt(row, position)}")


def ablate(module, inputs, a):
    return type(a)(a.values.masked_fill(a.indices == expert, 0), a.indices)


handle = mxd.gate.register_forward_hook(ablate)
after = losses()
handle.remove()

change, fired = after - before, coefficients[:, :-1] > 0
print(f"ablated, the mean loss where it fired goes from {before[fired].mean():.4f} to {after[fired].mean():.4f} nats,")
print(f"elsewhere from {before[~fired].mean():.4f} to {after[~fired].mean():.4f}")
assert torch.equal(losses(), before), "without the hook the model is what it was"
