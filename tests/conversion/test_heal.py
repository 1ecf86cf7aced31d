"""``heal``: the folder it writes, what it changes and what it does not, LoRA merged and kept, errors for a user's mistakes."""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from running import Said, held_at_reload, without_reloads
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mxdsurgery.checkpoint.apply import apply
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.conversion.heal import heal, heal_table
from mxdsurgery.conversion.heal_text import healing_texts
from mxdsurgery.demo import stdlib_documents
from mxdsurgery.errors import BaseModelError, DataError, HealError, LoRAError, OutputError, RecipeError
from mxdsurgery.measuring.evaluate import evaluate, load_original
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.training.teacher import KeptPredictions

QUICK = {"tokens": 4096, "batch": 1024, "device": "cpu"}
VALIDATION = 1024  # of all tests: see `little_validation`


@pytest.fixture(scope="module")
def source(converted):
    return converted.recipe.out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some documents of the training text: less to read."""
    path = tmp_path_factory.mktemp("text") / "some.txt"
    documents = itertools.islice(stdlib_documents("train"), 20, 40)
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def layers_only(source, text, tmp_path_factory, forked_reloads):
    out = tmp_path_factory.mktemp("heal") / "mxd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxdsurgery.checkpoint.export._run_reload", forked_reloads)  # as for users
        return heal(source, out=out, data=text, accumulate=2, **QUICK)


@pytest.fixture(scope="module")
def merged(source, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("heal") / "both"
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        return heal(source, out=out, data=text, mode="both", lora_rank=4, lr=3e-4, teacher="cached", top_n=32, **QUICK)


@pytest.fixture(scope="module")
def adapter(source, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("heal") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        return heal(source, out=out, data=text, mode="lora", lora="adapter", lr=1e-3, **QUICK)


@pytest.fixture
def no_reload(monkeypatch):
    without_reloads(monkeypatch)


def changed(folder, other):
    """Names of the tensors that differ between two folders' weights, which have the same names."""
    mine, theirs = (load_file(f"{path}/model.safetensors") for path in (folder, other))
    assert mine.keys() == theirs.keys()
    assert all(tensor.dtype == theirs[name].dtype for name, tensor in mine.items())
    return {name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])}


def entry(folder):
    return json.loads((folder / "config.json").read_text())["mxd"]["healed"]


def test_a_healed_folder_is_a_converted_one_with_other_layers_and_says_so(source, layers_only, tmp_path):
    out = Path(layers_only["out"])
    assert layers_only["kl_after"] < layers_only["kl_before"] and layers_only["tokens"] == 4096
    names = changed(out, source)
    assert names and all(".mlp." in name and name.split(".")[2] in "12" for name in names)
    (step,) = entry(out)
    assert step == {name: value for name, value in layers_only.items() if name not in ("evaluation", "out")}
    assert step["data"] == "some.txt"
    card = (out / "README.md").read_text()
    assert "## Healed" in card and "the new layers, trained end to end" in card and "4,096 tokens of some.txt" in card
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation == layers_only["evaluation"] and evaluation["healed"] == [step] and "training" in evaluation
    files = ({path.name for path in folder.iterdir() if path.is_file()} for folder in (out, Path(source)))
    assert next(files) == next(files)
    assert load_recipe(out / "recipe.yaml") == load_recipe(f"{source}/recipe.yaml")
    assert [row for row in heal_table(layers_only).columns[0].cells][0] == "0"


def test_the_kl_that_is_told_is_that_of_the_folder(source, text, layers_only):
    from mxdsurgery.training.end_to_end import validation_kl
    from mxdsurgery.training.teacher import original_examples

    made = load(layers_only["out"], dtype="float32")  # as both were computed
    recipe = Recipe(**load_recipe(f"{source}/recipe.yaml"))
    original = load_original(made, recipe.model, recipe)
    texts = healing_texts(load(source), recipe, recipe, text, Reporter())
    examples = list(original_examples(original, (), texts.heldout.split(4)))
    assert validation_kl(made.model, examples) == pytest.approx(layers_only["kl_after"], rel=1e-3)
    assert validation_kl(load(source, dtype="float32").model, examples) == pytest.approx(layers_only["kl_before"], rel=1e-3)
    chosen_on = list(original_examples(original, (), texts.validation.split(4)))
    best = min(row["kl"] for row in layers_only["validation"])
    assert validation_kl(made.model, chosen_on) == pytest.approx(best, rel=1e-3) and best != layers_only["kl_after"]


def test_the_validation_text_is_neither_trained_on_nor_held_out(source):
    from mxdsurgery.measuring.held_out import held_out

    made, recipe = load(source), Recipe(**load_recipe(f"{source}/recipe.yaml"))
    train, validation, measured, *_ = healing_texts(made, recipe, recipe, None, Reporter())
    looked_at = {tuple(row) for row in validation.tolist()}
    assert not looked_at & {tuple(row) for row in held_out(made, recipe).tolist()}
    assert measured.equal(held_out(made, recipe))
    trained = {tuple(row.tolist()) for row, _ in zip(train.contexts(), range(300), strict=False)}
    assert not looked_at & trained


def test_where_the_held_out_text_is_missing_it_is_the_beginning_of_the_text_that_is_given(source, text, layers_only):
    made, recipe, said = load(source), Recipe(**load_recipe(f"{source}/recipe.yaml")), Said()
    gone = dataclasses.replace(recipe, data="/data/corpus.txt", eval_data=None)
    train, validation, measured, name, _ = healing_texts(made, gone, gone, text, said)
    assert name == text and "no text file '/data/corpus.txt'" in said.lines[0] and measured.numel() > 0
    trained = {tuple(row.tolist()) for row, _ in zip(train.contexts(), range(300), strict=False)}
    looked_at = {tuple(row) for row in validation.tolist()}
    assert not {tuple(row) for row in measured.tolist()} & (trained | looked_at)
    with pytest.raises(DataError, match="which the recipe in (.|\n)*another text with data="):
        healing_texts(made, gone, gone, None, said)


def test_a_merged_adapter_is_in_the_weights_and_the_folder_is_measured_as_any(source, merged):
    out = merged["out"]
    assert merged["lora"] == "merged" and merged["teacher"] == "cached" and merged["kl_after"] < merged["kl_before"]
    names = changed(out, source)
    attention = {name for name in names if "self_attn" in name}
    assert attention == {f"model.{path}.weight" for path in merged["maps"]} and len(attention) == 16
    assert any(".mlp." in name for name in names - attention)
    again = evaluate(out, device="cpu")
    assert again["all"]["delta_ce"] == merged["evaluation"]["all"]["delta_ce"]
    assert "LoRA of rank 4 on 16 linear maps of the attention, merged into the weights" in open(f"{out}/README.md").read()


def test_single_layers_are_measured_without_lora_and_all_together_with_it(source, adapter):
    before = json.loads(open(f"{source}/evaluation.json").read())
    after = adapter["evaluation"]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert new["kl"] == pytest.approx(old["kl"], rel=1e-6)
    assert after["all"]["kl"] != pytest.approx(before["all"]["kl"], rel=1e-3)
    assert after["all"]["zero_delta_ce"] == pytest.approx(before["all"]["zero_delta_ce"], rel=1e-6)


def test_a_kept_adapter_is_an_ordinary_one_and_the_checkpoint_is_as_it_was(source, adapter):
    from peft import PeftModel

    out = adapter["out"]
    assert changed(out, source) == set()
    assert adapter["kl_after"] < adapter["kl_before"]
    assert str(source) not in open(f"{out}/lora/adapter_config.json").read()
    ids = torch.arange(2, 130).view(1, -1)
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        without = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, f"{out}/lora")(ids).logits
    assert not torch.equal(without, adapted)
    again = evaluate(out, device="cpu")
    assert again["all"]["kl"] == adapter["evaluation"]["all"]["kl"]
    assert "with the adapter" in open(f"{out}/README.md").read()


def test_healing_goes_on_from_a_healed_folder(merged, text, tmp_path, no_reload):
    again = heal(merged["out"], out=tmp_path / "again", data=text, checkpointing=True, local=0.1, moments="bfloat16", **QUICK)
    assert [step["mode"] for step in entry(tmp_path / "again")] == ["both", "mxd"]
    assert [step["moments"] for step in entry(tmp_path / "again")] == ["float32", "bfloat16"]
    assert all(".mlp." in name for name in changed(tmp_path / "again", merged["out"]))
    assert again["evaluation"]["all"]["kl"] < 1.1 * merged["evaluation"]["all"]["kl"]
    assert "Step 2: the new layers, trained" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("options", [{"mode": "mxd"}, {"mode": "both", "teacher": "cached"}], ids=str)
def test_no_model_is_in_memory_while_what_was_written_is_loaded_elsewhere(options, source, text, tmp_path, monkeypatch):
    held = held_at_reload(monkeypatch)
    heal(source, out=tmp_path / "healed", data=text, **QUICK | {"tokens": 1024}, **options)
    assert len(held) == 1 and held[0] < 2**20, held


def test_healing_never_returns_what_is_worse_than_the_start(source, text, tmp_path, no_reload, monkeypatch):
    said = []

    class Listener:
        say = staticmethod(said.append)

        def progress(self, *_):
            from mxdsurgery.terminal.console import Reporter

            return Reporter().progress("", "")

    monkeypatch.setattr("mxdsurgery.conversion.heal.evaluate", lambda *_, **__: {})
    made = heal(source, out=tmp_path / "out", data=text, lr=0.05, local=0.0, reporter=Listener(), **QUICK)
    assert made["tokens_to_best"] == 0 and made["kl_after"] == made["kl_before"]
    assert changed(tmp_path / "out", source) == set()
    assert any("nothing better than the start" in line for line in said)


def test_only_what_changed_is_written_where_an_adapter_is_asked_for(source, text, tmp_path, no_reload, monkeypatch):
    monkeypatch.setattr("mxdsurgery.conversion.heal.evaluate", lambda folder, **_: write_json(folder / "evaluation.json", {}))
    without_reloads(monkeypatch)
    heal(source, out=tmp_path / "small", data=text, format="adapter", **QUICK)
    assert not (tmp_path / "small" / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "small"]
    apply(tmp_path / "small", out=tmp_path / "whole")
    assert all(".mlp." in name for name in changed(tmp_path / "whole", source))
    assert entry(tmp_path / "whole")[0]["mode"] == "mxd"


def test_the_wrong_original_is_still_refused(merged, tmp_path):
    shutil.copytree(merged["out"], tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3] += 1
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="embed_tokens.weight differs"):
        evaluate(tmp_path / "other")


def test_edited_experts_are_not_healed_away(source, tmp_path):
    shutil.copytree(source, tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    config["mxd"]["edits"] = [{"edits": ["layer 1: ablate 3"]}]
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HealError, match="edited(.|\n)*--undo"):
        heal(tmp_path / "edited", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "all"}, HealError, "mode is 'all'(.|\n)*mxd, lora, both"),
        ({"lora": "beside"}, HealError, "lora is 'beside'"),
        ({"teacher": "other"}, HealError, "teacher is 'other'"),
        ({"format": "gguf"}, HealError, "format is 'gguf'"),
        ({"accumulate": 0}, HealError, "accumulate is 0"),
        ({"accumulate": 99, "batch": 1024}, HealError, "accumulate is 99, and a step has 8 contexts"),
        ({"local": 0.1, "teacher": "cached"}, HealError, "local is above 0"),
        ({"lr": 7.0}, RecipeError, "recipe key 'lr' is 7.0"),
        ({"moments": "int8"}, RecipeError, "recipe key 'moments' is 'int8'"),
        ({"data": "nothing.txt"}, DataError, "no text file"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(source, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        heal(source, out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_a_cached_teacher_keeps_is_known_to_have_room_before_anything_is_trained(source, tmp_path):
    kept = KeptPredictions(tmp_path, 3, 16, 8, 100)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == KeptPredictions.bytes(3, 16, 8) and not kept.contexts
    with pytest.raises(OutputError, match="takes .* TiB of disk while it is written(.|\n)*free some space"):
        heal(source, out=tmp_path / "out", teacher="cached", tokens=10**12)
    assert {path.name for path in tmp_path.iterdir()} == {"ids", "tokens", "log_p"}


def test_the_folder_itself_the_held_out_text_and_a_kept_adapter_are_refused(source, adapter, tmp_path):
    with pytest.raises(OutputError, match="is the folder to heal"):
        heal(source, out=source)
    recipe = Recipe(**load_recipe(f"{source}/recipe.yaml"))
    if recipe.eval_data is not None:
        with pytest.raises(DataError, match="is the held-out text"):
            heal(source, out=tmp_path / "out", data=recipe.eval_data)
    with pytest.raises(HealError, match="not merged(.|\n)*lora='merged'"):
        heal(adapter["out"], out=tmp_path / "out")


def test_without_peft_lora_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"peft, which is not installed(.|\n)*mxdsurgery\[lora\]"):
        heal(source, out=tmp_path / "out", mode="lora")
