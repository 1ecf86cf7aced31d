"""Running a model: the one place that calls its ``forward``, and takes out of its output what is meant.

Transformers' own models take ``input_ids`` and ``use_cache`` and return a `ModelOutput`. Code that came with a model may take
less, and return a tuple or a tensor: `check_runs` says at once what is missing.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.foreign import came_with_the_model, raised
from mxdsurgery.base.offload import execution_device
from mxdsurgery.base.surgery import answering
from mxdsurgery.errors import MxDError, UnsupportedModelError

# Contexts and tokens that show what a model's own code returns.
_TRIED = (2, 6)


@contextmanager
def hooked(*hooks: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes hooks on leaving, however the block is left."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run(module, ids):
    """What a model, or its base model, returns for ids (B, T). It keeps no keys and values if it can be told not to."""
    known = inspect.signature(type(module).forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {"use_cache": False} if open_ended or "use_cache" in known else {}
    return module(input_ids=ids, **given) if open_ended or "input_ids" in known else module(ids, **given)


def first_tensor(output):
    """The tensor that is meant in an output: the output itself, its logits, or the first that it holds; None without one."""
    held = (output,) if hasattr(output, "shape") else (getattr(output, "logits", None), *_values(output))
    return next((value for value in held if hasattr(value, "shape")), None)


def _values(output):
    return output.to_tuple() if hasattr(output, "to_tuple") else output if isinstance(output, (tuple, list)) else ()


# The same functions as text, for a process that cannot import mxdsurgery.
RUN = "import inspect\n\n" + "\n\n".join(map(inspect.getsource, (run, first_tensor, _values)))


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """A model's logits: ids (B, T) -> (B, T, V)."""
    return first_tensor(run(model, ids))


def run_base(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Runs all of a model but its language-model head, for what hooks see of it: ids (B, T) -> (B, T, D).

    Where a family has no base model, all of the model runs, and the logits are returned.
    """
    return first_tensor(run(model.base_model, ids))


class _Answer(BaseModelOutputWithPastAndCrossAttentions):
    """The output of a decoder that is not run: hidden states; all else that families return (router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder layers."""
    path, _ = decoder_layers(model)
    return model.base_model.get_submodule(path.rpartition(".")[0])


class _Head(Exception):
    """Ends a forward pass before the language-model head; ``args[0]`` is what would have entered it."""


def _entering_head(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What enters the language-model head of a model that runs its decoder layers itself: ids (B, T) -> (B, T, D)."""

    def enter(_head: nn.Module, args: tuple) -> None:
        raise _Head(args[0])

    with hooked(model.get_output_embeddings().register_forward_pre_hook(enter)):
        try:
            run(model, ids)
        except _Head as entered:
            return entered.args[0]
    raise AssertionError("check_runs has seen that the head runs")


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The input of the language-model head: ids (B, T) -> (B, T, D)."""
    decoder = _decoder(model)
    if decoder is model:
        return _entering_head(model, ids)
    inner = model.base_model if model.base_model is not model else decoder  # not every family has a base model
    return first_tensor(run(inner, ids))


def predict(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits from what `hidden_states` gives: (n, D) -> (n, V), by the family's own code."""
    decoder = _decoder(model)
    if decoder is model:
        return model.get_output_embeddings()(hidden)
    # As its decoder returns this at once, the model computes only what comes after: the head, scales or caps of the logits.
    with answering(decoder, lambda *_, **__: _in_the_form_of(model, hidden[None])):
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return logits_of(model, ids)[0]


def _in_the_form_of(model: PreTrainedModel, hidden: Tensor) -> object:
    """Hidden states as the model's decoder returns them: a `ModelOutput`, or as `check_runs` saw of code of its own."""
    form = getattr(model, "_answer_form", None)
    if form is None:
        return _Answer(last_hidden_state=hidden)
    return hidden if form == 0 else (hidden, *[None] * (form - 1))


@torch.no_grad()
def check_runs(name: str, model: PreTrainedModel) -> None:
    """Checks that a model whose code came with it can be run as the commands run it, and notes what its decoder returns.

    Args:
        name: of the model, for people.
        model: one of transformers' own is not run.

    Raises:
        UnsupportedModelError: its ``forward`` raises, lacks something, or returns something else than logits.
    """
    if not came_with_the_model(type(model)):
        return
    ids = torch.arange(_TRIED[0] * _TRIED[1], device=execution_device(model)).view(_TRIED)
    ids = ids % model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise _cannot(model, "get_output_embeddings() returns no module", "its language-model head", name)
    with own_code_named(model, "forward(input_ids)", name):
        logits = logits_of(model, ids)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        found = "no tensor" if logits is None else f"a tensor {tuple(logits.shape)}"
        expected = "logits (B, T, V) of every position"
        raise _cannot(model, f"its forward returns {found} for ids {tuple(ids.shape)}", expected, name)
    decoder, returned = _decoder(model), []
    with own_code_named(model, "its base model", name):
        with hooked(decoder.register_forward_hook(lambda _module, _args, output: returned.append(output))):
            hidden = hidden_states(model, ids)
        if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            expected = "those that enter the language-model head"
            raise _cannot(model, "its base model returns no hidden states (B, T, D)", expected, name)
        if decoder is not model and returned and not hasattr(returned[0], "to_tuple"):
            model._answer_form = 0 if isinstance(returned[0], Tensor) else len(returned[0])
        again = predict(model, hidden.flatten(0, 1)).view_as(logits)
    if not torch.allclose(again.float(), logits.float(), rtol=1e-2, atol=1e-2 * logits.abs().max().item()):
        found = "its logits are not what it computes from the hidden states that its decoder returns"
        raise _cannot(model, found, "a forward that applies the language-model head to these", name)


@contextmanager
def own_code_named(model: PreTrainedModel, what: str, name: str | None = None) -> Iterator[None]:
    """Within it, whatever is raised by a model whose code came with it becomes a named error.

    Args:
        model: the model.
        what: is being done, in words.
        name: of the model, for people; default: its class's alone.

    Raises:
        UnsupportedModelError: it raised something.
    """
    try:
        yield
    except MxDError:
        raise
    except Exception as error:  # the code may raise anything
        if not came_with_the_model(type(model)):
            raise
        raise _cannot(model, f"{what}: {raised(error)}", "what transformers' own models take and return", name) from None


def _cannot(model: PreTrainedModel, found: str, expected: str, name: str | None) -> UnsupportedModelError:
    own = f"{type(model).__name__}, whose code came with it,"
    return UnsupportedModelError(
        f"{own if name is None else f'{name!r} ({own[:-1]})'} cannot be run: {found}",
        expected=expected,
        fix="its authors can mend this in its modeling file; in a copy of the folder, so can you",
    )
