"""Nothing from outside is run or unpickled, nothing leaves its folder, sizes are bounded, and no secret is written down."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import fuzz
import fuzz_inputs
import pytest
import torch
from click.testing import CliRunner
from running import without_reloads
from tiny import tiny_model

import mxdsurgery
from mxdsurgery.base.config import load_config
from mxdsurgery.base.model import load_tokenizer, model_skeleton, open_model
from mxdsurgery.checkpoint.adapter import ADAPTER_FILE, read_adapter
from mxdsurgery.checkpoint.card import model_card
from mxdsurgery.checkpoint.converted import PLAN_FILE, load
from mxdsurgery.cli import main
from mxdsurgery.disclosure import masked, secret_in
from mxdsurgery.editing.edits import Edits, edits_from, read_edits
from mxdsurgery.editing.judge import Judge
from mxdsurgery.errors import (
    EditError,
    JudgeError,
    ModelNotFoundError,
    NotConvertedError,
    RecipeError,
    UnknownFamilyError,
    WeightsError,
)
from mxdsurgery.outside import INDEX_FILE, check_types, inside, read_json, read_text, read_yaml
from mxdsurgery.recipe import Recipe, load_recipe

TOKEN = "hf_" + "Ab1" * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        without_reloads(patched)  # other tests do it
        return fuzz.Place(tmp_path_factory.mktemp("outside"))


def with_values(place, folder, name, **values):
    """A folder with other values in one of its JSON files."""
    given = json.loads((folder / name).read_text())
    return place.spoilt(folder, name, json.dumps(given | values).encode())


def refused(error, run):
    with pytest.raises(error) as caught:
        run()
    return str(caught.value)


def copy_of(folder, to):
    return shutil.copytree(folder, to)


class Bomb:
    """What would leave a mark, were it unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


# Pickled weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "old.ckpt"])
def test_pickled_weights_are_refused_by_name_and_never_opened(place, tmp_path, name):
    folder = copy_of(place.base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    message = refused(WeightsError, lambda: open_model(str(folder)).load())
    assert f"holds {name}" in message and "never opened" in message
    assert "from_pretrained() and save_pretrained() it into a new folder" in message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("of", ["base", "sharded"])
def test_an_index_that_names_a_pickled_file_is_refused_unopened(place, tmp_path, of):
    folder = copy_of(getattr(place, of), tmp_path / "model")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "other.safetensors").write_bytes(b"")
    (folder / "shard.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "shard.bin"}}))
    message = refused(WeightsError, lambda: open_model(str(folder)).load() if of == "base" else load(folder))
    assert "'shard.bin', which is not safetensors" in message
    assert not (tmp_path / "mark").exists()


def test_an_adapter_of_peft_beside_the_model_is_refused(place, tmp_path):
    folder = copy_of(place.base, tmp_path / "base")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc", "peft_type": "LORA"}')
    assert "PEFT adapter beside it" in refused(WeightsError, lambda: open_model(str(folder)).load())
    folder = copy_of(place.whole, tmp_path / "whole")
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refused(NotConvertedError, lambda: load(folder))


# Code


@pytest.fixture
def with_code(place, tmp_path):
    """A base model of a family that transformers does not know, whose code leaves a mark where it runs."""
    folder = copy_of(place.base, tmp_path / "toy")
    mark = f"import os\nos.makedirs({str(tmp_path / 'mark')!r}, exist_ok=True)\n"
    classes = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    (folder / "configuration_toy.py").write_text(f"{mark}{classes}class ToyConfig(LlamaConfig):\n    model_type = 'toy'\n")
    modeling = "from .configuration_toy import ToyConfig\nclass ToyModel(LlamaForCausalLM):\n    config_class = ToyConfig\n"
    (folder / "modeling_toy.py").write_text(mark + classes + modeling)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyModel"}
    config |= {"model_type": "toy", "architectures": ["ToyModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("run", [load_config, open_model, mxdsurgery.analyze, mxdsurgery.plan], ids=lambda run: run.__name__)
def test_a_base_models_own_code_is_not_run_without_being_trusted(with_code, tmp_path, run):
    message = refused(UnknownFamilyError, lambda: run(str(with_code)))
    assert "only by code that comes with it" in message and "trust_remote_code=True" in message
    assert not (tmp_path / "mark").exists()


def test_a_base_models_own_code_is_run_where_it_is_trusted(with_code, tmp_path):
    model = open_model(str(with_code), trust_remote_code=True).load()
    assert type(model).__name__ == "ToyModel" and (tmp_path / "mark").exists()
    assert type(model_skeleton(load_config(str(with_code), trust_remote_code=True))).__name__ == "ToyModel"
    assert load_tokenizer(str(with_code), trust_remote_code=True)("def")["input_ids"]


def test_code_of_a_family_that_transformers_knows_is_not_run_even_where_it_is_trusted(with_code, tmp_path):
    config = json.loads((with_code / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (with_code / "config.json").write_text(json.dumps(config))
    model = open_model(str(with_code), trust_remote_code=True).load()
    assert type(model).__name__ == "LlamaForCausalLM" and not (tmp_path / "mark").exists()


def test_trust_is_a_flag_and_no_file_gives_it(tmp_path):
    assert "--trust-remote-code" in CliRunner().invoke(main, ["convert", "--help"]).stdout
    path = tmp_path / "recipe.yaml"
    path.write_text("trust_remote_code: true\n")
    message = refused(RecipeError, lambda: load_recipe(path))
    assert "'trust_remote_code' is True" in message and "say so yourself: trust_remote_code=True" in message
    path.write_text(Recipe(trust_remote_code=True).to_yaml())  # what is saved with a model
    assert load_recipe(path)["trust_remote_code"] is False


def test_a_tokenizers_own_code_is_not_run(place, tmp_path):
    folder = copy_of(place.base, tmp_path / "base")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(str(folder))  # tokenizer.json is enough for transformers; if not, it is refused by name
    except ModelNotFoundError:
        pass
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.MxDEvil"}}, "auto_map names other code"),
        ({"auto_map": {"AutoModel": "org/repo--modeling_mxd.MxDEvil"}}, "auto_map names other code"),
        ({"auto_map": {"AutoTokenizer": "evil.MxDEvil"}}, "auto_map names other code"),
        ({"attn_implementation": "org/kernel"}, "asks for code from elsewhere"),
        ({"_attn_implementation": {"": "org/kernel@main"}}, "asks for code from elsewhere"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights that are quantised"),
        ({"transformers_weights": "../other.safetensors"}, "weights that are quantised, elsewhere"),
        ({"to_dict": 3}, "there is no setting 'to_dict'"),
        ({"dtype": "save"}, "dtype is none of"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_config_that_would_have_other_code_or_weights_loaded_is_refused(place, values, said):
    assert said in refused(NotConvertedError, lambda: load(with_values(place, place.whole, "config.json", **values)))


def test_a_base_config_that_asks_for_a_kernel_from_the_hub_is_refused(place):
    folder = with_values(place, place.base, "config.json", attn_implementation="org/kernel")
    assert "asks for code from elsewhere" in refused(UnknownFamilyError, lambda: load_config(str(folder)))


# Paths


@pytest.mark.parametrize(
    ("name", "good"),
    [("a", True), ("a/b", True), ("./a", True), ("../a", False), ("a/../../b", False), ("/etc/passwd", False)]
    + [
        ("", False),
        ("a\0", False),
        ("..\\a", False),
        ("link", False),
        ("link/passwd", False),
        ("own", True),
        ("circle", False),
    ],
)
def test_a_path_is_inside_its_folder_or_not(tmp_path, name, good):
    folder = tmp_path / "folder"
    folder.mkdir()
    for link, to in (("link", "/etc"), ("own", "a"), ("circle", "circle")):
        (folder / link).symlink_to(to)
    assert inside(folder, name) is good


def test_links_in_the_hubs_cache_lead_to_its_blobs(place, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    copy_of(place.base, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_model(str(snapshot)).load().num_parameters() > 0
    (snapshot / "other.json").symlink_to("../../other")
    (tmp_path / "other").write_text("")
    assert "leaves the folder" in refused(ModelNotFoundError, lambda: load_config(str(snapshot)))


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a/../../other.safetensors"])
@pytest.mark.parametrize("of", ["base", "sharded"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(place, tmp_path, of, name):
    folder = copy_of(getattr(place, of), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors") if of == "base" else None
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    message = refused(WeightsError, lambda: open_model(str(folder)).load() if of == "base" else load(folder))
    assert f"names a file outside the folder: {name!r}" in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "plan.json", "deep/notes.txt"])
def test_a_link_that_leaves_a_converted_models_folder_is_refused(place, tmp_path, name):
    folder = copy_of(place.whole, tmp_path / "whole")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(place.whole / path.name)
    assert f"{name} is a link that leaves the folder" in refused(NotConvertedError, lambda: load(folder))


def test_a_link_that_leaves_a_base_models_folder_is_refused(place, tmp_path):
    folder = copy_of(place.base, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(place.base / "tokenizer.json")
    assert "tokenizer.json is a link that leaves the folder" in refused(ModelNotFoundError, lambda: open_model(str(folder)))


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "link.txt"])
def test_an_adapter_that_names_a_file_outside_its_folder_is_refused(place, tmp_path, name):
    folder = copy_of(place.adapter, tmp_path / "adapter")
    if name == "link.txt":
        (folder / name).symlink_to("/etc/hostname")
    values = json.loads((folder / ADAPTER_FILE).read_text())
    values["files"][name] = "0" * 64
    (folder / ADAPTER_FILE).write_text(json.dumps(values))
    assert name in refused(NotConvertedError, lambda: read_adapter(folder))
    assert not (tmp_path / "evil.txt").exists()


def first_layer(place, **changes):
    """The ``mxd`` entry of the converted model's config with another first layer."""
    mxd = json.loads((place.whole / "config.json").read_text())["mxd"]
    mxd["layers"][0] |= changes
    return mxd


@pytest.mark.parametrize(
    "changes",
    [{"path": "../mlp"}, {"path": ""}, {"path": 3}, {"bypass": "lm_head"}, {"bypass": ["a b"]}, {"kind": "evil"}]
    + [{"kind": ["mxd"]}, {"shape": {"k": 0}}, {"shape": {"k": 9, "n_experts": 8}}, {"shape": [1]}, {"layer": None}],
    ids=str,
)
def test_a_config_that_describes_no_layer_is_refused(place, changes):
    folder = with_values(place, place.whole, "config.json", mxd=first_layer(place, **changes))
    assert "says what no conversion wrote" in refused(NotConvertedError, lambda: load(folder))


@pytest.mark.parametrize("path", ["embed_tokens", "layers.0.mlp.gate_proj", "norm", "layers.1"])
def test_a_plan_or_config_that_names_another_module_than_the_other_is_refused(place, path):
    folder = with_values(place, place.whole, "config.json", mxd=first_layer(place, path=path))
    assert "do not say the same" in refused(WeightsError, lambda: load(folder))
    layers = json.loads((place.whole / PLAN_FILE).read_text())["layers"]
    layers[0]["block"]["path"] = path
    folder = with_values(place, place.whole, PLAN_FILE, layers=layers)
    assert "do not say the same" in refused(WeightsError, lambda: load(folder))


# Sizes


def test_yaml_is_bounded_and_plain(tmp_path):
    path = tmp_path / "file.yaml"
    for text, said in (
        (fuzz_inputs.TRICKS[0], "aliases"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "the tag"),
        ("a: !!int 3", "the tag"),
        ("a: " + "x" * 100_000, "65536 characters"),
        ("a: 1\na: 2", "stands twice"),
        ("2001-99-99: 1", "not valid YAML"),
    ):
        path.write_text(text)
        start = time.perf_counter()
        assert said in refused(ValueError, lambda: read_yaml(path))
        assert time.perf_counter() - start < 2
    path.write_text("k: 0x" + "f" * 5000 + "\nn: 12\nm: " + "9" * 5000)
    assert read_yaml(path) == {"k": "0x" + "f" * 5000, "n": 12, "m": "9" * 5000}


def test_json_is_bounded(tmp_path):
    path = tmp_path / "file.json"
    for text, said in (
        ("[" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ('{"a": 1' + "0" * 30 + "}", "too large"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting"),
        (" " * 200_000, "larger than 102400 bytes"),
    ):
        path.write_text(text)
        assert said in refused(ValueError, lambda: read_json(path, 100 * 2**10))


def test_what_is_no_file_is_not_waited_for(place, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no plain file" in refused(ValueError, lambda: read_text(tmp_path / "pipe.yaml"))
    assert "no plain file" in refused(EditError, lambda: read_edits(tmp_path / "pipe.yaml"))
    folder = copy_of(place.whole, tmp_path / "whole")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "neither a file nor a folder" in refused(NotConvertedError, lambda: load(folder))


def test_an_edit_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "edits.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    assert "is larger than" in refused(EditError, lambda: read_edits(path))


def test_edits_of_a_hundred_thousand_experts_are_checked_in_a_moment():
    many = list(range(100_000)) + [7]
    start = time.perf_counter()
    edits = edits_from({"layers": {0: {"ablate": many}}}, "here")
    assert "[7] are named twice" in refused(EditError, lambda: edits.live(torch.nn.Linear(1, 1)))
    assert time.perf_counter() - start < 5


def test_edits_with_the_same_list_twice_are_written_out_and_read_back(tmp_path):
    same = [1, 2]
    edits = Edits(ablate={0: same, 1: same})
    (tmp_path / "edits.yaml").write_text(edits.to_yaml())
    assert "*" not in edits.to_yaml() and read_edits(tmp_path / "edits.yaml") == edits


@pytest.mark.parametrize("count", [10**6, 10**12, 2**62])
def test_a_config_that_says_more_than_the_weights_hold_takes_no_memory(place, count):
    shape = json.loads((place.whole / "config.json").read_text())["mxd"]["layers"][0]["shape"] | {"n_experts": count}
    sizes = dict.fromkeys(("num_hidden_layers", "vocab_size", "hidden_size"), count)
    for name, value in (sizes | {"mxd": first_layer(place, shape=shape)}).items():
        folder = with_values(place, place.whole, "config.json", **{name: value})
        start = time.perf_counter()
        message = refused(WeightsError, lambda folder=folder: load(folder))
        assert "cannot be loaded" in message and time.perf_counter() - start < 5


def test_a_base_config_that_says_more_than_the_weights_hold_takes_no_memory(place):
    folder = with_values(place, place.base, "config.json", num_hidden_layers=10**9)
    message = refused(UnknownFamilyError, lambda: load_config(str(folder)))
    assert "num_hidden_layers is 1000000000" in message and "at most 4096" in message
    folder = with_values(place, place.base, "config.json", vocab_size=10**10)
    assert "its config asks for" in refused(WeightsError, lambda: open_model(str(folder)).load())


@pytest.mark.parametrize("length", [2**20, 10**9, 2**60, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is_is_refused(place, length):
    weights = (place.whole / "model.safetensors").read_bytes()
    folder = place.spoilt(place.whole, "model.safetensors", length.to_bytes(8, "little") + weights[8:])
    assert "model.safetensors is damaged or only a part" in refused(WeightsError, lambda: load(folder))
    weights = (place.base / "model.safetensors").read_bytes()
    folder = place.spoilt(place.base, "model.safetensors", length.to_bytes(8, "little") + weights[8:])
    assert "cannot be loaded" in refused(WeightsError, lambda: open_model(str(folder)).load())


@pytest.mark.parametrize("key", ["k", "lr", "model", "expansion", "memory", "seed", "out"])
def test_a_recipe_value_that_no_one_means_is_refused_and_can_be_shown(key):
    for value in (10**5000, -(10**5000), 1e308, float("nan"), "9" * 10_001, "a\0b", "\ud800", "x" * 20_000):
        message = refused(RecipeError, lambda value=value: Recipe(**{key: value}))
        assert f"recipe key {key!r} is " in message and len(message.encode()) < 2000


def test_types_are_checked_in_depth():
    check_types([1, 2.5, None], list[float | None])
    check_types({"a": (1, "x")}, dict[str, tuple[int, str]])
    for value, wanted in ((True, int), ([1, "x"], list[int]), ({1: 1}, dict[str, int]), ((1, 2), tuple[int, str]), (1, bool)):
        with pytest.raises(ValueError):
            check_types(value, wanted)


# Secrets


SECRETS = [TOKEN, "https://me:pass-word@host.org/x", "https://host.org/v1?api_key=abc123def456ghi", "https://h/?key=s3cret"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("key", ["data", "model", "out", "revision"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path, key, secret):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{key}: {secret}\n")
    for run in (lambda: load_recipe(path), lambda: Recipe(**{key: secret})):
        message = refused(RecipeError, run)
        assert f"recipe key {key!r} holds a" in message and "HF_TOKEN" in message
        assert secret not in message and "word" not in message.replace("password", "")


def test_a_secret_of_the_environment_is_one_whatever_it_looks_like(monkeypatch):
    assert secret_in("plain words") is None and Recipe(data="plain words").data == "plain words"
    monkeypatch.setenv("HF_TOKEN", "plain words")
    assert secret_in("plain words") == "a token in use here"
    with pytest.raises(RecipeError, match="a token in use here"):
        Recipe(data="plain words")


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_masked_in_what_is_logged(secret):
    line = masked(f"reading {secret} now")
    hidden = secret if secret == TOKEN else secret.rpartition("=")[2] if "=" in secret else "pass-word"
    assert hidden not in line and line.startswith("reading ") and line.endswith(" now")


def test_the_judges_address_may_hold_no_password_and_its_errors_no_key():
    assert "pass-word" not in refused(JudgeError, lambda: Judge("https://me:pass-word@host/v1", "model"))
    judge = Judge("http://127.0.0.1:9/v1?api_key=abc123def456ghi", "model", tries=1, timeout=1.0)
    assert "abc123def456ghi" not in refused(JudgeError, lambda: judge.rate(["passage"], "text"))


def test_nothing_that_is_written_with_a_model_holds_a_secret(place):
    for path in place.whole.rglob("*"):
        if path.suffix in {".json", ".yaml", ".md", ".py", ".txt", ".jsonl"} and not path.name.startswith("tokenizer"):
            assert secret_in(path.read_text(encoding="utf-8")) is None, path.name
    evaluation = json.loads((place.whole / "evaluation.json").read_text())
    recipe = Recipe(**load_recipe(place.whole / "recipe.yaml"))
    assert secret_in(model_card(place.converted.plan, recipe, evaluation)) is None


# The code that travels


def exported_code(place):
    return sorted(place.whole.glob("*.py"))


# What a value may consist of, and calls that only make a type or a mark.
_LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.BinOp)
_LITERAL += (ast.operator, ast.Attribute, ast.Subscript, ast.Slice)
_MARKS = {"dataclass", "field", "no_grad", "TypeVar", "disable", "local", "ContextVar", "Lock"}


def is_plain(node):
    """Whether an expression is made of literals, names and operators alone, or marks something."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        return name in _MARKS and all(map(is_plain, [*node.args, *(word.value for word in node.keywords)]))
    return node is None or all(isinstance(part, _LITERAL) for part in ast.walk(node))


def does_nothing(node):
    """Whether a statement, run on import, does nothing but define."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        own = [*node.args.defaults, *node.args.kw_defaults] if isinstance(node, ast.FunctionDef) else node.bases
        inner = node.body if isinstance(node, ast.ClassDef) else []
        return all(map(is_plain, [*own, *node.decorator_list])) and all(map(does_nothing, inner))
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return is_plain(node.value)
    words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return words or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def test_the_exported_files_do_nothing_on_import_but_define(place):
    names = [path.name for path in exported_code(place)]
    assert {"modeling_mxd.py", "configuration_mxd.py", "layer.py", "replacement.py"} <= set(names)
    for path in exported_code(place):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert does_nothing(node), f"{path.name}, line {node.lineno}: {ast.unparse(node)[:200]}"


@pytest.mark.parametrize(
    "line",
    ["print(1)", "x = open('a')", "def f(a=g()): pass", "class A:\n    g()", "for i in a: pass", "del x", "@g()\ndef f(): 0"],
)
def test_what_does_something_on_import_is_told_apart(line):
    assert not does_nothing(ast.parse(line).body[0])


_WATCHED = """
import sys
import importlib, importlib.util, types
import torch, transformers, transformers.activations, transformers.modeling_utils
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
folder = sys.argv[1]
package = types.ModuleType("exported")
package.__path__ = [folder]
sys.modules["exported"] = package
sys.dont_write_bytecode = True
seen = []

def watch(event, arguments):
    if event == "open" and set("wax+") & set(str(arguments[1] or "r")):
        seen.append((event, str(arguments[0])))
    elif event.split(".")[0] in ("socket", "subprocess", "shutil", "ftplib", "urllib", "ctypes") or event in (
        "os.system", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.exec", "os.fork", "os.putenv", "os.posix_spawn",
    ):
        seen.append((event, str(arguments)))

sys.addaudithook(watch)
for name in sys.argv[2:]:
    importlib.import_module("exported." + name)
print(seen)
"""


def test_importing_the_exported_files_writes_nothing_and_reaches_no_network(place):
    modules = [path.stem for path in exported_code(place)]
    done = subprocess.run([sys.executable, "-I", "-c", _WATCHED, str(place.whole), *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_file_that_writes_on_import_is_seen(tmp_path):
    (tmp_path / "bad.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    done = subprocess.run([sys.executable, "-I", "-c", _WATCHED, str(tmp_path), "bad"], capture_output=True, text=True)
    assert "mark" in done.stdout


def test_a_converted_models_own_files_are_not_run_when_it_is_loaded(place, tmp_path):
    folder = copy_of(place.whole, tmp_path / "whole")
    for path in folder.glob("*.py"):
        path.write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    assert load(folder).tokenizer() is not None
    assert not (tmp_path / "mark").exists()


def test_every_family_may_be_named_in_a_config(tmp_path):
    """What is refused above is no setting of any family."""
    for family in ("gpt2", "llama", "gemma2", "opt"):
        tiny_model(family).save_pretrained(tmp_path / family)
        assert open_model(str(tmp_path / family)).load().num_parameters() > 0


def test_a_base_model_with_code_of_its_own_is_converted_with_that_code(with_code, tmp_path):
    few = {"tokens": 1024, "eval_tokens": 256, "batch": 256, "context": 16, "n_experts": 16, "k": 4, "shuffle": 0}
    out = tmp_path / "out"
    mxdsurgery.convert(str(with_code), trust_remote_code=True, data="stdlib", device="cpu", out=str(out), **few)
    assert {"configuration_toy.py", "modeling_toy.py"} <= {path.name for path in out.iterdir()}
    assert "if you trust them, give trust_remote_code=True" in refused(NotConvertedError, lambda: load(out))
    assert type(load(out, trust_remote_code=True).model).__name__ == "MxDToyModel"
