"""Adapters hold only what differs from the base model, and rebuild the whole checkpoint, bit for bit, with no other base."""

import dataclasses
import importlib
import json
import shutil

import pytest
import torch
from running import held_at_reload, without_reloads
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import IDS, RECIPE, export_tiny, tiny_model

from mxdsurgery.checkpoint.adapter import ADAPTER_FILE, read_adapter
from mxdsurgery.checkpoint.apply import apply, make_adapter
from mxdsurgery.checkpoint.converted import load, read_config
from mxdsurgery.checkpoint.export import written_as
from mxdsurgery.editing.edit import edit
from mxdsurgery.editing.edits import Edits
from mxdsurgery.errors import BaseModelError, NotConvertedError, OutputError, WeightsError
from mxdsurgery.measuring.evaluate import evaluate


@pytest.fixture
def unchecked(monkeypatch):
    """Spares the fresh process that loads what was written; the tests compare its bytes."""
    without_reloads(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny llama with tied embeddings, its checkpoint with one of two layers converted, and the adapter."""
    place = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        model, *_ = export_tiny("llama", place / "whole", layers=(1,), tie_word_embeddings=True)
    model.save_pretrained(place / "base")
    plan = json.loads((place / "whole" / "plan.json").read_text())
    (place / "whole" / "plan.json").write_text(json.dumps(plan | {"model": str(place / "base")}))
    make_adapter(place / "whole", out=place / "adapter")
    return place


@pytest.fixture
def adapter(made, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(made / "adapter", tmp_path / "copy")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_round_trip(whole, base, place):
    """whole -> adapter -> the same bytes; and the same tensors in memory. Returns what the two commands said."""
    wrote = make_adapter(whole, base=str(base), out=place / "adapter")
    applied = apply(place / "adapter", base=str(base), out=place / "again")
    assert contents(place / "again") == contents(whole) and applied["differs"] == []
    wanted, found = load(whole), load(place / "adapter", base=str(base))
    states = wanted.model.state_dict(), found.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name
    return wrote, applied


def held(folder):
    """Names of the tensors in an adapter."""
    names = set()
    for path in folder.glob("adapter*.safetensors"):
        with safe_open(path, "pt") as opened:
            names |= set(opened.keys())
    return names


def change(path, name, value):
    tensors = load_file(path)
    tensors[name] = value(tensors[name])
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi3", "gpt_neox"])
def test_adapter_and_base_give_the_same_bytes_in_every_family(family, tmp_path, unchecked):
    model, *_ = export_tiny(family, tmp_path / "whole")
    model.save_pretrained(tmp_path / "base")
    wrote, applied = assert_round_trip(tmp_path / "whole", tmp_path / "base", tmp_path)
    assert applied["bytes"] == wrote["bytes"] > wrote["adapter_bytes"] == applied["adapter_bytes"]
    paths = [entry["path"] for entry in read_config(tmp_path / "whole")["mxd"]["layers"]]
    outside = {name for name in held(tmp_path / "adapter") if not any(f"{path}." in name for path in paths)}
    assert outside == set(), "the rest of the base model's weights are not in it"


@pytest.mark.parametrize("kind", ["transcoder", "skip-transcoder", "topk-sae", "molt", "dense"])
def test_so_do_the_other_kinds_of_layer(kind, tmp_path, unchecked):
    model, *_ = export_tiny("llama", tmp_path / "whole", recipe=dataclasses.replace(RECIPE, kind=kind))
    model.save_pretrained(tmp_path / "base")
    assert_round_trip(tmp_path / "whole", tmp_path / "base", tmp_path)
    assert all(".mlp." in name for name in held(tmp_path / "adapter"))


def test_bf16_of_an_fp32_base_and_shards_on_both_sides(tmp_path, unchecked):
    export_tiny("llama", tmp_path / "one", dtype=torch.bfloat16)
    whole = tmp_path / "whole"
    load(tmp_path / "one").model.save_pretrained(whole, max_shard_size="20KB")
    for path in (tmp_path / "one").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy2(path, whole)
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list(whole.glob("model-*"))) > 2 and len(list((tmp_path / "base").glob("model-*"))) > 2
    assert_round_trip(whole, tmp_path / "base", tmp_path)
    assert read_adapter(tmp_path / "adapter").dtype == "bfloat16"
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {
        path.name.replace("model", "adapter") for path in whole.glob("*.safetensors")
    }


def test_a_base_that_names_its_tensors_otherwise_than_the_model_in_memory(tmp_path, unchecked):
    """As gpt2 on the hub does, whose names lack the first part, and as transformers does with gpt_neox's output."""
    model, *_ = export_tiny("gpt2", tmp_path / "whole")
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert_round_trip(tmp_path / "whole", tmp_path / "base", tmp_path)
    assert all(".mlp." in name for name in held(tmp_path / "adapter"))


def test_attention_that_was_healed_is_kept_and_so_are_folders_of_the_model(made, tmp_path, unchecked):
    whole = shutil.copytree(made / "whole", tmp_path / "whole")
    name = "model.layers.0.self_attn.q_proj.weight"
    change(whole / "model.safetensors", name, lambda weight: weight + 1)
    (whole / "lora").mkdir()
    save_file({"a": torch.ones(2)}, whole / "lora" / "adapter_model.safetensors")
    assert_round_trip(whole, made / "base", tmp_path)
    assert name in held(tmp_path / "adapter") and "model.layers.0.self_attn.k_proj.weight" not in held(tmp_path / "adapter")


def test_zeros_of_the_other_sign_and_nan_are_told_apart_by_their_bits(made, tmp_path, unchecked):
    """-0 equals 0 and nan does not equal nan: only bits tell what can be left out."""
    whole, base = (shutil.copytree(made / name, tmp_path / name) for name in ("whole", "base"))
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    for folder, zero in ((whole, -0.0), (base, 0.0)):
        change(folder / "model.safetensors", norms[0], lambda weight, zero=zero: torch.full_like(weight, zero))
        change(folder / "model.safetensors", norms[1], lambda weight: torch.full_like(weight, float("nan")))
    make_adapter(whole, base=str(base), out=tmp_path / "adapter")
    assert norms[0] in held(tmp_path / "adapter") and norms[1] not in held(tmp_path / "adapter")


def test_an_edited_folder_comes_back_with_its_edits_and_not_with_what_was_found_out_about_it(converted, tmp_path, unchecked):
    """The base is the demo model, found by its name; steering writes a bias that the layer did not have."""
    whole = tmp_path / "edited"
    edit(converted.recipe.out, out=whole, edits=Edits(ablate={1: [3]}, steer={1: {7: 3.0}}), tokens=1_000, device="cpu")
    (whole / "experts").mkdir()
    (whole / "experts" / "experts.jsonl").write_text("{}")
    (whole / "report.html").write_text("")
    make_adapter(whole, out=tmp_path / "adapter")
    assert apply(tmp_path / "adapter", out=tmp_path / "again")["differs"] == []
    wanted = {name: data for name, data in contents(whole).items() if not name.startswith(("experts/", "report.html"))}
    assert contents(tmp_path / "again") == wanted
    assert "edits/1/before.safetensors" in wanted and any("experts.bias" in name for name in held(tmp_path / "adapter"))
    apart = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"config.json", "plan.json", "recipe.yaml", "evaluation.json", "tokenizer.json", ADAPTER_FILE} <= apart
    assert not apart & {"experts", "report.html", "model.safetensors", "layer.py"}


def test_what_is_applied_is_reloaded_without_mxdsurgery(made, tmp_path, whole_reloads):
    """The base is found where the plan says."""
    applied = apply(made / "adapter", out=tmp_path / "out")
    assert applied["logits"] == applied["hidden"] == 0.0 and applied["tensors_from_base"] > 0
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_load_in_memory_is_load_of_the_folder_and_writes_nothing(made):
    before = contents(made / "adapter")
    found, wanted = load(made / "adapter", base=str(made / "base")), load(made / "whole")
    assert contents(made / "adapter") == before
    with torch.no_grad():
        assert torch.equal(found.model(IDS).logits, wanted.model(IDS).logits)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert type(found.model).__name__ == "MxDLlamaForCausalLM" and set(found.layers) == {1}
    assert found.model.generation_config == wanted.model.generation_config and found.plan == wanted.plan
    assert found.tokenizer()("import os") == wanted.tokenizer()("import os")
    assert load(made / "adapter", base=str(made / "base"), dtype="bfloat16").model.dtype == torch.bfloat16


def another(place, family="llama", **changes):
    tiny_model(family, **{"tie_word_embeddings": True} | changes).save_pretrained(place)


WRONG = {
    "other weights": (lambda base: another(base, seed=1), "differs: it is another revision"),
    "fewer layers": (lambda base: another(base, num_hidden_layers=1), "it has no model.layers.1"),
    "another width": (lambda base: another(base, hidden_size=48), "has shape .*48.*, not .*32"),
    "another vocabulary": (lambda base: another(base, vocab_size=65), "embed_tokens.weight has shape .65, 32., not .64, 32."),
    "another family": (lambda base: another(base, "gpt2"), "it is a gpt2 model, not llama"),
    "nothing": (lambda base: None, "no folder"),
    "no weights": (lambda base: another(base) or (base / "model.safetensors").unlink(), "holds no weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_base_is_refused_by_name_and_nothing_is_left(what, made, tmp_path, unchecked):
    make, message = WRONG[what]
    make(tmp_path / "base")
    (tmp_path / "outs").mkdir()
    with pytest.raises(BaseModelError, match=message) as refused:
        apply(made / "adapter", base=str(tmp_path / "base"), out=tmp_path / "outs" / "out")
    assert "--base" in refused.value.fix and refused.value.expected == "'base'"
    with pytest.raises(BaseModelError, match=message):
        load(made / "adapter", base=str(tmp_path / "base"))
    assert list((tmp_path / "outs").iterdir()) == []


def test_one_weight_that_was_trained_on_is_enough(made, tmp_path, unchecked):
    base = shutil.copytree(made / "base", tmp_path / "base")
    change(base / "model.safetensors", "model.norm.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), 7.0))
    with pytest.raises(BaseModelError, match="model.norm.weight differs"):
        apply(made / "adapter", base=str(base), out=tmp_path / "out")


def test_the_recorded_revision_is_asked_for_of_the_recorded_model_only(adapter, made, monkeypatch):
    values = json.loads((adapter / ADAPTER_FILE).read_text())
    (adapter / ADAPTER_FILE).write_text(json.dumps(values | {"base_model": "some/model", "revision": "abc123"}))
    asked = []
    monkeypatch.setattr(
        "mxdsurgery.checkpoint.adapter.open_model", lambda name, revision, _trusted: asked.append((name, revision)) or 1 / 0
    )
    for base in ("some/model", "a/mirror"):
        with pytest.raises(ZeroDivisionError):
            load(adapter, base=base)
    assert asked == [("some/model", "abc123"), ("a/mirror", None)]


def test_an_adapter_is_not_made_with_another_model_than_its_own(made, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="no tensor in common"):
        make_adapter(made / "whole", base=str(tmp_path / "base"), out=tmp_path / "out")
    with pytest.raises(BaseModelError, match="is needed"):
        make_adapter(made / "whole", base=str(tmp_path / "gone"), out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_what_is_applied_is_not_in_memory_while_it_is_reloaded(made, tmp_path, monkeypatch):
    held = held_at_reload(monkeypatch)
    apply(made / "adapter", base=str(made / "base"), out=tmp_path / "again")
    whole = sum(tensor.nbytes for tensor in load_file(made / "base" / "model.safetensors").values())
    assert held[0] < 0.5 * whole


@pytest.mark.parametrize("when", ["rebuild", "write_code", "check_reload"])
@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_apply_that_stops_half_way_leaves_nothing(when, what, made, tmp_path, monkeypatch):
    def stop(*given):
        raise what

    monkeypatch.setattr(importlib.import_module("mxdsurgery.checkpoint.apply"), when, stop)
    with pytest.raises(OutputError if isinstance(what, OSError) else KeyboardInterrupt):
        apply(made / "adapter", base=str(made / "base"), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_out_is_a_new_folder_unless_told_otherwise(made, tmp_path, unchecked):
    adapter, base = made / "adapter", str(made / "base")
    with pytest.raises(OutputError, match="is the adapter"):
        apply(adapter, base=base, out=adapter, overwrite=True)
    with pytest.raises(OutputError, match="is the converted model"):
        make_adapter(made / "whole", base=base, out=made / "whole", overwrite=True)
    apply(adapter, base=base, out=tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        apply(adapter, base=base, out=tmp_path / "out")
    apply(adapter, base=base, out=tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_commands_for_converted_models_say_that_it_is_an_adapter(made, tmp_path):
    for command in (load, read_config, evaluate, lambda folder: edit(folder, out=tmp_path / "out", undo=True)):
        with pytest.raises(NotConvertedError, match="is an adapter.*'base'") as refused:
            command(made / "adapter")
        assert "mxdsurgery apply" in refused.value.fix
    for command in (apply, load):
        with pytest.raises(NotConvertedError, match="is a whole model: there is nothing to apply"):
            command(made / "whole", base=str(made / "base"), **({"out": tmp_path / "out"} if command is apply else {}))


def damage_byte(adapter):
    path = adapter / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a weight": (damage_byte, "is missing or differs"),
    "half a file": (
        lambda adapter: (adapter / "adapter.safetensors").write_bytes(b"1234"),
        ".safetensors cannot be read",
    ),
    "no weights": (lambda adapter: (adapter / "adapter.safetensors").unlink(), ".safetensors cannot be read"),
    "a config": (lambda adapter: (adapter / "generation_config.json").write_text("{}"), "generation_config.json would not be"),
    "a tokenizer": (lambda adapter: (adapter / "tokenizer.json").unlink(), "tokenizer.json is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_adapter_is_refused_by_name(what, adapter, made, tmp_path, unchecked):
    break_it, message = DAMAGE[what]
    break_it(adapter)
    with pytest.raises(WeightsError, match=message):
        apply(adapter, base=str(made / "base"), out=tmp_path / "out")
    if "weights" in what or "a weight" in what:
        with pytest.raises(WeightsError, match=message):
            load(adapter, base=str(made / "base"))
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"files": {"../elsewhere": ""}}, "outside the folder"),
        ({"files": {"/etc/elsewhere": ""}}, "outside the folder"),
        ({"files": []}, "cannot be read"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, message, adapter, made, tmp_path):
    values = json.loads((adapter / ADAPTER_FILE).read_text())
    (adapter / ADAPTER_FILE).write_text(json.dumps(values | changes))
    with pytest.raises(NotConvertedError, match=message):
        apply(adapter, base=str(made / "base"), out=tmp_path / "out")


def test_no_code_that_lies_in_an_adapter_is_used_and_other_code_is_told(adapter, made, tmp_path, unchecked):
    values = json.loads((adapter / ADAPTER_FILE).read_text())
    values["files"]["layer.py"] = "0" * 64  # as another version would have written it
    (adapter / ADAPTER_FILE).write_text(json.dumps(values))
    for name in ("layer.py", "modeling_mxd.py"):
        (adapter / name).write_text("raise SystemExit('this code was run')")
    (adapter / "README.md").write_text((adapter / "README.md").read_text() + "More.")
    applied = apply(adapter, base=str(made / "base"), out=tmp_path / "out")
    assert applied["differs"] == ["README.md", "layer.py"]
    assert (tmp_path / "out" / "layer.py").read_bytes() == (made / "whole" / "layer.py").read_bytes()


def test_the_card_says_what_it_is_and_how_to_apply_it(made):
    card, whole = ((made / name / "README.md").read_text() for name in ("adapter", "whole"))
    assert "**This is an adapter.**" in card and 'mxdsurgery apply "this folder" --base "folder of base"' in card
    assert "adapter" not in whole and card.startswith("---\n") and card.count("# llama") == 1
    values = read_adapter(made / "adapter")
    assert str(made) not in card + json.dumps(dataclasses.asdict(values)), "no path of this machine"
    assert values.base_model == "base" and values.model_type == "llama" and values.dtype == "float32"


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_what_writes_a_checkpoint_can_leave_an_adapter_instead(form, made, tmp_path, unchecked):
    with written_as(tmp_path / "out", form, str(made / "base"), None) as folder:
        shutil.copytree(made / "whole", folder, dirs_exist_ok=True)
    if form == "adapter":
        assert contents(tmp_path / "out") == contents(made / "adapter")
    else:
        assert contents(tmp_path / "out") == contents(made / "whole")
    with pytest.raises(ZeroDivisionError), written_as(tmp_path / "other", form, str(made / "base"), None):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
