"""Folders of base models as people have them: what is in the files counts, and what is missing is said."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import IDS, tiny_model
from transformers import AutoModelForCausalLM

import mxdsurgery
from mxdsurgery.base.model import load_tokenizer, open_model
from mxdsurgery.base.terms import is_terms
from mxdsurgery.checkpoint.card import model_card
from mxdsurgery.errors import BaseModelError, ModelNotFoundError, MxDWarning, WeightsError
from mxdsurgery.sharing.contents import pack

FEW = {"data": "stdlib", "device": "cpu", "layers": "0", "tokens": 1024, "eval_tokens": 256, "batch": 256, "context": 16}
FEW |= {"n_experts": 16, "k": 4, "shuffle": 0}
FIND = importlib.util.find_spec
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tied"
    tiny_model("llama", vocabulary=4096, tie_word_embeddings=True).save_pretrained(folder)
    load_tokenizer("demo-glu").save_pretrained(folder)
    return folder


@pytest.fixture
def base(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "base")


def with_weights(folder, change, **config):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_a_head_of_its_own_under_a_config_that_ties_it_is_kept(base, tmp_path, form):
    with_weights(base, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] * 0.5 + 0.01})
    out = tmp_path / "out"
    mxdsurgery.convert(str(base), out=str(out), format=form, **FEW)
    if form == "adapter":
        mxdsurgery.apply(out, out=tmp_path / "whole")
        out = tmp_path / "whole"
    plain = AutoModelForCausalLM.from_pretrained(base)
    there = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(there.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(there.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert there.config.tie_word_embeddings is False


def test_a_head_of_its_own_is_in_the_plan_before_weights_are_read(base):
    tied, _ = mxdsurgery.plan(str(base), **FEW)
    with_weights(base, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})  # the same twice
    assert mxdsurgery.plan(str(base), **FEW)[0].original_parameters == tied.original_parameters
    with_weights(base, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] * 0.5 + 0.01})
    own, _ = mxdsurgery.plan(str(base), **FEW)
    head = load_file(base / "model.safetensors")["lm_head.weight"].numel()
    assert own.original_parameters == tied.original_parameters + head == open_model(str(base)).load().num_parameters()
    assert own.groups[0].base_bytes == tied.groups[0].base_bytes + 4 * head
    assert mxdsurgery.analyze(str(base)).parameters == own.original_parameters
    (base / "model.safetensors").write_bytes(b"damaged")  # said where weights are needed
    assert mxdsurgery.analyze(str(base)).parameters == tied.original_parameters


def test_a_head_that_is_the_embeddings_stays_tied(base):
    with_weights(base, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert open_model(str(base)).load().config.tie_word_embeddings is True


def test_a_layer_that_transformers_does_not_build_is_said_and_no_longer_counted(base):
    more = {"model.layers.2.eh_proj.weight": torch.zeros(4, 4), "model.layers.2.mlp.up_proj.weight": torch.zeros(4, 4)}
    with_weights(base, lambda w: w | more, num_nextn_predict_layers=1)
    with pytest.warns(MxDWarning, match="2 weights of .* are left out.*num_nextn_predict_layers is 0"):
        model = open_model(str(base)).load()
    assert model.config.num_nextn_predict_layers == 0


def test_an_attention_that_is_not_installed_gives_way_to_torchs(base):
    with_weights(base, lambda w: w, attn_implementation="flash_attention_2")
    with pytest.warns(MxDWarning, match="prefers the attention 'flash_attention_2'.*'sdpa' now"):
        opened = open_model(str(base))
    assert opened.load()(IDS).logits.isfinite().all()


def test_a_base_that_was_moved_is_asked_for_and_taken_from_where_it_is_now(base, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved to"
    mxdsurgery.convert(str(base), out=str(out), **FEW)
    there = json.loads((out / "evaluation.json").read_text())
    base.rename(moved)
    with pytest.raises(BaseModelError, match="is needed to compare with: no folder(.|\n)*say where it is now with base="):
        mxdsurgery.evaluate(out)
    assert mxdsurgery.evaluate(out, base=str(moved))["all"] == there["all"]


def test_terms_travel_with_the_model_its_adapter_and_a_push(base, tmp_path):
    names = {"LICENSE", "Notice.txt", "USE_POLICY.md", "LICENSE-2.0"}
    for name in names:
        (base / name).write_text("terms\n")
    mxdsurgery.convert(str(base), out=str(tmp_path / "out"), **FEW)
    mxdsurgery.make_adapter(tmp_path / "out", out=tmp_path / "adapter")
    mxdsurgery.apply(tmp_path / "adapter", out=tmp_path / "again")
    for folder in ("out", "adapter", "again"):
        assert names <= {path.name for path in (tmp_path / folder).iterdir()}
    assert names <= pack(tmp_path / "out").contents.keys()


@pytest.mark.parametrize("name", ["licenses.py", "license.safetensors", "sub/LICENSE", "README.md", "unlicensed.txt"])
def test_what_is_no_licence_does_not_travel_as_one(name):
    assert not is_terms(name)


def test_a_link_that_leaves_the_folder_is_refused_with_the_way_out(base, tmp_path):
    (base / "model.safetensors").rename(tmp_path / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(ModelNotFoundError, match="is a link that leaves the folder(.|\n)*cp -RL .*/base NEW"):
        open_model(str(base))
    (base / "model.safetensors").unlink()
    os.link(tmp_path / "weights", base / "model.safetensors")  # as it says
    assert open_model(str(base)).load().num_parameters() > 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(base, name):
    (base / name).write_text(POINTER)
    with pytest.raises((ModelNotFoundError, WeightsError), match=f"{name} is a pointer of git-lfs(.|\n)*git lfs pull"):
        open_model(str(base)).load()


def test_weights_that_are_not_all_there_are_named(base):
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="model.safetensors is damaged or only a part of the file(.|\n)*fetch it again"):
        open_model(str(base)).load()
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(WeightsError, match="2 of its 3 files of weights are not there: model-2.safetensors, model-3"):
        open_model(str(base)).load()


def test_weights_of_another_shape_than_the_config_says_are_named(base):
    with_weights(base, lambda w: w, vocab_size=5000)
    with pytest.raises(WeightsError, match=r"model.embed_tokens.weight has shape \[4096, 32\].*\[5000, 32\]"):
        open_model(str(base)).load()


def test_a_folder_of_models_names_them(base, tmp_path):
    with pytest.raises(ModelNotFoundError, match="name one of the models in it: .*/base"):
        open_model(str(tmp_path))


def test_a_tokenizer_that_is_missing_or_needs_a_package_is_said(base, monkeypatch):
    (base / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no tokenizer"):
        load_tokenizer(str(base))
    (base / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # wherever it is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "sentencepiece" else FIND(name))
    with pytest.raises(ModelNotFoundError, match="needs a package that is not installed here(.|\n)*pip install sentencepiece"):
        load_tokenizer(str(base))


@pytest.mark.parametrize("name", ["My: model #1 [v1.5]", "模型 ü", "- yes"])
def test_a_local_base_is_no_hub_id_on_the_card_whatever_its_name(tied, tmp_path, monkeypatch, name):
    (tmp_path / "models").mkdir()
    shutil.copytree(tied, tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    mxdsurgery.convert(f"models/{name}", out="adapter", format="adapter", **FEW)
    header = yaml.safe_load((tmp_path / "adapter/README.md").read_text().split("---\n")[1])
    assert header["pipeline_tag"] == "text-generation" and "base_model" not in header
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert mxdsurgery.apply(tmp_path / "adapter", out="out")["differs"] == []
    (tmp_path / "models" / name).rename(tmp_path / "moved")
    with pytest.raises(BaseModelError, match="say where it is now with base="):
        mxdsurgery.apply(tmp_path / "adapter", out="again")


def test_a_hub_base_is_named_on_the_card(converted):
    plan = dataclasses.replace(converted.plan, model="org/a model: [1]", revision="0" * 40)
    card = model_card(plan, converted.recipe, converted.evaluation)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/a model: [1]"


def test_peft_takes_a_familys_default_targets(converted):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(converted.out, trust_remote_code=True)
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert made.peft_config["default"].target_modules == {"q_proj", "v_proj"}
