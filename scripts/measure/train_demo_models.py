"""Trains the two embedded demo models on the Python standard library's own source.

    python scripts/measure/train_demo_models.py demo-glu      # Llama architecture, SwiGLU
    python scripts/measure/train_demo_models.py demo-mlp      # GPT-2 architecture, GELU

Writes mxdsurgery/demo/<name>/ (bf16 safetensors, tokenizer, model card with the figures and samples it prints).
About a quarter of an hour each on two CPU cores. Deterministic up to the interpreter's version and the CPU's rounding.
"""

import json
import math
import platform
import time
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mxdsurgery.demo import DEMO_MODELS, stdlib_documents

VOCAB_SIZE = 4096
CONTEXT = 256
BATCH = 16  # sequences of CONTEXT tokens
PROMPTS = ("import os\n", "def read_file(path):\n", "class Error(Exception):\n")

GLU = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
MLP = dict(
    vocab_size=VOCAB_SIZE,
    n_embd=192,
    n_inner=768,
    n_layer=4,
    n_head=3,
    n_positions=CONTEXT,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE entries, trained on the train split; id 0 marks the border of two documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_documents("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    """All documents of the split, each after an <|endoftext|>, as one int64 vector."""
    ids: list[int] = []
    for text in stdlib_documents(split):
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(ids)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, stream: torch.Tensor, tokens: int = 100_000) -> float:
    """Mean next-token cross-entropy in nats over the first ``tokens`` held-out tokens, in contexts of CONTEXT."""
    model.eval()
    rows = stream[: min(tokens, len(stream)) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(BATCH)]
    model.train()
    return sum(losses) / len(rows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to 1 % of the peak."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(model: PreTrainedModel, stream: torch.Tensor, heldout: torch.Tensor, steps: int, peak_lr: float) -> None:
    """AdamW, bf16 autocast over fp32 parameters, random windows of the train split."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        offsets = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        batch = stream[offsets + torch.arange(CONTEXT)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            rate = (step + 1) * BATCH * CONTEXT / seconds
            line = f"step {step + 1}/{steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s  {seconds / 60:.1f} min"
            if (step + 1) % 500 == 0:
                line += f"  held-out {heldout_loss(model, heldout):.3f}"
            print(line, flush=True)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=100,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        pad_token_id=0,
    )
    return tokenizer.decode(out[0, 1:])


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model of Python source with {parameters:,} parameters ({architecture}), small enough to ship inside
`mxdsurgery`. It exists so that a conversion can be seen from end to end in minutes, without a download.

| | |
|---|---|
| data | the standard library's own source, read from Python {python} ({train_tokens:,} train tokens, split by file) |
| tokens seen | {tokens_seen:,} ({steps:,} steps of {batch} x {context}) in {minutes:.1f} minutes on {threads} CPU threads |
| optimiser | AdamW, peak learning rate {peak_lr}, 3 % warm-up, cosine decay, weight decay 0.1, bf16 autocast |
| held-out loss | {loss:.3f} nats per token, on {heldout_tokens:,} tokens of files it never saw (after rounding to bf16) |

Made by `python scripts/measure/train_demo_models.py {name}`. Samples (temperature 0.7, top-p 0.95, seed 0):

{samples}
"""


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(sorted(DEMO_MODELS)))
@click.option("--steps", type=int, default=2500, show_default=True)
@click.option("--lr", "peak_lr", type=float, default=3e-3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write (default: inside the package).")
def main(name: str, steps: int, peak_lr: float, out: Path | None) -> None:
    out = out or DEMO_MODELS[name]
    tokenizer = train_tokenizer()
    stream, heldout = token_stream(tokenizer, "train"), token_stream(tokenizer, "heldout")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GLU)) if name == "demo-glu" else GPT2LMHeadModel(GPT2Config(**MLP))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(stream):,} train and {len(heldout):,} held-out tokens", flush=True)
    start = time.perf_counter()
    train(model, stream, heldout, steps, peak_lr)
    minutes = (time.perf_counter() - start) / 60

    model = model.to(torch.bfloat16).eval()
    loss = heldout_loss(model.float(), heldout)
    samples = "\n\n".join(f"```python\n{sample(model, tokenizer, prompt)}\n```" for prompt in PROMPTS)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = CARD.format(
        name=name,
        parameters=parameters,
        architecture=type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel"),
        python=platform.python_version(),
        train_tokens=len(stream),
        tokens_seen=steps * BATCH * CONTEXT,
        steps=steps,
        batch=BATCH,
        context=CONTEXT,
        minutes=minutes,
        threads=torch.get_num_threads(),
        peak_lr=peak_lr,
        loss=loss,
        heldout_tokens=min(100_000, len(heldout)),
        samples=samples,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(json.dumps({"name": name, "heldout_loss": round(loss, 4), "minutes": round(minutes, 1), "bytes": size}))
    print(samples)


if __name__ == "__main__":
    main()
