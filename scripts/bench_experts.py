"""Times `mxdsurgery experts` against a bare forward pass over the same tokens, in one run, and says how much memory it took.

    python scripts/bench_experts.py books-mxd --data train.jsonl.gz --tokens 1000000

The bare pass (the base model without its language-model head, nothing recorded) runs once before and once after, for a machine
whose speed drifts; the ratio is to their mean.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

import mxdsurgery
from mxdsurgery.catalogue import CONTEXTS_FILE
from mxdsurgery.console import size

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


with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch) / "experts"
    model = mxdsurgery.load(args.folder).model
    mxdsurgery.experts(args.folder, data=args.data, tokens=20_000, out=Path(scratch) / "warm")
    start = time.monotonic()
    result = mxdsurgery.experts(args.folder, data=args.data, tokens=args.tokens, out=out)
    whole = time.monotonic() - start
    ids = torch.from_numpy(np.stack(pq.read_table(out / CONTEXTS_FILE)["input_ids"].to_numpy()))
    half = len(ids) // 2
    before, after = bare(model, ids), bare(model, ids)

plain = (before + after) / 2
print(f"tokens            {result['tokens']:,} in {len(ids):,} contexts, {len(result['layers'])} layers")
print(f"bare forward pass {plain:.1f} s ({before:.1f} and {after:.1f})")
ratio, memory = result["seconds"] / plain, size(result["peak_bytes"] or 0)
print(f"experts, the pass {result['seconds']:.1f} s: {ratio:.2f} times; {memory} more memory at its peak than before it")
print(f"experts, in all   {whole:.1f} s, with loading, reading the text and writing the tables: {whole / plain:.2f} times")
