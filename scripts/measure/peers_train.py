"""Trains with others' own trainers on recorded activations; `bench_peers.py` runs this in an environment that has them.

    PEERS/bin/python scripts/measure/peers_train.py sparsify FILE --expansion 32 --k 32 --batch 2048 --threads 1

It imports nothing of mxdsurgery. Each trainer is set up as its documentation does, with its defaults but for the width, K, the
batch and, where the default warm-up would be longer than the training, a warm-up of a tenth of it. The last line that is
printed is JSON: seconds of the training, peak memory, held-out NMSE.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}

# Takes x and y (n, D), gives ŷ.
Predictor = Callable[[Tensor, Tensor], Tensor]
CONTEXT = 128  # sparsify counts a batch in sequences


class Recorded(nn.Module):
    """A model, as far as sparsify looks at one, whose only block gives recorded outputs for recorded inputs.

    A token is the number of a recorded position.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y, self.block = x, y, _Block()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device, self.dummy_inputs = torch.device("cpu"), {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:  # noqa: D102
        return self

    def forward(self, input_ids: Tensor) -> Tensor:  # noqa: D102
        return self.block(self.x[input_ids], self.y[input_ids])


class _Block(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


def sparsify(data: dict[str, Tensor], how: argparse.Namespace, optimizer: str) -> Callable[[], Predictor]:
    """A transcoder; `signum` is the default optimiser, and has no warm-up."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    x, y = data["x"], data["y"]
    width = SparseCoderConfig(expansion_factor=how.expansion, k=how.k, transcode=True)
    steps = len(x) // how.batch
    config = TrainConfig(
        width,
        batch_size=how.batch // CONTEXT,
        optimizer=optimizer,
        lr_warmup_steps=min(1000, steps // 10),
        hookpoints=["block"],
        log_to_wandb=False,
        save_every=10**9,
        save_dir=how.scratch,
    )
    numbers = torch.arange(steps * how.batch).view(-1, CONTEXT)
    trainer = Trainer(config, Dataset.from_dict({"input_ids": numbers}).with_format("torch"), Recorded(x, y))

    def train() -> Predictor:
        trainer.fit()  # at its end it saves, which puts averaged weights in place
        for kept in trainer.optimizers:
            if hasattr(kept, "eval"):
                kept.eval()
        (coder,) = trainer.saes.values()
        return lambda x, y: coder(x, y).sae_out

    return train


def sae_lens(data: dict[str, Tensor], how: argparse.Namespace) -> Callable[[], Predictor]:
    """A TopK autoencoder of the output."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    y = data["y"]
    width = y.shape[1]
    steps = len(y) // how.batch
    coder = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=how.expansion * width, k=how.k, device="cpu"))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * how.batch,
        device="cpu",
        autocast=False,
        lr=3e-4,
        lr_end=3e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=how.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, coder, iter(y.split(how.batch)))

    def train() -> Predictor:
        trainer.fit()
        coder.eval()
        return lambda x, y: coder(y)

    return train


def dictionary_learning(data: dict[str, Tensor], how: argparse.Namespace) -> Callable[[], Predictor]:
    """A TopK autoencoder of the output."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    y = data["y"]
    width, steps = y.shape[1], len(y) // how.batch
    config = {
        "trainer": TopKTrainer,
        "activation_dim": width,
        "dict_size": how.expansion * width,
        "k": how.k,
        "steps": steps,
        "warmup_steps": min(1000, steps // 10),
        "layer": 0,
        "lm_name": "recorded",
        "device": "cpu",
        "seed": 0,
    }

    def batches() -> Iterator[Tensor]:
        yield from y[: steps * how.batch].split(how.batch)

    def train() -> Predictor:
        trainSAE(batches(), [config], steps=steps, save_dir=how.scratch, device="cpu")
        (saved,) = Path(how.scratch).rglob("ae.pt")
        coder = AutoEncoderTopK(width, how.expansion * width, how.k)
        coder.load_state_dict(torch.load(saved, weights_only=True))
        return lambda x, y: coder(y)

    return train


TRAINERS = {
    "sparsify": lambda data, how: sparsify(data, how, "signum"),
    "sparsify, adam": lambda data, how: sparsify(data, how, "adam"),
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
}


def peak_resident() -> int:
    """Bytes; the process's own record, which Linux lets us reset."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("recorded")
    for name in ("expansion", "k", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    how = parser.parse_args()
    torch.set_num_threads(how.threads)
    data = load_file(how.recorded)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as how.scratch, contextlib.redirect_stdout(sys.stderr):
        train = TRAINERS[how.trainer](data, how)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = peak_resident(), time.perf_counter()
        predict = train()
        seconds, peak = time.perf_counter() - began, peak_resident() - before
    with torch.no_grad():
        x, y = data["x_heldout"], data["y_heldout"]
        found = ((predict(x, y) - y).square().sum() / y.square().sum()).item()
    tokens = len(data["x"]) // how.batch * how.batch
    print(json.dumps({"seconds": seconds, "tokens": tokens, "nmse": found, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
