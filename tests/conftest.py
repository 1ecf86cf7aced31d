"""Fixtures: the material beside the project, processes, and a converted model."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import pytest
from filelock import FileLock
from forked import ForkingInterpreter
from running import interrupt_layer_2, shared_folder


@pytest.fixture
def shared() -> Path:
    path = shared_folder()
    if path is None:
        pytest.skip("no ../shared beside the project, and MXD_SHARED points nowhere: its models and texts are needed")
    return path


@pytest.fixture(scope="session", autouse=True)
def float32_is_fast():
    """The same machine everywhere, and the fastest for most: what a model computes in is float32, whatever it is stored in.

    tests/hardware/test_compute.py has other machines, and measures this one.
    """
    from mxdsurgery.hardware import compute

    with pytest.MonkeyPatch.context() as patch:
        for name in ("layer_seconds", "product_seconds"):
            patch.setattr(compute, name, lambda _device, dtypes, *_shape: {d: 1.0 if d == "float32" else 4.0 for d in dtypes})
        yield


@pytest.fixture(scope="session", autouse=True)
def little_validation():
    """The text that the best weights are chosen on is looked at many times: an eighth of it is enough to test with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxdsurgery.text.sources.VALIDATION_TOKENS", 1_024)
        yield


@pytest.fixture(scope="session")
def forking():
    """Runs code in fresh processes without mxdsurgery that need not import transformers first."""
    interpreter = ForkingInterpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session", autouse=True)
def forked_reloads(forking):
    """`check_reload` does so in forks of one interpreter; yields its own way, an interpreter each time."""
    from mxdsurgery.checkpoint import export

    whole = export._run_reload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_run_reload", lambda *given: forking.run(export._RELOAD, *given))
        yield whole


@pytest.fixture
def whole_reloads(forked_reloads, monkeypatch):
    """Checkpoints are reloaded as they are for users: each command has a test that wants this."""
    monkeypatch.setattr("mxdsurgery.checkpoint.export._run_reload", forked_reloads)


@pytest.fixture
def interrupted_in_layer_2(monkeypatch):
    interrupt_layer_2(monkeypatch)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """demo-glu with two layers converted in a few steps; tests read the folder and never change it.

    One of the processes that share the tests makes it, for all of them.
    """
    import mxdsurgery
    from mxdsurgery.conversion.convert import Conversion
    from mxdsurgery.planning.plan import read_plan
    from mxdsurgery.recipe import Recipe, load_recipe

    here = tmp_path_factory.getbasetemp()
    place = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    out = place / "converted" / "demo"
    with FileLock(place / "converted.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxdsurgery.text.sources.VALIDATION_TOKENS", 8_192)  # whichever test needs it first
        if not out.is_dir():
            mxdsurgery.convert(
                "demo-glu", layers="1-2", tokens=40_000, eval_tokens=4_000, n_experts=256, k=8, shuffle=100_000, out=str(out),
                device="cpu", init="encoder", specialise=0.003, batch=2048, lr=2e-3,
            )  # fmt: skip
    evaluation = json.loads((out / "evaluation.json").read_text())
    recipe = Recipe(**load_recipe(out / "recipe.yaml"))
    return Conversion(out, read_plan(out / "plan.json"), recipe, evaluation, evaluation["training"]["seconds"])
