"""``generate``: text from a converted model, to see that it still speaks."""

from pathlib import Path

import torch

from mxdsurgery.checkpoint import load


def generate(
    folder: str | Path,
    *,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    top_p: float = 0.95,
    samples: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> list[str]:
    """Samples continuations of a prompt.

    Args:
        folder: what ``convert`` wrote.
        prompt: how the text begins.
        max_new_tokens: at most so many tokens more.
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: share of the probability mass that is sampled from.
        samples: how many continuations.
        seed: of the sampling.
        device: where to run.

    Returns:
        The texts, prompt included.

    Raises:
        NotConvertedError: the folder is not one of ours.
    """
    converted = load(folder, device=device)
    tokenizer = converted.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if inputs.shape[1] == 0:  # an empty prompt and a tokenizer without BOS
        inputs = torch.tensor([[tokenizer.eos_token_id or 0]], device=device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    output = converted.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)
