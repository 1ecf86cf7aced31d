"""Prompts and questions, and how a model and its converted one continue or answer them."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import mxdsurgery
from mxdsurgery.base.model import open_model
from mxdsurgery.editing.sampling import Sampling, chat_ids, prompt_ids, sample

BOOK_PROMPTS = (
    "It was a dark and stormy night, and the",
    "The old man looked at the sea and",
    "In the year of our Lord",
    '"I do not believe you," said the',
    "The history of the city begins with",
    "She opened the letter with trembling hands, and",
    "The film tells the story of a young man who",
    "The President of the United States",
    "When the army reached the river, the general",
    "def __init__(self, name):\n",
)
STORY_PROMPTS = (
    "Once upon a time there was a little girl named",
    "One day, a boy found a big red ball in the",
    "The cat wanted to play with the",
    "Lily and Tom went to the park with their mom. They",
    "The little bird was sad because",
    '"Can I have a cookie?" asked',
    "It was a sunny day and the dog",
    "The bear was very hungry. He",
    'Mom said, "It is time to go to bed." But',
    "They saw a big tree and",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that returns the sum of a list.",
    "Translate into French: I am hungry.",
    "What is 12 plus 30?",
    "Name three animals that live in the ocean.",
    "Who wrote Romeo and Juliet?",
    "Give me a tip for sleeping better.",
    "Summarise in a few words: The cat sat on the mat because it was warm.",
)
NEW_TOKENS = 40


def continuations(prompts: tuple[str, ...], folder: Path, original: Path, chat: bool = False) -> dict[str, Any]:
    """Greedy continuations of fixed prompts, or answers to them in a chat, by the original and by the converted model."""
    converted, rows = mxdsurgery.load(folder), []
    tokenizer = converted.tokenizer()
    models = (open_model(str(original)).load(dtype=converted.plan.dtype), converted.model)
    for prompt in prompts:
        ids = (chat_ids if chat else prompt_ids)(tokenizer, prompt)
        made = [sample(model, tokenizer, ids, Sampling(NEW_TOKENS, temperature=0))[0, ids.shape[1] :] for model in models]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*(new.tolist() for new in made), strict=False)))
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        longest = max(map(len, made))
        row = {"prompt": prompt, "original": texts[0], "converted": texts[1], "same": same, "of": longest}
        rows.append(row | {"chosen": agreeing_choices(converted.model, ids, made[0]), "choices": len(made[0])})
    return {"model": original.name, "run": folder.name, "rows": rows}


@torch.no_grad()
def agreeing_choices(model: torch.nn.Module, ids: torch.Tensor, continuation: torch.Tensor) -> int:
    """How many tokens of a continuation (M,) of ids (1, P) are the model's likeliest, given all tokens before them."""
    logits = model(input_ids=torch.cat([ids, continuation[None]], 1), use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    return int((logits.argmax(-1) == continuation).sum())
