"""Fine-tunes a converted model with PEFT's LoRA and transformers' Trainer, on a text of yours (pip install peft).

    python examples/lora_finetune.py demo-glu-mxd --out my-adapter [--text my.txt] [--targets q_proj,v_proj] [--mxd]

The adapter goes on the attention projections; all else is frozen, the MxD layers too. With --mxd it also goes on the dense
maps within them, `encoder`, `encoder_up` and `decoder`, which are ordinary linear layers; the gate and the experts' rows stay
what they are. Without targets, PEFT takes those of the family: here they are named.

Shows the loss on the end of the text, which is not trained on, before and after; then reloads the adapter on a fresh
copy of the model, and merges it: a checkpoint without PEFT, still with `model.mxd`.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--out", required=True, help="folder for the adapter, and within it the merged checkpoint")
parser.add_argument("--text", help="a text file; default: the source of torch's own modules")
parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj", help="attention projections; for GPT-2 c_attn")
parser.add_argument("--mxd", action="store_true", help="adapt the dense maps of the MxD layers, too")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--context", type=int, default=128, help="tokens of one piece of text")
args = parser.parse_args()


def fresh():
    """The converted model, in float32: a step on bfloat16 weights rounds most of itself away."""
    return AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, dtype=torch.float32).eval()


set_seed(0)
model = fresh()
tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
sources = [Path(args.text)] if args.text else sorted(Path(torch.nn.modules.__file__).parent.glob("*.py"))
text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
pieces = ids[: len(ids) // args.context * args.context].view(-1, args.context)
examples = [{"input_ids": piece, "labels": piece} for piece in pieces]  # the model itself shifts the labels by one
heldout = min(len(examples) // 10, 100)
if not heldout:
    parser.error(f"the text is {len(ids)} tokens long; expected at least {10 * args.context}")

targets = args.targets.split(",")
if args.mxd:
    for entry in model.config.mxd["layers"]:
        parts = model.base_model.get_submodule(entry["path"]).named_children()
        targets += [f"{entry['path']}.{name}" for name, part in parts if isinstance(part, torch.nn.Linear)]
for target in targets:  # PEFT itself passes over a target that is not there if it finds another
    if not any(name.endswith(f".{target}") for name, _ in model.named_modules()):
        parser.error(f"the model has no module {target}; print(model) shows their names")
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=targets))
model.print_trainable_parameters()
frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    ),
    train_dataset=examples[:-heldout],
    eval_dataset=examples[-heldout:],
)
trainer.remove_callback(PrinterCallback)
tokens = heldout * (args.context - 1)
print(f"Loss on {tokens:,} held-out tokens before: {trainer.evaluate()['eval_loss']:.4f} nats")
trainer.train()
print(f"and after {args.steps} steps: {trainer.evaluate()['eval_loss']:.4f} nats")
assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)
print(f"The {len(frozen)} tensors that the model had before are what they were.")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of the first held-out piece: (1, T, V)."""
    return model(pieces[-heldout, None].to(model.device)).logits.cpu()


model.eval()
expected = logits(model)
model.save_pretrained(args.out)
size = sum(file.stat().st_size for file in Path(args.out).glob("adapter_*"))
print(f"The adapter is in {args.out}, {size / 1e6:.2f} MB.")

reloaded = PeftModel.from_pretrained(fresh(), args.out).eval()
print(f"Reloaded on a fresh copy, its logits differ by at most {(logits(reloaded) - expected).abs().max():.1g};")
merged = reloaded.merge_and_unload()
print(f"merged into the weights, by at most {(logits(merged) - expected).abs().max():.1g}.")
whole = Path(args.out) / "merged"
merged.save_pretrained(whole)
tokenizer.save_pretrained(whole)
again = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True, dtype=torch.float32).eval()
layer, mxd = next(iter(again.mxd.layers.items()))
with again.mxd.ablate({layer: range(mxd.gate.n_experts)}):
    ablated = logits(again)
difference = (logits(again) - logits(merged)).abs().max()
print(f"The merged checkpoint in {whole} loads without PEFT; logits differ by {difference:.0e};")
print(f"without the experts of layer {layer} they change by up to {(ablated - expected).abs().max():.2g}.")
