"""``plan --hours``: what is proposed takes the time that there is, on a machine whose rates are given."""

import json

import pytest
from click.testing import CliRunner

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.errors import RecipeError
from mxdsurgery.planning.calibrate import Calibration
from mxdsurgery.training.cost import tokens_per_step


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A step takes a hundredth of a second and 20 microseconds a token for the layer, and as long again for the base model."""

    def calibrate(layers, base, config, recipe, machine, share=1.0):
        seconds = 0.01 + 2e-5 * tokens_per_step(recipe)
        return Calibration(
            seconds, 10**6, 1, seconds, 10**6, "forward pass", [[recipe.k, seconds]], 0.001, 0.001, 5.0, 1e9, 1e10
        )

    monkeypatch.setattr("mxdsurgery.planning.plan.calibrate", calibrate)


def planned(proposal, **given):
    made, recipe = mxdsurgery.plan("demo-glu", measure=True, **proposal.keys | given)
    assert recipe == proposal.recipe
    return made.total_seconds / 3600 / proposal.hours


@pytest.mark.parametrize("hours", [0.5, 3, 40])
def test_what_is_proposed_fits_the_time_and_uses_it(hours):
    proposal = mxdsurgery.propose("demo-glu", hours=hours)
    assert 0.75 < planned(proposal) <= 0.95
    assert set(proposal.keys) <= {"tokens", "eval_tokens", "n_experts"}
    assert proposal.keys["tokens"] * 32 >= 200 * proposal.plan.layers[0].n_experts


def test_where_time_is_short_figures_rest_on_less_text_and_there_are_fewer_experts():
    long, short = (mxdsurgery.propose("demo-glu", hours=hours, k=1) for hours in (40, 0.02))
    assert set(long.keys) == {"tokens"}
    assert 8_000 <= short.keys["eval_tokens"] < long.recipe.eval_tokens
    assert short.keys["n_experts"] < long.plan.layers[0].n_experts  # as few would have fired often enough to learn
    given = {"eval_tokens": 30_000, "n_experts": 4_000, "layers": "1"}
    kept = mxdsurgery.propose("demo-glu", hours=1, **given)
    assert set(kept.keys) == {"tokens"} and (kept.recipe.eval_tokens, kept.recipe.n_experts) == (30_000, 4_000)
    assert 0.75 < planned(kept, **given) <= 0.95


def test_what_cannot_be_proposed_is_refused():
    with pytest.raises(RecipeError, match="tokens are 5000, and hours are 1"):
        mxdsurgery.propose("demo-glu", hours=1, tokens=5000)
    with pytest.raises(RecipeError, match="hours is -1"):
        mxdsurgery.propose("demo-glu", hours=-1)
    with pytest.raises(RecipeError, match="time for at least 32.8k tokens") as error:
        mxdsurgery.propose("demo-glu", hours=0.001)
    assert "raise --hours" in error.value.fix
    refused = mxdsurgery.propose("demo-glu", hours=1, memory=0.001)
    assert refused.plan.refusal is not None


def test_the_command_that_is_proposed_makes_that_plan(tmp_path):
    flags = ["--layers", "0,2", "--no-unit-norm", "--out", str(tmp_path / "my layers")]
    done = CliRunner().invoke(main, ["plan", "demo-glu", "--hours", "2", "--json", *flags])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    words = found["proposal"]["command"]
    assert words.startswith("mxdsurgery convert demo-glu --layers 0,2 --no-unit-norm ") and "/my layers'" in words
    tokens = words.rpartition("--tokens ")[2].split()[0]
    again, recipe = mxdsurgery.plan("demo-glu", tokens=tokens, layers="0,2")
    assert (recipe.tokens, again.steps) == (found["recipe"]["tokens"], found["steps"])
    shown = CliRunner().invoke(main, ["plan", "demo-glu", "--hours", "2", *flags])
    assert words in shown.output.replace("\n", " ") and ", of the 2.0 h that there are:" in shown.output
    refused = CliRunner().invoke(main, ["plan", "demo-glu", "--hours", "0"])
    assert refused.exit_code == 2 and "hours" in refused.output
