"""Recipes are strict, report what is wrong and survive a round trip through a file; each shipped one plans a real model."""

import dataclasses
import json

import pytest
from real_configs import REAL_CONFIGS
from transformers import GPT2Config

import mxdsurgery
from mxdsurgery.errors import RecipeError
from mxdsurgery.keys import parse_count
from mxdsurgery.recipe import RECIPES_FOLDER, Recipe, find_recipe, load_recipe

RECIPES = sorted(RECIPES_FOLDER.glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refused(path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def plan_real_model(tmp_path, recipe):
    model = load_recipe(recipe).get("model")
    config = REAL_CONFIGS.get(model) or GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100)
    config.save_pretrained(tmp_path)
    return mxdsurgery.plan("demo-glu" if recipe.stem == "demo" else str(tmp_path), recipe=recipe)


@pytest.mark.parametrize(
    ("line", "key", "value", "allowed"),
    [
        ("speed: 3", "'speed'", "recipe.yaml", "n_experts"),
        ("n_expert: 64", "'n_expert'", "recipe.yaml", "n_experts"),
        ("1: 64", "1", "recipe.yaml", "n_experts"),
        ("k: many", "'k'", "'many'", "a whole number (k, M and B suffixes allowed) of at least 1"),
        ("k: 1.5", "'k'", "1.5", "a whole number"),
        ("k: true", "'k'", "True", "a whole number"),
        ("k: [1, 2]", "'k'", "[1, 2]", "a whole number"),
        ("k: 0", "'k'", "0", "at least 1"),
        ("k: null", "'k'", "has no value", "at least 1"),
        ("lr: fast", "'lr'", "'fast'", "a number from 1e-08 to 1"),
        ("lr: 5", "'lr'", "5", "a number from 1e-08 to 1"),
        ("lr: .nan", "'lr'", "nan", "a number from 1e-08 to 1"),
        ("expansion: .inf", "'expansion'", "inf", "a number of at least 0.01"),
        (f"lr: 1{'0' * 400}", "'lr'", "1000", "a number from 1e-08 to 1"),
        ("warmup: -0.1", "'warmup'", "-0.1", "a number from 0 to 1"),
        ("tokens: 1e400", "'tokens'", "'1e400'", "a whole number"),
        (f"tokens: {'9' * 400}", "'tokens'", "999", "a whole number"),
        ("unit_norm: 1", "'unit_norm'", "1", "true or false"),
        ("init: foo", "'init'", "'foo'", "one of shared, encoder, random, pretrained"),
        ("moments: int8", "'moments'", "'int8'", "one of float32, bfloat16"),
        ("device: tpu", "'device'", "'tpu'", "one of auto, cpu, cuda, mps, xpu"),
        ("layers: [1, [2]]", "'layers'", "[1, [2]]", "a range (2-5)"),
        ("tracker: no", "'tracker'", "False", "in a file, put it in quotes"),
        ("revision: 1.5", "'revision'", "1.5", "in a file, put it in quotes"),
        ("unit_norm: maybe", "'unit_norm'", "'maybe'", "true or false"),
        ("data: ''", "'data'", "''", "text, or nothing (null)"),
        ("seed: -1", "'seed'", "-1", "from 0 to"),
    ],
)
def test_a_wrong_line_is_refused_naming_the_key_the_value_and_what_is_allowed(tmp_path, line, key, value, allowed):
    message = refused(write(tmp_path, line))
    assert key in message and value in message
    assert allowed in message.split("expected: ")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k: 3\nlr: 0.1\nk: 4\n", "the key 'k' stands twice"),
        ("match:\n  d_model: 3\n  d_model: 4\n", "the key 'd_model' stands twice"),
        ("- k\n- lr\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("k: [1\nlr: 2\n", "not valid YAML"),
        ("k: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("\tk: 3\n", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_of_distinct_keys_is_refused_naming_the_file(tmp_path, text, said):
    path = write(tmp_path, text)
    message = refused(path)
    assert said in message and str(path) in message


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00k: 3")
    assert f"{path} cannot be read" in refused(path)


@pytest.mark.parametrize("name", ["nowhere", "folder/gpt2.yaml", "gpt3.yaml"])
def test_a_missing_file_is_refused_and_the_shipped_names_are_listed(name):
    message = refused(name)
    assert repr(name) in message
    assert all(recipe.stem in message for recipe in RECIPES)


def test_shipped_recipes_are_found_by_name_with_or_without_suffix():
    assert load_recipe("gpt2") == load_recipe("gpt2.yaml") == load_recipe(RECIPES_FOLDER / "gpt2.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"k": 33, "n_experts": 32}, "'k' is 33, more than n_experts = 32"),
        ({"warmup": 0.6, "decay": 0.5}, "'warmup' and 'decay' are 0.6 and 0.5, together more than 1"),
        ({"batch": 64, "context": 128}, "'batch' is 64 tokens, less than one context of 128"),
        ({"offload": "disk"}, "'offload' and 'inputs' are 'disk' and 'original'"),
        ({"cache_activations": "x", "inputs": "converted"}, "'cache_activations' and 'inputs' are 'x' and 'converted'"),
        ({"cache_activations": "x", "inputs": "joint"}, "'cache_activations' and 'inputs' are 'x' and 'joint'"),
        ({"auxk": 0.1, "inputs": "joint"}, "'auxk' and 'inputs' are 0.1 and 'joint'"),
        ({"activation_buffer": 8191, "batch": 4096}, "'activation_buffer' is 8191, less than two batches of 4096"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, said):
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    assert said in str(caught.value) and "expected: " in str(caught.value)


def test_values_at_the_edge_are_accepted():
    assert Recipe(k=32, n_experts=32).k == 32
    assert Recipe(warmup=0.5, decay=0.5).decay == 0.5
    assert Recipe(batch=128, context=128).batch == 128
    assert Recipe(activation_buffer=8192, batch=4096).activation_buffer == 8192


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("100k", 100_000),
        ("2M", 2_000_000),
        ("2 m", 2_000_000),
        ("1.5B", 1_500_000_000),
        ("2_000", 2000),
        (7, 7),
        (2.0, 2),
        ("4.1M", 4_100_000),  # 4.1 * 10**6 is no whole number in floats
        ("1.001k", 1001),
        ("9007199254740993", 9007199254740993),  # beyond what floats hold
        ("1.0005k", None),
        ("-3", None),
        ("k", None),
        ("1e3", 1000),
        ("1e-3", None),
        ("0x10", None),
        ("", None),
        (True, None),
        (None, None),
    ],
)
def test_counts_are_read_exactly_with_their_suffixes(value, count):
    assert parse_count(value) == count


def test_numbers_that_yaml_takes_for_strings_are_numbers(tmp_path):
    values = load_recipe(write(tmp_path, "lr: 1e-3\ntokens: 1.5M\nlayers: 3\neval_tokens: 2_000\nn_experts: null\n"))
    assert values == {"lr": 1e-3, "tokens": 1_500_000, "layers": "3", "eval_tokens": 2000, "n_experts": None}


def test_an_empty_file_sets_nothing(tmp_path):
    assert load_recipe(write(tmp_path, "# nothing\n")) == {}


def test_a_recipe_comes_back_from_its_file_unchanged(tmp_path):
    other = Recipe(
        model="org/naïve: model",
        layers="-1",
        init="random",
        k=3,
        n_experts=1000,
        expansion=0.1,
        unit_norm=True,
        prepend_bos=False,
        lr=1e-8,
        warmup=1 / 3,
        seed=2**32 - 1,
        data="a #text.txt",
        out="null",
    )
    for recipe in (Recipe(), other):
        path = tmp_path / "saved.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe(**load_recipe(path)) == recipe
    changed = {f.name for f in dataclasses.fields(Recipe) if getattr(other, f.name) != getattr(Recipe(), f.name)}
    assert len(changed) == 13  # the comparison above saw what was set


@pytest.mark.parametrize(
    ("model", "model_type", "d_model", "n_layers", "name"),
    [
        ("any/name", "gpt2", 768, 12, "gpt2_all"),
        ("any/name", "llama", 3072, 28, "Llama-3.2-3B_all"),
        ("any/name", "gpt_neox", 1024, 24, "pythia-410m_all"),
        ("any/name", "gpt_neox", 2048, 24, "pythia-1.4b_all"),
        ("any/name", "qwen3", 512, 4, "small"),
        ("any/name", "gpt2", 128, 12, "small"),
        ("any/name", "llama", 127, 12, "tiny"),
        ("any/name", "gpt2", 1024, 24, "default"),
        ("any/name", "qwen3", 4096, 36, "default"),
        ("demo-glu", "llama", 192, 4, "demo"),
    ],
)
def test_the_recipe_meant_for_a_model_is_found(model, model_type, d_model, n_layers, name):
    assert find_recipe(model, model_type, d_model, n_layers) == RECIPES_FOLDER / f"{name}.yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_plans_the_model_it_names_at_its_real_size(tmp_path, recipe):
    plan, resolved = plan_real_model(tmp_path, recipe)
    given = load_recipe(recipe)
    assert {name: getattr(resolved, name) for name in given if name != "model"} == {n: given[n] for n in given if n != "model"}
    assert given.get("model") in {None, *REAL_CONFIGS}
    n_layers = len(mxdsurgery.analyze(plan.model).layers)
    assert len(plan.layers) == (n_layers if given["layers"] == "all" else 1)
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_every_shipped_model_has_a_recipe_for_all_layers_that_is_found_for_it():
    for model, config in REAL_CONFIGS.items():
        found = find_recipe(model, config.model_type, config.hidden_size, config.num_hidden_layers)
        assert load_recipe(found) | {"layers": "all"} == load_recipe(found)
        assert load_recipe(found)["model"] == model


@pytest.mark.parametrize(("name", "papers"), [("gpt2", 21490), ("Llama-3.2-3B", 86000)])
def test_the_papers_recipes_match_a_transcoder_of_32_d_features_and_come_to_the_papers_n(tmp_path, name, papers):
    plan, resolved = plan_real_model(tmp_path, RECIPES_FOLDER / f"{name}.yaml")
    (layer,) = plan.layers
    d = layer.block.d_model
    transcoder = 32 * d * (2 * d + 1) + d
    # One expert more would be too many. The paper counts encoder biases where Llama has none: 2 H of them.
    assert 0 <= transcoder - layer.parameters < 2 * d + 1 + (0 if layer.block.encoder_bias else 2 * layer.block.d_hidden)
    # The paper's N is 1/(2D + 2) lower: it counts 2D + 2 parameters per expert, this layer has 2D + 1.
    assert 0 <= layer.n_experts - papers < 100
    assert layer.k == resolved.k == 32


def test_overrides_win_over_the_file_and_the_files_held_out_text_goes_with_its_training_text():
    plan, resolved = mxdsurgery.plan("demo-glu", recipe="demo", k=5, tokens=None, data="other.txt")
    assert (resolved.k, resolved.tokens, resolved.data, resolved.eval_data) == (5, 300_000, "other.txt", None)
    assert {layer.k for layer in plan.layers} == {5}


@pytest.mark.parametrize(
    ("tokens", "context", "batch"),
    [
        (1, 128, 256),
        (40_000, 128, 256),
        (2 * 10**6, 128, 256),
        (4 * 10**6, 128, 512),
        (20 * 10**6, 128, 1024),
        (10**9, 128, 4096),
        (1, 8192, 8192),
    ],
)
def test_a_batch_grows_by_default_with_the_root_of_the_tokens(tokens, context, batch):
    assert Recipe(tokens=tokens, context=context).batch == batch
    assert Recipe(tokens=tokens, context=context, batch=9_000).batch == 9_000
    assert Recipe(**Recipe(tokens=tokens, context=context).to_dict()).batch == batch


def test_an_unknown_keyword_is_refused():
    with pytest.raises(RecipeError, match="unknown recipe key 'token' among the options"):
        mxdsurgery.plan("demo-glu", token=3)


def test_a_dtype_that_cannot_be_written_is_refused(tmp_path):
    GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, dtype="float64").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is float64") as caught:
        mxdsurgery.plan(str(tmp_path))
    assert "one of float32, bfloat16, float16" in str(caught.value)
    assert mxdsurgery.plan(str(tmp_path), dtype="float32")[0].dtype == "float32"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("layers: [0, 2]", "layers", "0,2"),
        ("layers: [0, '4-5', -1]", "layers", "0,4-5,-1"),
        ("layers: 3", "layers", "3"),
        ("k: '16'", "k", 16),
        ("tokens: '2M'", "tokens", 2_000_000),
        ("tokens: 1e6", "tokens", 1_000_000),
        ("tokens: 1_000", "tokens", 1000),
        ("k: 010", "k", 10),  # octal in YAML 1.1
        ("lr: '1e-3'", "lr", 1e-3),
        ("lr: 1e-3", "lr", 1e-3),  # text in YAML 1.1
        ("overwrite: 'true'", "overwrite", True),
        ("overwrite: 'No'", "overwrite", False),
        ("unit_norm: on", "unit_norm", True),
        ("layers: 2:5", "layers", "2:5"),  # not 125; `select_layers` refuses it
    ],
)
def test_a_value_is_what_it_looks_like(tmp_path, line, key, value):
    assert load_recipe(write(tmp_path, line)) == {key: value}
    assert type(load_recipe(write(tmp_path, line))[key]) is type(value)


def test_python_takes_a_list_of_layers():
    assert (
        Recipe(layers=[0, 2]).layers == Recipe(layers=(0, "2")).layers == "0,2" and Recipe(layers=range(3)).layers == "0,1,2"
    )


def test_no_code_is_trusted_by_a_word(tmp_path):
    for word in ("'yes'", "'true'", "on"):
        with pytest.raises(RecipeError, match="no file decides that code is run"):
            load_recipe(write(tmp_path, f"trust_remote_code: {word}"))
    assert load_recipe(write(tmp_path, "trust_remote_code: 'false'")) == {"trust_remote_code": False}
