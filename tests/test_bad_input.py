"""A user's mistake ends with exit code 2, a named error that says what was found and what to do, and nothing written."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.utils._http import default_client_factory
from tiny import tiny_config
from transformers import BertConfig, T5Config, ViTConfig

from mxdsurgery.cli import main
from mxdsurgery.demo import DEMO_MODELS

# A conversion of seconds, should one of these mistakes not be noticed.
QUICK = ("--tokens=2048", "--eval-tokens=1024", "--n-experts=16", "--k=4", "--layers=0", "--device=cpu", "--batch=1024")


def everything_in(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a command that must fail as a user's mistake does; returns what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    # What HF_HUB_OFFLINE=1 sets where it is there before the libraries are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def run(error, *arguments):
        before = everything_in(tmp_path)
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        message = result.stderr[result.stderr.index(f"{error}: ") :]
        assert everything_in(tmp_path) == before
        return message

    return run


@pytest.fixture
def refused_conversion(refused, tmp_path):
    """The same of ``convert demo-glu`` on a good text, other arguments added."""
    text = tmp_path / "good.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 600)

    def run(error, *arguments, model="demo-glu", out="folder/out"):
        return refused(error, "convert", model, *QUICK, "--data", text, "--out", out, *arguments)

    return run


def model_folder(path, config):
    path.mkdir()
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


# The base model


@pytest.mark.parametrize("command", ["analyze", "plan", "convert"])
@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "some/deep/folder", "nowhere/"])
def test_a_path_that_is_not_there(refused, command, model):
    message = refused("ModelNotFoundError", command, model)
    assert f"no folder {model!r}" in message and "a hub id (org/name)" in message and "demo-glu" in message


def test_a_folder_or_file_without_a_config(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").write_text("GGUF")
    for model in ("folder", "model.gguf"):
        assert f"{model!r} is there, but holds no config.json" in refused("ModelNotFoundError", "plan", model)


@pytest.mark.parametrize("model", ["org/no-such-model", "gpt5"])
def test_a_hub_id_while_offline(refused, model):
    message = refused("ModelNotFoundError", "plan", model)
    assert f"{model!r} is no local folder, and the hub cannot be reached" in message
    assert "to mend: check the spelling and the connection" in message


@pytest.mark.parametrize("model", ["not a name!", "x" * 300])
def test_what_cannot_be_a_hub_id(refused, model):
    assert repr(model) in refused("ModelNotFoundError", "plan", model)


@pytest.fixture
def hub_answers(monkeypatch, tmp_path):
    """Makes the hub answer every request so; the client libraries on top of it are the real ones."""
    http = importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])  # httpx or its successor
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path.parent / f"{tmp_path.name}-hub"))

    def answer(status, headers=None, content=b"{}"):
        def handle(request):
            return http.Response(status, headers=headers, content=content, request=request)

        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(handle)))

    yield answer
    huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize("status", [401, 404])  # without a token the hub answers 401 for what it does not have
def test_a_hub_id_that_the_hub_does_not_know(refused, hub_answers, status):
    hub_answers(status, {"X-Error-Code": "RepoNotFound"})
    message = refused("ModelNotFoundError", "convert", "org/no-such-model")
    assert "the hub knows no model 'org/no-such-model' (or it is private)" in message
    assert "check the spelling" in message and "hf auth login" in message


@pytest.mark.parametrize("status", [401, 403])  # without a token, and with one that was granted no access
def test_a_gated_hub_id(refused, hub_answers, status):
    hub_answers(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/gated is restricted."})
    message = refused("GatedModelError", "convert", "org/gated")
    assert "'org/gated' is gated" in message
    assert "ask for access at https://huggingface.co/org/gated" in message and "HF_TOKEN" in message


def test_a_revision_that_the_hub_does_not_know(refused, hub_answers):
    hub_answers(404, {"X-Error-Code": "RevisionNotFound"})
    assert "'org/model' has no such revision" in refused("ModelNotFoundError", "plan", "org/model", "--revision", "v9")


def test_a_token_that_the_hub_does_not_accept(refused, hub_answers):
    hub_answers(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    message = refused("ModelNotFoundError", "plan", "org/model")
    assert "the hub would not give 'org/model'" in message and "401" in message and "HF_TOKEN" in message


def test_a_repository_without_a_config(refused, hub_answers):
    hub_answers(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
    assert "'org/model' has no config.json that names a model_type" in refused("UnknownFamilyError", "plan", "org/model")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]), "t5, T5ForConditionalGeneration) is an encoder-decoder"),
        (ViTConfig(architectures=["ViTForImageClassification"]), "has no causal language model in transformers"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM) was not trained to predict next tokens"),
    ],
    ids=["t5", "vit", "bert"],
)
@pytest.mark.parametrize("command", ["analyze", "convert"])
def test_a_model_that_does_not_predict_next_tokens(refused, tmp_path, command, config, said):
    config.save_pretrained(tmp_path / "model")
    message = refused("NotCausalLMError", command, "model")
    assert said in message and "expected: a decoder-only causal language model" in message


def test_a_model_that_is_converted_already(refused, tmp_path):
    model_folder(tmp_path / "model", {"model_type": "mxd-llama"})
    message = refused("NotCausalLMError", "convert", "model")
    assert "already a converted model" in message and "name the original model" in message


def test_a_model_type_that_transformers_does_not_know(refused, tmp_path):
    model_folder(tmp_path / "model", {"model_type": "zork", "auto_map": {"AutoConfig": "configuration_zork.ZorkConfig"}})
    message = refused("UnknownFamilyError", "plan", "model")
    assert "model_type 'zork'" in message and "upgrade transformers" in message


@pytest.mark.parametrize("config", [{}, [1, 2], {"model_type": ["llama"]}, "3"], ids=str)
def test_a_config_that_names_no_model_type(refused, tmp_path, config):
    model_folder(tmp_path / "model", config)
    assert "has no config.json that names a model_type" in refused("UnknownFamilyError", "plan", "model")


@pytest.mark.parametrize("config", ["", "{'model_type': 'llama'}", "[" * 100_000], ids=["empty", "python", "deep"])
def test_a_config_that_is_not_json(refused, tmp_path, config):
    model_folder(tmp_path / "model", config)
    assert "the config.json of 'model' is not JSON" in refused("ModelNotFoundError", "plan", "model")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_embd": "wide"}, "Field 'n_embd' expected int, got str (value: 'wide')"),
        ({"n_embd": 30, "n_head": 7}, "must be divisible by num_heads"),
        ({"activation_function": "zork"}, "transformers cannot build a gpt2 model from this config: there is no 'zork'"),
    ],
)
def test_a_config_that_makes_no_model(refused, tmp_path, values, said):
    model_folder(tmp_path / "model", {"model_type": "gpt2"} | values)
    assert said in refused("UnknownFamilyError", "plan", "model")


def test_a_model_without_layers(refused, tmp_path):
    tiny_config("gpt2", n_layer=0).save_pretrained(tmp_path / "model")
    assert "the model has no decoder layers" in refused("LayerSelectionError", "plan", "model")


def copy_of_the_demo(folder):
    return shutil.copytree(DEMO_MODELS["demo-glu"], folder)


def test_weights_that_are_pickled(refused_conversion, tmp_path):
    model = copy_of_the_demo(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused_conversion("WeightsError", model="model")
    assert "'model' holds pytorch_model.bin" in message
    assert "never opened" in message and "save_pretrained() it" in message


def test_weights_that_are_not_there_or_not_whole(refused_conversion, tmp_path):
    model = copy_of_the_demo(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "the weights of 'model' cannot be loaded" in refused_conversion("WeightsError", model="model")
    weights.unlink()
    assert "'model' holds no weights" in refused_conversion("WeightsError", model="model")


def test_weights_of_another_shape_than_the_config_says(refused_conversion, tmp_path):
    model = copy_of_the_demo(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    message = refused_conversion("WeightsError", model="model")
    assert "are missing or of another shape" in message and "layers.4" in message


def test_a_model_without_a_tokenizer(refused_conversion, tmp_path):
    model = copy_of_the_demo(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    message = refused_conversion("ModelNotFoundError", model="model")
    assert "the tokenizer of 'model' cannot be loaded" in message and "expected: a tokenizer.json" in message


# What to make of it


@pytest.mark.parametrize("layers", ["4", "0,9", "2-4", "-5"])
def test_a_layer_that_is_not_there(refused, layers):
    message = refused("LayerSelectionError", "plan", "demo-glu", f"--layers={layers}")
    assert "the model has no layer" in message and "from 0 to 3, or -4 to -1" in message


def test_more_active_experts_than_experts(refused):
    given = refused("RecipeError", "plan", "demo-glu", "--k=17", "--n-experts=16")
    matched = refused("RecipeError", "plan", "demo-glu", "--k=50k", "--layers=2")
    assert "'k' is 17, more than n_experts = 16" in given
    assert "'k' is 50000, more than the" in matched and "experts of layer 2" in matched
    for message in (given, matched):
        assert "k of at most n_experts" in message and "to mend: lower --k" in message


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--tokens", "two", "a whole number (k, M and B suffixes allowed) of at least 1"),
        ("--tokens", "9" * 400, "a whole number"),
        ("--lr", "5", "a number from 1e-08 to 1"),
        ("--lr", "nan", "a number from 1e-08 to 1"),
        ("--expansion", "inf", "a number of at least 0.01"),
        ("--init", "foo", "one of shared, encoder, random, pretrained"),
        ("--out", "", "text"),
    ],
)
def test_a_flag_with_a_wrong_value(refused, command, flag, value, allowed):
    message = refused("RecipeError", command, "demo-glu", f"{flag}={value}")
    assert f"recipe key {flag[2:]!r} is {value!r}" in message and allowed in message.split("expected: ")[1]


def test_a_recipe_with_a_misspelt_key(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("layers: all\nn_expert: 64\n")
    message = refused("RecipeError", "convert", "demo-glu", "--recipe", "mine.yaml")
    assert "unknown recipe key 'n_expert' in mine.yaml" in message and "n_experts" in message.split("expected: ")[1]


def test_a_recipe_that_is_not_there(refused):
    assert "no recipe file 'mine.yaml'" in refused("RecipeError", "plan", "demo-glu", "--recipe", "mine.yaml")


def test_a_recipe_that_names_no_text(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("k: 4\n")
    message = refused("RecipeError", "convert", "demo-glu", "--recipe", "mine.yaml")
    assert "'data' is not set" in message and "give --data" in message


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(refused_conversion, monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused_conversion("RecipeError", f"--tracker={tracker}")
    assert "is not installed" in message and f"pip install 'mxdsurgery[{tracker}]'" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(refused_conversion):
    message = refused_conversion("DeviceError", "--device=cuda")
    assert "'device' is 'cuda', which this machine does not have" in message and "expected: cpu" in message
    assert "to mend: --device cpu, or --device auto" in message


def test_a_memory_budget_that_is_too_small_is_refused_before_weights_are_read(refused_conversion, tmp_path):
    model = copy_of_the_demo(tmp_path / "model")
    (model / "model.safetensors").unlink()
    message = refused_conversion("MemoryBudgetError", "--memory=0.01", "--shuffle=0", model="model")
    assert "training layer 0 alone takes" in message and "more than the memory budget of 10.2 MiB" in message
    assert "room for the base model and one layer in training" in message and "--memory 0." in message


# The text


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
@pytest.mark.parametrize(
    ("name", "content", "said", "mend"),
    [
        ("empty.txt", "", "does not fill one context of 128 tokens", "give a longer text, or a smaller --context"),
        ("short.jsonl", '{"text": "a few words"}\n', "does not fill one context", "give a longer text"),
        ("missing.jsonl.gz", None, "no text file 'missing.jsonl.gz'", "a .txt, .jsonl, .json, .csv, .tsv or .parquet file"),
        ("other.jsonl", '{"body": "words"}\n', "other.jsonl, line 1 has no column 'text'", "--text-column"),
        ("broken.jsonl", '{"text": "words"}\n{"text"\n', "broken.jsonl, line 2: not JSON", "one JSON object per line"),
        ("none.parquet", "text\nwords\n", "none.parquet' is not a whole Parquet file", ""),
        ("text.csv", "words\nwords\n", "text.csv, line 1, has no column 'text'", "--text-column"),
        ("user/unreachable", None, "the data set 'user/unreachable' cannot be read", "user/name[:config[:split]]"),
    ],
)
def test_a_text_that_cannot_be_used(refused_conversion, tmp_path, flag, name, content, said, mend):
    if content is not None:
        (tmp_path / name).write_text(content)
    message = refused_conversion("DataError", flag, name)
    assert said in message and mend in message


def test_a_text_of_which_nothing_is_left_to_train_on(refused_conversion):
    message = refused_conversion("DataError", "--eval-tokens=1M")
    assert "that are held out" in message and "fewer --eval-tokens" in message


def test_a_text_that_is_shorter_than_the_recipes_own_held_out_part(refused, tmp_path):
    (tmp_path / "short.txt").write_text("def f(x):\n    return x + 1\n" * 100)
    few = [flag for flag in QUICK if "--eval" not in flag]
    message = refused("DataError", "convert", "demo-glu", *few, "--data=short.txt", "--out=out")
    assert "eval_tokens 20000: from the recipe demo.yaml" in message and "fewer --eval-tokens" in message


# The output


def test_an_output_folder_that_exists(refused_conversion, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused_conversion("OutputError", out="out")
    assert "'out' exists already" in message and "--overwrite" not in message  # which would be refused
    (tmp_path / "out" / "plan.json").write_text("{}")
    message = refused_conversion("OutputError", out="out")
    assert "'out' exists already" in message and "give another --out, or --overwrite" in message


def test_overwriting_a_folder_or_file_that_is_not_ours(refused_conversion, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for out in ("out", "file", "out/thesis.tex", ".", "/"):
        message = refused_conversion("OutputError", "--overwrite", out=out)
        assert f"{out!r} exists already and was not written by mxdsurgery" in message and "give another --out" in message


def test_an_output_that_cannot_be_written(refused_conversion, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file/out", "file/deeper/out", "x" * 300):
        message = refused_conversion("OutputError", out=out)
        assert f"{out}' cannot be written" in message and "give another --out" in message


def test_an_output_that_is_a_link_to_nowhere_is_checked_where_it_leads(refused_conversion, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "out")
    assert "cannot be written" in refused_conversion("OutputError", out="link")


# A converted model


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt", "def")], ids=lambda command: command[0])
def test_a_folder_that_is_no_converted_model(refused, tmp_path, command):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "frontier.json").write_text("{}")
    model_folder(tmp_path / "tool", {})
    for folder, said in (
        ("nowhere", "'nowhere' is not there"),
        ("demo-glu", "'demo-glu' is not there"),
        ("file", "'file' is a file, not a folder"),
        ("folder", "'folder' is not a folder with a config.json"),
        ("table", "'table' is what frontier wrote"),
        ("tool", "config.json is the config of no model"),
    ):
        message = refused("NotConvertedError", *command, folder)
        assert said in message and "mxdsurgery convert wrote" in message
    copy_of_the_demo(tmp_path / "model")
    message = refused("NotConvertedError", *command, "model")
    assert "'model' holds an ordinary model (llama)" in message and "run mxdsurgery convert on it first" in message
    model_folder(tmp_path / "broken", "{")
    assert "is not JSON" in refused("NotConvertedError", *command, "broken")
    model_folder(tmp_path / "newer", {"mxd": {"family": "llama", "format_version": 99}})
    message = refused("NotConvertedError", *command, "newer")
    assert "format version 99" in message and "upgrade mxdsurgery" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate",),
        ("convert", "demo-glu", "--no-such-flag"),
        ("search", "folder", "the", "--by", "smell"),
        ("no-such-command",),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_usage(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "Usage: " in result.stderr and "Error: " in result.stderr


# In a process of its own


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        ("RecipeError", "recipe key 'tokens' is 'two'", ("--tokens", "two")),
        ("DataError", "no text file 'missing.txt'", ("--data", "missing.txt")),
        ("OutputError", "cannot be written", ("--out", "file/out")),
    ],
)
def test_the_program_itself_ends_with_2_and_the_named_error_alone(tmp_path, error, said, arguments):
    (tmp_path / "file").write_text("")
    before = everything_in(tmp_path)
    command = [sys.executable, "-m", "mxdsurgery", "convert", "demo-glu", *QUICK, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert f"{error}: " in done.stderr and said in done.stderr
    assert everything_in(tmp_path) == before
