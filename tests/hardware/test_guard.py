"""A caller's state of torch does not reach the public functions, and is there again after them."""

import contextlib
import inspect
import random
import shutil
import threading

import numpy
import pytest
import torch
from running import random_states

import mxdsurgery
from mxdsurgery.errors import OutputError
from mxdsurgery.hardware import guard
from mxdsurgery.hardware.guard import guarded

TINY_RUN = {"tokens": 4_096, "eval_tokens": 300, "n_experts": 64, "k": 4, "batch": 512, "shuffle": 2_000}
WORKING = {name for name in mxdsurgery.__all__ if name[0].islower()} - {"register_family"}


def state():
    """What torch does where nothing else is said."""
    made = torch.empty(1)
    product = made.device.type == "cpu" and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": made.dtype,
        "device": made.device.type,
        "product": product,
        "autocast": torch.is_autocast_enabled("cpu"),
        "precision": torch.get_float32_matmul_precision(),
        "stops": torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    }  # fmt: skip


PLAIN = state()


class set_by:
    """A setting of torch's as a context."""

    def __init__(self, setter, value, before):
        self.setter, self.value, self.before = setter, value, before

    def __enter__(self):
        self.setter(self.value)

    def __exit__(self, *_):
        self.setter(self.before)


# What a notebook may have done before, by how it can be undone here.
STATES = {
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "float16": lambda: set_by(torch.set_default_dtype, torch.float16, torch.float32),
    "float64": lambda: set_by(torch.set_default_dtype, torch.float64, torch.float32),
    "default meta": lambda: set_by(torch.set_default_device, "meta", None),
    "within meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "medium": lambda: set_by(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: set_by(torch.use_deterministic_algorithms, True, False),
}


@guarded
def looks(*, raises: bool = False) -> dict:
    """Returns the state in it."""
    if raises:
        raise OutputError("as asked")
    return state()


@pytest.mark.parametrize("name", STATES)
def test_state_is_plain_inside_and_put_back_afterwards(name):
    with STATES[name]():
        before = state()
        assert before != PLAIN
        inside = looks()
        assert {**inside, "stops": False} == PLAIN | {"stops": False} and not inside["stops"]
        assert state() == before
        with pytest.raises(OutputError):
            looks(raises=True)
        assert state() == before
    assert state() == PLAIN


def test_a_default_device_that_is_not_there(monkeypatch):
    def missing():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "get_default_device", missing)
    assert looks()["device"] == "cpu"


def test_precision_set_for_one_kind_of_device_alone():
    place = torch.backends.cuda.matmul
    before = place.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert looks()["precision"] == "highest"
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_random_numbers_go_on_as_if_nothing_had_been_called():
    def seed(number):
        torch.manual_seed(number), random.seed(number), numpy.random.seed(number)

    def drawn():
        return [*torch.rand(3).tolist(), *numpy.random.rand(3), random.random()]

    @guarded
    def draws():
        seed(0)
        return drawn()

    seed(5)
    wanted = drawn()
    seed(5)
    first, second = draws(), draws()
    assert first == second != wanted
    assert drawn() == wanted


def test_what_only_looks_leaves_random_numbers_alone(converted, tmp_path):
    before = random_states()
    mxdsurgery.analyze("demo-glu")
    mxdsurgery.plan("demo-glu", measure=True, tokens=1_000, device="cpu")
    mxdsurgery.load(converted.out)
    mxdsurgery.dissect(shutil.copytree(converted.out, tmp_path / "out"))
    assert random_states() == before


def test_two_calls_in_threads_put_the_caller_s_state_back():
    inside, leave, seen = threading.Barrier(2), threading.Event(), []

    @guarded
    def waits(event):
        inside.wait(10)
        event.wait(10)
        seen.append(torch.get_default_dtype())

    torch.set_default_dtype(torch.float64)
    try:
        first = threading.Thread(target=waits, args=(leave,))
        at_once = threading.Event()
        at_once.set()
        second = threading.Thread(target=waits, args=(at_once,))
        first.start(), second.start()
        second.join(10)
        assert torch.get_default_dtype() == torch.float32  # the first still works
        leave.set()
        first.join(10)
        assert torch.get_default_dtype() == torch.float64
        assert seen == [torch.float32, torch.float32]
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_public_function_that_works_is_guarded_and_looks_as_before():
    assert "convert" in WORKING and len(WORKING) > 20
    for name in WORKING:
        function = getattr(mxdsurgery, name)
        assert function.__globals__ is guard.__dict__, f"{name} is not guarded"
        assert function.__doc__ and function.__name__ == name
        assert "args" not in inspect.signature(function).parameters, name


def test_convert_in_a_notebook_without_gradients(tmp_path):
    numbers = random_states()
    with STATES["set_grad_enabled"]():
        made = mxdsurgery.convert("demo-glu", **TINY_RUN, layers="1", out=str(tmp_path / "made"), device="cpu")
        assert not torch.is_grad_enabled()
    assert made.evaluation["layers"] and random_states() == numbers


def test_heal_in_a_notebook_that_set_all_kinds_of_things(tmp_path, converted):
    with contextlib.ExitStack() as opened:
        for name in ("inference_mode", "float16", "default meta", "medium", "autocast"):
            opened.enter_context(STATES[name]())
        before = state()
        healed = mxdsurgery.heal(converted.out, out=tmp_path / "healed", tokens=2_000, batch=512)
        assert state() == before != PLAIN
    assert healed["kl_after"] <= healed["kl_before"]


def test_load_too_and_what_is_done_with_the_model_is_the_caller_s_business(converted):
    with torch.inference_mode():
        model = mxdsurgery.load(converted.out).model
        assert not any(weight.is_inference() for weight in model.parameters())
        assert model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.is_inference()


def test_convert_in_a_thread_that_is_not_the_main_one(tmp_path):
    made = []
    thread = threading.Thread(
        target=lambda: made.append(
            mxdsurgery.convert("demo-glu", **TINY_RUN, layers="1", out=str(tmp_path / "made"), device="cpu")
        )
    )
    with torch.no_grad():  # of this thread alone
        thread.start()
        thread.join(120)
    assert made and (tmp_path / "made" / "config.json").is_file()
