"""Sampling text from a model: every parameter is ours to state, and none comes from the model's generation config."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mxdsurgery.base.running import own_code_named
from mxdsurgery.errors import EditError, RecipeError, first_line
from mxdsurgery.hardware.randomness import generator_on

# What says how a model's text is written down, not which text it is: the base's generation config may set these.
_OF_THE_BASE = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """The prompt as token ids, (1, P); the end-of-text token for an empty one with a tokenizer that adds nothing."""
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    return inputs if inputs.shape[1] else torch.tensor([[tokenizer.eos_token_id or 0]])


def chat_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> Tensor:
    """What a user says to the model, up to where its answer begins, as token ids, (1, P), by its chat template.

    Raises:
        RecipeError: the tokenizer has no chat template, or its template does not take a user's message.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            "the model's tokenizer has no chat template",
            expected="a model that was made for chats",
            fix="leave out --chat, and write the prompt as the model's texts begin",
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template raises whatever it likes
        raise RecipeError(
            f"the model's chat template refuses a user's message: {first_line(error)}",
            expected="a template that takes one message of the role 'user'",
            fix="leave out --chat, and write the prompt as the model's texts begin",
        ) from None
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()


@dataclass(frozen=True)
class Sampling:
    """How continuations are sampled; by default, from what the model predicts.

    Attributes:
        max_new_tokens: M.
        temperature: that logits are divided by; 0 takes the likeliest token each time.
        samples: S, how many of each prompt.
        top_k: how many of the likeliest tokens are sampled from; None: all.
        top_p: share of the probability mass that is sampled from.
        seed: the same one gives sample i the same random numbers, whatever the model computes.

    Raises:
        RecipeError: there are several samples at temperature 0.
    """

    max_new_tokens: int
    temperature: float = 1.0
    samples: int = 1
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.samples > 1:
            raise RecipeError(
                f"{self.samples} samples at temperature 0 would all be the same",
                expected="one sample, or a temperature above 0",
            )


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Tensor,
    sampling: Sampling,
    to_the_end: bool = False,
) -> Tensor:
    """Samples continuations as tokens. Of the model's generation config, the ids of special tokens count and nothing else.

    Args:
        model: any language model, as it is.
        tokenizer: the model's.
        inputs: B prompts, (B, P).
        sampling: how; M new tokens at most, S samples.
        to_the_end: whether every text gets M new tokens: the end-of-text token is then never drawn.

    Returns:
        (B S, P + M) or fewer columns, int64, prompt included, padded where a text ended.

    Raises:
        RecipeError: the text would be longer than the model can read.
        EditError: the model's predictions are NaN or infinite.
        UnsupportedModelError: code that came with the model cannot generate.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    new, samples = sampling.max_new_tokens, sampling.samples
    if room is not None and inputs.shape[1] + new > room:
        raise RecipeError(
            f"a prompt of {inputs.shape[1]} tokens and {new} new ones are more than the {room} the model reads",
            expected=f"at most {room} together",
            fix="a shorter prompt or fewer --max-new-tokens",
        )
    inputs = inputs.to(model.device).repeat_interleave(samples, 0)
    with (
        own_code_named(model, "generate() of transformers, which needs GenerationMixin and logits in a ModelOutput"),
        _settings(model, tokenizer) as ours,
    ):
        ours.update(do_sample=False, max_new_tokens=new, min_new_tokens=new if to_the_end else None)
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=ours,
            logits_processor=_drawing(sampling, inputs.device),
        )


@contextmanager
def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[GenerationConfig]:
    """Settings for `generate`. It fills in from the model's own what they leave open, so these are set aside meanwhile."""
    base = getattr(model, "generation_config", None)
    ours = GenerationConfig(**{name: value for name in _OF_THE_BASE if (value := getattr(base, name, None)) is not None})
    if ours.eos_token_id is None:
        ours.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None or ours.pad_token_id is None:
        ours.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if base is None:  # its own code, which says by itself whether it can generate
        yield ours
        return
    model.generation_config = GenerationConfig()
    try:
        yield ours
    finally:
        model.generation_config = base


def _drawing(sampling: Sampling, device: torch.device) -> LogitsProcessorList:
    """What makes logits such that the largest is the token that is drawn."""
    steps: list[Callable[[Tensor, Tensor], Tensor]] = [_finite]
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(_Draw(device, sampling.seed))
    return LogitsProcessorList(steps)


def _finite(_ids: Tensor, logits: Tensor) -> Tensor:
    """The logits, checked: where one is NaN or +∞ there is nothing to draw from, and on a GPU the process would end."""
    if not (logits < math.inf).all():
        raise EditError("the model's predictions are no numbers any more", fix="edit with smaller numbers")
    return logits


class _Draw:
    """Adds Gumbel noise: the largest sum is token v with probability softmax(logits)_v.

    This is what `torch.multinomial` does, here with random numbers of our own: those of the process are left alone, and no
    other thread comes between.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.generator = generator_on(device).manual_seed(seed)

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        noise = torch.empty(logits.shape, dtype=torch.float32, device=self.generator.device)
        return logits - noise.exponential_(generator=self.generator).log().to(logits.device)
