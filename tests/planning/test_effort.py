"""What evaluation takes and how much of the text it uses, with given times; and a run's remaining time, with a fake clock."""

import json
from types import SimpleNamespace

import pytest

from mxdsurgery.planning.calibrate import Calibration
from mxdsurgery.planning.effort import (
    Alone,
    Rates,
    Runs,
    evaluation_runs,
    fewest_contexts_alone,
    fitted_together,
    jacobian_inputs,
    solving_seconds,
)
from mxdsurgery.terminal.console import Pace
from mxdsurgery.training.cost import Group, fit_bytes, fit_flops
from mxdsurgery.training.distill import active_experts

# Contexts and their length, with which derivatives are taken at one input of each; these take ten passes through a layer.
MANY, ONE = (4096, 128), 3 / 128


def blocks(*layers, d_hidden=32):
    return [SimpleNamespace(layer=layer, d_model=8, d_hidden=d_hidden) for layer in layers]


def test_runs_are_those_of_the_variants_counted_one_by_one():
    together, alone = evaluation_runs(blocks(1, 3), 4, *MANY)
    # Statistics up to layer 3; dense paths fitted, up to there too, two of them; the original; nine variants from layer 1 on:
    # converted, frozen, permuted, shuffled, random gate, single expert, retrained, zero and mean. Five of them run the layers.
    # Layer 1 gets the same input in all of them, and so does each layer alone: it runs once.
    assert together == Runs(4 + 4 + 2 + 4 + 9 * 3, (1 + ONE) * 2 + 5 + 1, 1 + 9)
    # The original; the variants from layer 1 on, and from layer 3 on.
    assert alone == Runs(4 + 9 * 3 + 9 * 1, 2, 1 + 9 + 9)
    assert evaluation_runs(blocks(3), 4, *MANY)[1] == Runs(0, 0, 0)  # a single layer is all of them
    with_maps = evaluation_runs(blocks(3), 4, *MANY, more=True)
    assert with_maps[0].decoder_layers == 4 + 5 + 4 + 9 * 4 and with_maps[1].heads == 1 + 9
    several = evaluation_runs(blocks(2), 4, *MANY, ["mxd", "mxd", "transcoder", "topk-sae", "dense"])[0]
    variants = 2 + 7 + 7 + 6 + 6 + 2  # a transcoder's dense path is a constant, and a dense layer has no choice of experts
    assert several == Runs(3 + 3 + 2 + 4 + variants * 2, 5 * (1 + ONE) + 5, 1 + variants)
    assert Rates(2.0, 3.0, 5.0).seconds(Runs(10, 1, 4)) == 43.0


def test_derivatives_are_counted_and_become_less_than_a_pass_in_long_texts():
    assert [jacobian_inputs(contexts, 128) for contexts in (1, 32, 64, 4096, 10_000)] == [127, 127, 64, 1, 1]
    assert jacobian_inputs(4, 3) == 2
    short, long = (evaluation_runs(blocks(0), 4, contexts, 128)[0].new_layers for contexts in (64, 4096))
    assert short - long == 3 * (64 - 1) / 128


def test_solving_for_dense_paths_takes_the_same_time_however_long_the_text():
    flops = 2 * (13 * (33**3 // 3 + 2 * 33**2 * 8) + 12 * 2 * 33**2 * 8)
    assert fit_flops(blocks(0)[0], "mxd") == flops
    assert solving_seconds(blocks(0, 1), ["mxd", "transcoder"], lambda: 100.0) == 2 * flops / 100
    assert solving_seconds(blocks(0), ["transcoder"], lambda: pytest.fail("nothing is solved")) == 0
    assert (
        Alone(seconds=300.0).contexts(0.1, 1.0, 1000, 128, once=100.0)
        == 64
        < Alone(seconds=300.0).contexts(0.1, 1.0, 1000, 128)
    )


def test_dense_paths_are_fitted_in_as_many_passes_as_memory_asks(monkeypatch):
    monkeypatch.setattr("mxdsurgery.planning.effort.FIT_BYTES", 2 * fit_bytes(blocks(0)[0], "mxd"))
    groups = fitted_together(blocks(0, 1, 2, 3, 4), ["mxd"])
    assert [[block.layer for block in group] for group in groups] == [[0, 1], [2, 3], [4]]
    assert [len(group) for group in fitted_together(blocks(0, 1, d_hidden=500), ["mxd"])] == [1, 1]  # too large for two
    assert fitted_together(blocks(0, 1), ["transcoder", "topk-sae", "dense"]) == []
    runs, _ = evaluation_runs(blocks(0, 1, 2, 3, 4), 5, *MANY)
    monkeypatch.undo()
    assert runs.decoder_layers - evaluation_runs(blocks(0, 1, 2, 3, 4), 5, *MANY)[0].decoder_layers == 2 + 4


@pytest.mark.parametrize(
    ("seconds", "contexts"),
    [
        (0.0, 32),  # no time at all: the least that is worth measuring
        (100.0, 32),  # all layers together take as much
        (100.0 + 32, 32),
        (100.0 + 255, 128),  # a power of two, so that small differences in time change nothing
        (100.0 + 257, 256),
        (100.0 + 999, 512),
        (100.0 + 1000.1, 1000),  # and all, where there is time for all
        (1e9, 1000),
    ],
)
def test_single_layers_get_the_contexts_that_the_time_allows(seconds, contexts):
    assert Alone(seconds=seconds).contexts(together=0.1, alone=1.0, contexts=1000, length=128) == contexts


def test_the_least_is_4k_tokens_in_16_contexts_or_all_there_is():
    assert fewest_contexts_alone(1000, 128) == 32
    assert fewest_contexts_alone(1000, 100) == 41  # no fewer than 4096 tokens
    assert fewest_contexts_alone(1000, 2048) == 16  # intervals are taken over contexts
    assert fewest_contexts_alone(10, 128) == 10
    assert Alone(seconds=0.0).contexts(0.1, 1.0, contexts=10, length=128) == 10


def test_a_number_of_tokens_that_was_given_counts_whatever_the_time():
    for tokens, contexts in ((1, 1), (128 * 5 + 127, 5), (10**6, 1000)):
        assert Alone(tokens, seconds=0.0).contexts(0.1, 1.0, contexts=1000, length=128) == contexts
    assert Alone().contexts(0.1, 1.0, contexts=1000, length=128) == 1000


def group(step_flops):
    zero = dict.fromkeys(("parameters", "base_bytes", "finished_bytes", "new_bytes", "gradient_bytes"), 0)
    zero |= dict.fromkeys(("adam_bytes", "activation_bytes", "text_bytes"), 0)
    return Group(layers=[0], flops={"base_forward": 100, "gate": step_flops}, **zero)


def calibration(k_seconds, step_seconds):
    return Calibration(step_seconds, 10, 512, base_seconds=0.5, base_flops=100, base_from="forward pass", k_seconds=k_seconds)


def test_the_training_is_integrated_over_the_falling_k():
    k_seconds = [[32, 1.0], [144, 4.0], [256, 5.0]]  # not on a line
    steps, batch = 1000, 512
    made = calibration(k_seconds, step_seconds=2.0)
    cost = made.cost([group(10)], steps, batch)
    taken = [cost((step + 1) * batch) - cost(step * batch) for step in range(steps)]
    # A hundredth of the steps counts as one: K changes by little in it.
    assert taken[0] == pytest.approx(0.5 + 5.0, rel=0.01)
    assert taken[-1] == pytest.approx(0.5 + 1.0)
    for step in (200, 350, 500, 650):
        k = active_experts(step, steps, 32, 256)
        (low, fast), (high, slow) = k_seconds[:2] if k < 144 else k_seconds[1:]
        assert taken[step] == pytest.approx(0.5 + fast + (slow - fast) * (k - low) / (high - low), rel=0.03)
    assert cost(0) == 0.0 and sum(taken) == pytest.approx(cost(steps * batch))


def test_groups_follow_each_other_and_an_older_calibration_has_one_rate():
    made = calibration([], step_seconds=2.0)
    cost = made.cost([group(10), group(30)], steps=100, batch=8)
    assert cost(800) == pytest.approx(made.seconds(group(10), 100)) == pytest.approx(250.0)
    assert cost(1600) - cost(800) == pytest.approx(made.seconds(group(30), 100)) == pytest.approx(650.0)
    assert cost(1200) - cost(800) == pytest.approx(325.0)
    values = json.loads(json.dumps(vars(calibration([[4, 1.0], [8, 2.0]], 1.5))))
    assert Calibration(**values) == calibration([[4, 1.0], [8, 2.0]], 1.5)


class Work:
    """A thousand units that take from 4 seconds down to 1, and a pace that watches; another job may slow it down."""

    def __init__(self, cost):
        self.now, self.done, self.begun_at = 0.0, 0, 0
        self.pace = Pace(cost, clock=lambda: self.now)

    @staticmethod
    def seconds(unit):
        return 1.0 + 3.0 * max(0.0, 1 - unit / 700)

    def go(self, until, slower=1.0):
        while self.done < until:
            self.now += slower * self.seconds(self.done)
            self.done += 1
            if self.done % 20 == 0:
                self.pace.update(self.done, 1000)

    @property
    def truly_left(self):
        return sum(map(self.seconds, range(self.done, 1000)))


def test_what_is_left_knows_that_the_work_gets_cheaper():
    cost = lambda done: 0.01 * sum(map(Work.seconds, range(int(done))))  # noqa: E731  predicted 100 times too fast
    knows, does_not = Work(cost), Work(None)
    for until in (100, 400, 800, 980):
        for work in (knows, does_not):
            work.go(until)
        assert knows.pace.left == pytest.approx(knows.truly_left, rel=0.02)
    blind = Work(None)
    blind.go(100)
    assert blind.pace.left > 1.5 * blind.truly_left


def test_what_is_left_follows_a_machine_that_becomes_slower_and_free_again():
    work = Work(lambda done: sum(map(Work.seconds, range(int(done)))))
    work.go(400, slower=20.0)
    assert work.pace.left == pytest.approx(20 * work.truly_left, rel=0.02)
    work.go(460)
    assert work.pace.left == pytest.approx(work.truly_left, rel=0.02)
    assert work.pace.rate == pytest.approx(1 / Work.seconds(450), rel=0.1)


def test_work_that_goes_on_is_not_credited_with_what_was_done_before():
    now = iter((0.0, 10.0, 20.0))
    pace = Pace(clock=lambda: next(now))
    pace.update(500, 1000)
    pace.update(510, 1000)
    assert pace.rate == pytest.approx(1.0) and pace.left == pytest.approx(490.0)
