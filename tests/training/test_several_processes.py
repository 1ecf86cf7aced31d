"""What several processes must agree on while they train: two real ones, on two shares of one text."""

import dataclasses
import importlib.util
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import IDS, RECIPE, batches, tiny_model
from together import together

from mxdsurgery.base.digest import tensor_digest
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.conversion import train as conversion_train
from mxdsurgery.conversion.heal_text import HealingTexts, with_answers, with_kept_answers
from mxdsurgery.errors import DeviceError
from mxdsurgery.layers import sparse
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import my_contexts
from mxdsurgery.training import end_to_end
from mxdsurgery.training.end_to_end import EndToEnd, Settings, train_end_to_end
from mxdsurgery.training.initialize import initial_layer, measure_statistics
from mxdsurgery.training.teacher import original_examples

CUDA = SimpleNamespace(device=torch.device("cuda"))
LAYERS = [SimpleNamespace(n_experts=8, k=2, block=SimpleNamespace(d_model=4))]
SILENT = SimpleNamespace(say=lambda _: None)


def test_the_first_process_decides_which_weights_are_best_and_when_to_stop(tmp_path, monkeypatch):
    model = tiny_model("llama")
    block = find_blocks(model)[0].block
    plan = plan_layer(block, RECIPE)
    layer = initial_layer(model, plan, RECIPE, measure_statistics(model, [block], [next(batches())])[0])

    def work(rank):
        # In the first process the KL falls until the tenth look; in the other one it rises, and nothing beats the start.
        looks = itertools.count()
        monkeypatch.setattr(end_to_end, "validation_kl", lambda *_: (next(looks) - 10) ** 2 if rank == 0 else next(looks))
        examples = original_examples(model, (), (my_contexts(batch, RECIPE) for batch in batches(seed=1)))
        state = EndToEnd(40, 512)
        settings = Settings(validations=20, patience=3)
        train_end_to_end(model, {plan: layer}, examples, [], RECIPE, settings, Accelerator(cpu=True), state, lambda _: None)
        digests = [tensor_digest(tensor) for tensor in layer.state_dict().values()]
        return [state.step, state.best_step, state.stopped, state.validation, state.kl, digests]

    one, other = together(tmp_path, work)
    assert one == other
    assert one[:3] == [26, 20, True] and one[3][10] == [20, 0]


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_decides_whether_kernels_are_used(first, tmp_path, monkeypatch):
    trial = SimpleNamespace(install=lambda device, names: sparse.KERNELS.__setitem__(device, dict.fromkeys(names)))
    monkeypatch.setitem(sys.modules, "mxdsurgery.training.trial", trial)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def work(rank):
        def tried(_accelerator, **_):  # each process would find otherwise
            if (rank == 0) == first:
                sparse.KERNELS["cuda"] = {"select": None}
            return "what was found"

        said = []
        if rank and not first:
            sparse.KERNELS["cuda"] = {"mix": None}  # from an earlier run
        monkeypatch.setattr(conversion_train, "choose_kernels", tried)
        conversion_train.start_kernels(CUDA, LAYERS, 64, None, SimpleNamespace(say=said.append))
        return [list(sparse.KERNELS.get("cuda", {})), said]

    assert together(tmp_path, work) == [[["select"] if first else [], ["kernels    what was found"]]] * 2


def test_kernels_that_another_process_does_not_have_are_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    def work(rank):
        def tried(*_, **__):
            sparse.KERNELS["cuda"] = {"mix": None}
            return ""

        monkeypatch.setattr(conversion_train, "choose_kernels", tried)
        try:
            conversion_train.start_kernels(CUDA, LAYERS, 64, None, SILENT)
        except DeviceError as error:
            return error.found
        return ""

    assert together(tmp_path, work) == [
        "",
        "the first process uses Triton kernels, and triton is not installed where another one runs",
    ]


class Text:
    """Twelve contexts, without end."""

    contexts = torch.cat([IDS, IDS.flip(1)])[:12]

    def batches(self, size):
        return itertools.cycle(self.contexts.split(size))

    def once(self):
        return iter(self.contexts)


@pytest.mark.parametrize("teacher", ["model", "cached"])
def test_each_process_gets_its_part_of_a_batch_and_of_what_the_original_says(teacher, tmp_path):
    model = tiny_model("llama")
    texts = HealingTexts(Text(), IDS[:2], IDS[2:3], None, None)
    recipe = dataclasses.replace(Recipe(), seed=5, context=IDS.shape[1])

    def answered(folder):
        if teacher == "model":
            return with_answers(model, (), texts, 4, 1, recipe)
        folder.mkdir()
        return with_kept_answers(model, texts, 4, 1, 12, 64, folder, recipe)

    def taken(folder):
        given = answered(folder)
        first = list(itertools.islice(given.examples, 4))
        logits = torch.zeros(1, 64)
        said = [
            [targets.kl(logits, slice(row, row + 1)).item() for row in range(len(ids) * (IDS.shape[1] - 1))]
            for ids, targets in first
        ]
        return [ids.tolist() for ids, _ in first], said, sum(len(example.ids) for example in given.validation)

    whole, told, looked_at = taken(tmp_path / "alone")
    parts = together(tmp_path, lambda rank: taken(tmp_path / f"{rank}"))
    for number, batch in enumerate(whole):
        assert [parts[0][0][number], parts[1][0][number]] == [batch[0::2], batch[1::2]]
        for rank in (0, 1):
            per_context = [told[number][start : start + 15] for start in range(0, 60, 15)][rank::2]
            assert parts[rank][1][number] == pytest.approx(list(itertools.chain(*per_context)), rel=1e-4)
    assert looked_at == parts[0][2] == parts[1][2] == 2
