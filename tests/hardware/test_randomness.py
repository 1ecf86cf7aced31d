"""Random numbers of one's own: those of a seed, whatever other threads draw, and nothing is drawn from the process's."""

import threading

import pytest
import torch
from torch import nn

from mxdsurgery.hardware.randomness import OwnNumbers
from mxdsurgery.layers.layer import MxDLayer

DRAWN = {
    "linear": lambda: nn.Linear(7, 9).weight,
    "normal": lambda: nn.init.normal_(torch.empty(33, 5)),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(20, 20)),
    "randn": lambda: torch.randn(3, 4),
    "randint": lambda: torch.randint(9, (7,)),
    "randint from": lambda: torch.randint(2, 9, (7,)),
    "randperm": lambda: torch.randperm(11),
    "like": lambda: torch.rand_like(torch.empty(6)),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(8), 3),
    "dropout": lambda: torch.dropout(torch.ones(50), 0.5, True),
}


@pytest.mark.parametrize("name", DRAWN)
def test_they_are_those_of_the_seed_and_leave_the_process_alone(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = [DRAWN[name]() for _ in range(2)]
    before = torch.get_rng_state()
    with OwnNumbers(5):
        drawn = [DRAWN[name]() for _ in range(2)]
    assert all(one.equal(other) for one, other in zip(drawn, wanted, strict=True)) and not drawn[0].equal(drawn[1])
    assert torch.get_rng_state().equal(before)


def test_a_generator_that_is_given_is_used_and_meta_tensors_draw_nothing():
    with OwnNumbers(5):
        given = torch.rand(4, generator=torch.Generator().manual_seed(1))
        assert nn.Linear(3, 3, device="meta").weight.is_meta
    assert given.equal(torch.rand(4, generator=torch.Generator().manual_seed(1)))


def test_threads_at_the_same_time_do_not_disturb_each_other_nor_who_draws_beside_them():
    def made(seed):
        with OwnNumbers(seed):
            return MxDLayer(
                d_model=16, d_hidden=32, kind="glu", activation="silu", encoder_bias=False, n_experts=64, k=4
            ).state_dict()

    alone, found, together = {seed: made(seed) for seed in range(3)}, [], threading.Barrier(3)

    def work(seed):
        together.wait()
        found.extend((seed, made(seed)) for _ in range(20))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        wanted = [torch.rand(2) for _ in range(2000)]
        torch.manual_seed(9)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
        for thread in threads:
            thread.start()
        beside = [torch.rand(2) for _ in range(2000)]
        for thread in threads:
            thread.join()
    assert len(found) == 60 and all(one.equal(alone[seed][name]) for seed, state in found for name, one in state.items())
    assert all(one.equal(other) for one, other in zip(beside, wanted, strict=True))
