"""Base models with code of their own: converted and used where it runs, refused by name where it does not."""

import pytest
import torch
from own_code import own_code_folder

import mxdsurgery
from mxdsurgery.base.decoder import layer_count, width
from mxdsurgery.base.model import open_model
from mxdsurgery.base.running import hidden_states, logits_of, predict
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.errors import BaseModelError, MxDError, NotConvertedError, UnknownFamilyError, UnsupportedModelError
from mxdsurgery.sharing.contents import pack

FEW = {"data": "stdlib", "device": "cpu", "layers": "0", "tokens": 1024, "eval_tokens": 256, "batch": 256, "context": 16}
FEW |= {"n_experts": 16, "k": 4, "shuffle": 0, "trust_remote_code": True}
IDS = torch.arange(24).view(2, 12)

# Variations that plain transformers runs, too.
RUNS = {
    "its config names no number of layers": {"names": ""},
    "its forward takes no use_cache": {"takes": "input_ids"},
    "its forward names its argument otherwise": {"takes": "idx"},
    "its forward returns a tuple": {"returns": "(logits,)"},
    "its forward returns a tensor": {"returns": "logits"},
    "its base model returns a tensor": {"body_returns": "x"},
    "its base model returns a tuple of two": {"body_returns": "(x, None)"},
    "it has no base model and cannot generate": {"flat": True, "takes": "input_ids"},
}


@pytest.mark.parametrize("what", RUNS)
def test_a_model_runs_as_its_code_wants_to_be_called(tmp_path, what):
    model = open_model(own_code_folder(tmp_path / "toy", **RUNS[what]), trust_remote_code=True).load()
    logits, hidden = logits_of(model, IDS), hidden_states(model, IDS)
    assert logits.shape == (2, 12, 4096) and hidden.shape == (2, 12, 16)
    torch.testing.assert_close(predict(model, hidden.flatten(0, 1)), logits.flatten(0, 1))
    assert (layer_count(model), width(model)) == (2, 16)


def test_two_models_with_the_same_code_of_the_config_are_each_run_by_their_own(tmp_path):
    one = own_code_folder(tmp_path / "one" / "toy")
    other = own_code_folder(tmp_path / "other" / "toy", returns="CausalLMOutput(logits=-logits)")
    opened = [open_model(name, trust_remote_code=True) for name in (one, other)]
    assert type(opened[0].config) is type(opened[1].config)
    for _ in range(2):
        logits = [logits_of(each.load(), IDS) for each in opened]
        torch.testing.assert_close(logits[1], -logits[0])
    assert type(opened[0].skeleton) is not type(opened[1].skeleton)


@pytest.mark.parametrize("what", ["its config names no number of layers", "it has no base model and cannot generate"])
def test_such_a_model_is_converted_reloaded_and_used_once_its_code_is_trusted(tmp_path, what):
    out = tmp_path / "out"
    mxdsurgery.convert(own_code_folder(tmp_path / "toy", **RUNS[what]), out=str(out), **FEW)
    uses = [
        lambda **how: mxdsurgery.evaluate(out, **how),
        lambda **how: mxdsurgery.edit(
            out, edits=mxdsurgery.edits_from_flags(None, ablate=("0:3",)), out=tmp_path / "edited", **how
        ),
        lambda **how: mxdsurgery.experts(out, tokens=2_000, **how),
        lambda **how: mxdsurgery.report(out, **how),
    ]
    for use in uses:
        with pytest.raises((NotConvertedError, BaseModelError), match="give trust_remote_code=True"):
            use()
        use(trust_remote_code=True)
    assert {"modeling_toy.py", "configuration_toy.py"} <= pack(out).contents.keys()
    with pytest.raises(UnsupportedModelError, match="generate"):  # transformers, too, cannot
        mxdsurgery.generate(out, prompt="def", trust_remote_code=True)


def test_such_a_model_is_compared_and_healed(tmp_path):
    base = own_code_folder(tmp_path / "toy")
    few = {name: value for name, value in FEW.items() if name not in ("layers", "k")}
    made = mxdsurgery.frontier(base, layer=0, k=(4,), kinds=("mxd",), out=str(tmp_path / "frontier"), **few)
    assert [(row["kind"], row["k"]) for row in made.rows] == [("mxd", 4)] and made.recipe.k == 4
    mxdsurgery.convert(base, out=str(tmp_path / "out"), **FEW)
    result = mxdsurgery.heal(tmp_path / "out", out=tmp_path / "healed", tokens=256, trust_remote_code=True)
    assert result["kl_after"] <= result["kl_before"]
    assert {"modeling_toy.py", "configuration_toy.py"} <= {path.name for path in (tmp_path / "healed").iterdir()}
    assert load(tmp_path / "healed", trust_remote_code=True).layers.keys() == {0}


def test_an_adapter_of_such_a_model_is_rebuilt_with_its_bases_code(tmp_path):
    base = own_code_folder(tmp_path / "toy")
    mxdsurgery.convert(base, out=str(tmp_path / "adapter"), format="adapter", **FEW)
    with pytest.raises(MxDError, match="give trust_remote_code=True"):
        mxdsurgery.apply(tmp_path / "adapter", out=tmp_path / "no")
    mxdsurgery.apply(tmp_path / "adapter", out=tmp_path / "out", trust_remote_code=True)
    whole = load(tmp_path / "out", trust_remote_code=True)
    there = load(tmp_path / "adapter", base=base, trust_remote_code=True)
    torch.testing.assert_close(logits_of(whole.model, IDS), logits_of(there.model, IDS))
    assert not (tmp_path / "no").exists()


REFUSED = {
    "it returns the last position only": ({"returns": "CausalLMOutput(logits=logits[:, -1:])"}, "(2, 1, 4096)"),
    "it needs another argument": ({"takes": "input_ids, mask"}, "missing 1 required positional argument: 'mask'"),
    "it returns nothing": ({"returns": "None"}, "returns no tensor"),
    "it raises": ({"returns": "1 / 0"}, "ZeroDivisionError: division by zero (modeling_toy.py, line"),
    "its logits are scaled in its head": (
        {"flat": True, "returns": "CausalLMOutput(logits=logits * 9)"},
        "not what it computes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_run_is_refused_by_name_and_nothing_is_left(tmp_path, what):
    variation, words = REFUSED[what]
    base = own_code_folder(tmp_path / "toy", **variation)
    with pytest.raises(UnsupportedModelError) as caught:
        mxdsurgery.convert(base, out=str(tmp_path / "out"), **FEW)
    assert words in str(caught.value) and repr(base) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


BROKEN = {
    "a name is gone": ({"first": "from transformers.utils import no_such_name"}, "ImportError: cannot import", "line 5"),
    "a list of ties": ({"tied": '_tied_weights_keys = ["lm_head.weight"]'}, "AttributeError: 'list'", "mend that line"),
    "a package": ({"first": "import no_such_package"}, "not installed here: no_such_package", "pip install no_such_package"),
    "a folder": ({"first": "from .parts.mlp import MLP"}, "imports '.parts.mlp'", "follows no import into a folder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_code_that_does_not_load_is_said(tmp_path, what):
    variation, *words = BROKEN[what]
    with pytest.raises(UnknownFamilyError) as caught:
        mxdsurgery.analyze(own_code_folder(tmp_path / "toy", **variation), trust_remote_code=True)
    assert all(word in str(caught.value) for word in words), str(caught.value)
