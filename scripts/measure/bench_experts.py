"""Times `mxdsurgery experts` against a bare forward pass over the same tokens, in one run, and says how much memory it took.

    python scripts/measure/bench_experts.py books-mxd --data train.jsonl.gz --tokens 1000000

The bare pass (the base model without its language-model head, nothing recorded) runs once before and once after, for a machine
whose speed drifts; the ratio is to their mean.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import mxdsurgery
from mxdsurgery.catalogue.contexts import Source, draw_corpus
from mxdsurgery.checkpoint.converted import load_with_recipe
from mxdsurgery.terminal.console import ProgressLine, size
from mxdsurgery.text.sources import Packing

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--data", help="text; default: the recipe's held-out text")
parser.add_argument("--tokens", type=int, default=1_000_000)
parser.add_argument("--batch", type=int, default=8192, help="tokens per bare forward pass")
args = parser.parse_args()


@torch.no_grad()
def bare(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of a forward pass over contexts (S, T)."""
    start = time.monotonic()
    for batch in ids.split(max(1, args.batch // ids.shape[1])):
        model.base_model(input_ids=batch.long().to(model.device), use_cache=False)
    return time.monotonic() - start


converted, recipe = load_with_recipe(args.folder)
data = args.data or recipe.eval_data or recipe.data
source = Source(data, args.tokens, recipe.text_column, label_column=None, spread=8, seed=0)  # as experts draws them
packing = Packing(converted.tokenizer(), recipe.context, recipe.prepend_bos)
ids = draw_corpus(source, packing, ProgressLine()).ids
bare(converted.model, ids[:128])  # warms up
before = bare(converted.model, ids)
with tempfile.TemporaryDirectory() as scratch:
    start = time.monotonic()
    result = mxdsurgery.experts(args.folder, data=data, tokens=args.tokens, out=Path(scratch) / "experts")
    whole = time.monotonic() - start
after = bare(converted.model, ids)

plain = (before + after) / 2
print(f"tokens            {result['tokens']:,} in {len(ids):,} contexts, {len(result['layers'])} layers")
print(f"bare forward pass {plain:.1f} s ({before:.1f} and {after:.1f})")
ratio, memory = result["seconds"] / plain, size(result["peak_bytes"] or 0)
print(f"experts, the pass {result['seconds']:.1f} s: {ratio:.2f} times; {memory} more memory at its peak than before it")
print(f"experts, in all   {whole:.1f} s, with loading, reading the text and writing the tables: {whole / plain:.2f} times")
