"""Zero-shot choices on labelled texts, by likelihood, through lm-evaluation-harness: for scripts/measure/smollm2.py."""

import json
import random
from pathlib import Path
from typing import Any

# A task: how a text is put, and each class in the model's words. Of a few wordings those at which SmolLM2-135M-Instruct is
# well above chance: where it guesses, nothing can be lost.
TASKS = {
    "ag_news": (
        "Article: {{text}}\nTags:",
        {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"},
    ),
    "sentiment": ("{{text}}\n\nThe review is", {"pos": "positive", "neg": "negative"}),
}
_MOST_CHARACTERS = 600  # of a text


def accuracies(model: Path, trusted: bool, probing: Path, texts: int, dtype: str) -> dict[str, dict[str, float]]:
    """How often the right class is the likeliest answer, for each of `TASKS`.

    Args:
        model: a folder that transformers loads.
        trusted: whether its own code may run.
        probing: the folder of labelled texts, jsonl with `text` and `label`.
        texts: how many of each task, drawn at random, the same for every model.
        dtype: that the model computes in.

    Returns:
        `acc` and `acc_stderr` by task, as the harness has them, and `texts`.
    """
    import lm_eval  # slow, and printing a page does not need it
    from lm_eval.models.huggingface import HFLM

    loaded = HFLM(pretrained=str(model), dtype=dtype, trust_remote_code=trusted, device="cpu", batch_size=8)
    tasks = [_task(name, probing / f"{name}.jsonl", texts) for name in TASKS]
    found = lm_eval.simple_evaluate(loaded, tasks=tasks, log_samples=False)
    return {
        name: {"acc": row["acc,none"], "acc_stderr": row["acc_stderr,none"], "texts": texts}
        for name, row in found["results"].items()
    }


def _task(name: str, path: Path, texts: int) -> dict[str, Any]:
    """As the harness takes it."""
    from datasets import Dataset

    wording, classes = TASKS[name]
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(0).sample(lines, texts)]
    rows = [{"text": row["text"][:_MOST_CHARACTERS], "gold": list(classes).index(row["label"])} for row in rows]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": wording,
        "doc_to_choice": list(classes.values()),
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
