"""Interventions are those of the thread or task that entered them, and of no other."""

import asyncio
import contextvars
import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from tiny import IDS, tiny_opened
from tokenizers import Tokenizer, models
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from mxdsurgery.layers import in_force
from mxdsurgery.layers.in_force import InterventionError

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def opened():
    return tiny_opened().converted.model


@pytest.fixture
def model(opened):
    yield opened
    assert not in_force._Shared.holders and not opened._forward_hooks and not opened._forward_pre_hooks
    assert all(layer.gate.interventions is layer.experts.interventions is None for layer in opened.mxd.layers.values())


def changes(model, amount=50.0):
    return model.mxd.steer({0: {3: amount}, 1: {5: amount}}).replace({1: {2: torch.linspace(-3, 3, 32)}})


def logits(model):
    return model(IDS).logits


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def test_each_thread_sees_what_it_entered_itself(model):
    """All of them inside of their contexts at the same time, several rounds, the positions of their own passes too."""
    own = [None, changes(model), changes(model, -50.0), model.mxd.steer({0: {3: 50.0}}, positions=[2, 5])]
    alone = [logits(model)]
    for one in own[1:]:
        with one:
            alone.append(logits(model))
    assert all(not torch.allclose(a, b) for i, a in enumerate(alone) for b in alone[:i])
    barrier, found = Barrier(len(own)), {}

    def run(number):
        for _ in range(5):
            with own[number] or model.mxd:
                barrier.wait(60)
                found.setdefault(number, []).append(logits(model))
                barrier.wait(60)

    threads = [Thread(target=run, args=(number,)) for number in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(alone):
        assert len(found[number]) == 5 and all(torch.equal(one, wanted) for one in found[number])


def test_one_object_may_be_entered_by_several_threads(model):
    mine = changes(model)
    with mine:
        wanted = logits(model)
        assert torch.equal(in_thread(mine.bind(logits), model), wanted)
        with mine:
            assert len(model.mxd.in_force(0)) == 2
        assert torch.equal(logits(model), wanted) and len(model.mxd.in_force(0)) == 1


def test_tasks_of_asyncio_do_not_see_each_others(model):
    plain = logits(model)
    with changes(model):
        wanted = logits(model)

    async def changed(entered, done):
        with changes(model):
            entered.set()
            await done.wait()
            assert torch.equal(logits(model), wanted)
            assert torch.equal(await asyncio.to_thread(logits, model), wanted)  # takes its task's context along
            return await asyncio.create_task(asyncio.to_thread(logits, model))

    async def main():
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(changed(entered, done))
        await entered.wait()
        with model.mxd:
            other = logits(model), await asyncio.to_thread(logits, model)
        done.set()
        return *other, await task

    here, beside, inside = asyncio.run(main())
    assert torch.equal(here, plain) and torch.equal(beside, plain) and torch.equal(inside, wanted)


def test_a_thread_started_inside_is_warned_that_it_has_none(model):
    plain = logits(model)
    with changes(model), pytest.warns(UserWarning, match=r"hold where they were entered only.*changes.bind\(model.generate\)"):
        assert torch.equal(in_thread(logits, model), plain)


@pytest.mark.filterwarnings("error")
def test_a_thread_that_says_it_wants_none_is_not_warned(model):
    plain = logits(model)

    def without():
        with model.mxd:
            return logits(model)

    with changes(model):
        assert torch.equal(in_thread(without), plain)


@pytest.mark.filterwarnings("error")
def test_streaming_from_a_thread(model):
    """As transformers' documentation streams: `generate` in a thread, its text read here."""
    words = {str(number): number for number in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "0")), unk_token="0")
    plain = model.generate(IDS[:1], **OPTIONS)
    with changes(model):
        wanted = model.generate(IDS[:1], **OPTIONS)
    assert not torch.equal(plain, wanted)

    def streamed(target, *args):
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = Thread(target=target, args=(*args, IDS[:1]), kwargs=OPTIONS | {"streamer": streamer})
        thread.start()
        said = "".join(streamer).split()
        thread.join()
        return [int(word) for word in said]

    assert streamed(changes(model).bind(model.generate)) == wanted[0].tolist()
    with changes(model):
        assert streamed(contextvars.copy_context().run, model.generate) == wanted[0].tolist()
    assert streamed(model.generate) == plain[0].tolist()


def test_what_only_begins_when_called_cannot_be_bound(model):
    async def coroutine(): ...

    def generator():
        yield

    for function in (coroutine, generator):
        with pytest.raises(InterventionError, match=f"{function.__name__} only begins when it is called"):
            changes(model).bind(function)


def test_leaving_ends_them_wherever_they_were_taken(model):
    plain = logits(model)
    with changes(model):
        taken = contextvars.copy_context()
        assert not torch.equal(taken.run(logits, model), plain)
    assert torch.equal(taken.run(logits, model), plain)


def test_leaving_in_another_context_than_entering(model):
    """As fixtures of asynchronous tests do."""
    plain, mine = logits(model), changes(model)
    elsewhere = contextvars.copy_context()
    elsewhere.run(mine.__enter__)
    assert not torch.equal(elsewhere.run(logits, model), plain)
    mine.__exit__(None, None, None)
    assert torch.equal(elsewhere.run(logits, model), plain) and torch.equal(logits(model), plain)


def test_a_copy_of_a_changed_model_is_not_changed(model):
    plain = logits(model)
    with changes(model):
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), plain)
    assert torch.equal(logits(copied), plain)
    assert copied.mxd.layers[0].gate.interventions is None


def test_weights_are_never_written(model):
    weight = model.mxd.layers[1].experts.weight
    before, version = weight.clone(), weight._version
    with changes(model):
        logits(model)
        assert weight._version == version and torch.equal(weight, before)


def test_a_backward_pass_in_a_thread_without_them_is_refused(model):
    """With gradient checkpointing on a GPU, torch computes forward passes again in a thread of its own."""
    layer = model.mxd.layers[0]
    x = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    with changes(model):
        loss = checkpoint(layer, x, use_reentrant=False).square().sum()
        with pytest.raises(InterventionError, match="gradient_checkpointing_disable"):
            in_thread(loss.backward)
        wanted = torch.autograd.grad(layer(x).square().sum(), x)[0]
        loss = checkpoint(layer, x, use_reentrant=False).square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)


def test_copies_for_the_threads_of_data_parallel_are_refused(model):
    with changes(model):
        copied = model.mxd.layers[0].gate._replicate_for_data_parallel()
        copied.weight, copied.bias = (getattr(model.mxd.layers[0].gate, name) for name in ("weight", "bias"))
        with pytest.raises(InterventionError, match="nn.DataParallel"):
            in_thread(copied, torch.randn(3, 32, dtype=torch.float64))


def test_a_compiled_layer_keeps_threads_apart(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process compiled, too
    layer, x = model.mxd.layers[1], torch.randn(5, 32, dtype=torch.float64)
    compiled, plain = torch.compile(layer, backend="eager"), layer(x)
    torch.testing.assert_close(compiled(x), plain)
    for amount in (50.0, -50.0):
        with changes(model, amount):
            torch.testing.assert_close(compiled(x), layer(x))
            torch.testing.assert_close(quietly(in_thread, compiled, x), plain)
            assert not torch.allclose(layer(x), plain)
    torch.testing.assert_close(compiled(x), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 12  # nothing is compiled anew for each context
