"""Edits in the weights: they do what the same edits do live, they travel with the folder, and they can be undone."""

import dataclasses
import filecmp
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from running import held_at_reload, watch_models, without_reloads
from safetensors.torch import load_file
from tiny import IDS, RECIPE, export_tiny
from transformers import AutoModelForCausalLM

from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.checkpoint.converted import fingerprint, load, load_with_recipe
from mxdsurgery.cli import main
from mxdsurgery.editing.baking import baked, changes, in_weights
from mxdsurgery.editing.edit import edit, edit_table
from mxdsurgery.editing.edits import KINDS, Edits, check_for, edits_from, edits_from_flags, read_edits
from mxdsurgery.editing.sampling import Sampling, sample
from mxdsurgery.errors import EditError, NotConvertedError, OutputError
from mxdsurgery.measuring.evaluate import evaluate
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.measuring.intervals import Table, next_token_sums
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.text.packing import in_batches

ROW = [0.25, -0.5] * 96  # D of the demo model
ONE_OF_EACH = {
    "ablate": [3, 4],
    "drop": [5],
    "scale": {6: -2.5},
    "steer": {7: 3.0, 8: -1.0},
    "replace": {9: ROW},
    "copy": {10: 11},
    "merge": [[12, 13], [14, 15, 16]],
}


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """The converted demo model, without what other tests found out about it."""
    out = tmp_path_factory.mktemp("edits") / "demo"
    out.mkdir()
    for path in Path(converted.recipe.out).iterdir():
        if path.is_file():
            shutil.copy2(path, out)
    return out


def ids_of(folder):
    tokenizer = load(folder).tokenizer()
    return tokenizer("import os\n\n\ndef main(argv=None):\n    return os.path.join('a', argv)\n" * 3, return_tensors="pt")[
        "input_ids"
    ]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def bake(model, edits):
    """Puts edits in the layers of a model in memory, as `edit` does in a folder."""
    for layer in edits.layers:
        module = model.mxd.layers[layer]
        for name, tensor in baked(edits, layer, module.experts.weight, module.gate.bias, module.experts.bias).items():
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "clamp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("layers", ["mxd", "transcoder"])
def test_live_and_baked_edits_give_equal_logits(family, kind, layers, tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    export_tiny(family, tmp_path / "out", recipe=dataclasses.replace(RECIPE, kind=layers))
    model = load(tmp_path / "out").model
    what = [[0.25, -0.5] * 16] if kind == "replace" else None
    given = {9: what[0]} if what else ONE_OF_EACH[kind]
    edits = edits_from({"layers": {0: {kind: given}, 1: {kind: given}}}, "here")
    before = logits(model, IDS)
    with edits.live(model):
        live = logits(model, IDS)
    assert torch.equal(logits(model, IDS), before)
    bake(model, edits)
    torch.testing.assert_close(logits(model, IDS), live, rtol=1e-4, atol=1e-5)


def test_every_kind_of_edit_in_a_folder_is_what_it_is_live(folder, tmp_path, whole_reloads):
    ids, out = ids_of(folder), tmp_path / "edited"
    edits = edits_from({"layers": {1: ONE_OF_EACH, 2: {"steer": {0: 5.0}}}}, "here")
    result = edit(folder, out=out, edits=edits)
    model = load(folder, dtype="float32").model
    with edits.live(model):
        live = logits(model, ids)
    for changed in (load(out, dtype="float32").model, plain(out, dtype=torch.float32)):
        # Scaled and merged experts are stored in bf16 in the folder; rarely, that lets another expert in.
        near = torch.isclose(logits(changed, ids), live, rtol=0.02, atol=0.05).all(-1)
        assert near.double().mean() > 0.95
        assert (logits(changed, ids) - logits(model, ids)).abs().max() > 1
    assert read_edits(out / "edits" / "1" / "edits.yaml") == dataclasses.replace(edits, model=fingerprint(load(folder)))
    assert result["ce_after"] != result["ce_before"] and result["kl"] > 0 and result["tokens"] > 800
    config = json.loads((out / "config.json").read_text())["mxd"]
    assert config["edits"][0]["edits"] == result["edits"] == edits.words()
    assert [entry["shape"].get("expert_bias", False) for entry in config["layers"]] == [True, True]
    card = (out / "README.md").read_text()
    assert "layer 1: merge 12+13, 14+15+16" in card and "Before the last edit above" in card
    assert f"went from {result['ce_before']:.4f} to {result['ce_after']:.4f}" in card
    assert repr(result["samples"][0]["after"]) in card
    assert edit_table(result)


def test_measured_anew_the_card_speaks_of_the_edited_model(folder, tmp_path):
    edit(folder, out=tmp_path / "edited", edits=edits_from_flags(ablate="1:3"), tokens=500)
    assert "Before the last edit above" in (tmp_path / "edited" / "README.md").read_text()
    assert evaluate(tmp_path / "edited", tokens=500)["edits"] == 1
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "Before the last edit above" not in card and "layer 1: ablate 3" in card


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_figures_are_those_of_the_two_folders_loaded_side_by_side(folder, tmp_path, monkeypatch, compute):
    without_reloads(monkeypatch)
    edits = edits_from({"layers": {1: ONE_OF_EACH, 2: {"steer": {0: 5.0}}}}, "here")
    result = edit(folder, out=tmp_path / "edited", edits=edits, tokens=1000, compute=compute)
    before, recipe = load_with_recipe(folder, compute=compute)
    after = load_with_recipe(tmp_path / "edited", compute=compute)[0]
    ids, table = held_out(before, recipe, tokens=1000), Table()
    for part in in_batches(ids, recipe.batch):
        old, new = logits(before.model, part), logits(after.model, part)
        table.add("before", next_token_sums(old, old, part))
        table.add("after", next_token_sums(new, old, part))
    sums = table.columns()
    for name, column in (("ce_before", "before.ce"), ("ce_after", "after.ce"), ("kl", "after.kl")):
        assert result[name] == sums[column].sum().item() / result["tokens"]
    tokenizer, one = before.tokenizer(), result["samples"][0]
    for said, model in (("before", before.model), ("after", after.model)):
        written = sample(model, tokenizer, ids[:1, :24], Sampling(32, temperature=0))[0, 24:]
        assert one[said] == tokenizer.decode(written, skip_special_tokens=True)


def test_changes_are_in_the_weights_for_a_while_only(folder):
    converted = load(folder)
    compute_in(converted.model, torch.float32)
    state = {name: tensor.clone() for name, tensor in converted.model.state_dict().items()}
    made = changes(converted, edits_from({"layers": {1: ONE_OF_EACH}}, "here"))
    parts = [part for change in made for part in (change.old, change.new) if part is not None]
    held = sum(tensor.nbytes for part in parts for tensor in part)
    assert held < 0.1 * converted.layers[1].experts.weight.nbytes  # 14 of 256 rows of C, in bfloat16
    with pytest.raises(KeyboardInterrupt), in_weights(made):
        assert converted.layers[1].experts.weight[3].abs().sum() == 0
        assert converted.layers[1].experts.bias.dtype == torch.float32
        raise KeyboardInterrupt
    again = converted.model.state_dict()
    assert again.keys() == state.keys() and all(again[name].equal(state[name]) for name in state)


def test_one_model_is_held_and_none_while_what_was_written_is_loaded_elsewhere(folder, tmp_path, monkeypatch):
    made, held = watch_models(monkeypatch), held_at_reload(monkeypatch)
    edit(folder, out=tmp_path / "edited", edits=edits_from_flags(ablate="1:3", steer="1:4=2"), tokens=500)
    edit(tmp_path / "edited", out=tmp_path / "undone", undo=True)
    assert len(made) == 1 and len(held) == 1 and held[0] < 2**20  # the logits to compare with


def test_ablating_for_good_gives_bit_for_bit_the_live_logits(folder, tmp_path):
    ids = ids_of(folder)
    edits = edits_from_flags(ablate="1:3,2:200", drop=["2:7"])
    edit(folder, out=tmp_path / "edited", edits=edits)
    for dtype in ("bfloat16", "float32"):
        model = load(folder, dtype=dtype).model
        with edits.live(model):
            live = logits(model, ids)
        assert torch.equal(logits(load(tmp_path / "edited", dtype=dtype).model, ids), live)


def same_files(one, other):
    found = filecmp.dircmp(one, other, ignore=["metrics.jsonl"])  # of the training, not of the model
    differ = [name for name in found.common_files if not filecmp.cmp(f"{one}/{name}", f"{other}/{name}", shallow=False)]
    assert not (found.left_only or found.right_only or differ), (found.left_only, found.right_only, differ)
    for sub in found.common_dirs:
        same_files(f"{one}/{sub}", f"{other}/{sub}")


def test_edits_are_taken_back_bit_for_bit_one_after_the_other(folder, tmp_path):
    first = edits_from({"layers": {1: ONE_OF_EACH}}, "here")
    edit(folder, out=tmp_path / "1", edits=first)
    edit(tmp_path / "1", out=tmp_path / "2", edits=edits_from_flags(steer="1:9=2", scale="2:0=0.5"))
    assert len(json.loads((tmp_path / "2" / "config.json").read_text())["mxd"]["edits"]) == 2
    assert edit(tmp_path / "2", out=tmp_path / "3", undo=True)["undone"] == [
        "layer 1: steer 9 by 2",
        "layer 2: scale 0 by 0.5",
    ]
    same_files(tmp_path / "1", tmp_path / "3")
    edit(tmp_path / "3", out=tmp_path / "4", undo=True)
    same_files(folder, tmp_path / "4")
    with pytest.raises(EditError, match="holds no edit to take back"):
        edit(tmp_path / "4", out=tmp_path / "5", undo=True)
    assert not (tmp_path / "5").exists()


def test_an_altered_folder_is_not_called_restored(folder, tmp_path):
    edit(folder, out=tmp_path / "1", edits=edits_from_flags(ablate="1:3"))
    model = plain(tmp_path / "1")
    with torch.no_grad():
        model.mxd.layers[1].experts.weight[50] += 1
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / "1")
    with pytest.raises(EditError, match="weights are not those it was made from"):
        edit(tmp_path / "1", out=tmp_path / "2", undo=True)
    assert not (tmp_path / "2").exists()


def test_edits_survive_saving_and_sharding_by_plain_transformers(folder, tmp_path):
    ids = ids_of(folder)
    edit(folder, out=tmp_path / "edited", edits=edits_from({"layers": {1: ONE_OF_EACH}}, "here"))
    model = plain(tmp_path / "edited")
    model.save_pretrained(tmp_path / "again", max_shard_size="1MB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(plain(tmp_path / "again"), ids), logits(model, ids))


def test_sharded_weights_are_edited_and_taken_back(folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "model.safetensors").unlink()
    load(folder).model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    for path in (tmp_path / "saved").glob("model*"):
        shutil.copy(path, sharded)
    edits = edits_from({"layers": {1: ONE_OF_EACH, 2: {"steer": {0: 5.0}}}}, "here")
    edit(sharded, out=tmp_path / "edited", edits=edits)
    edit(folder, out=tmp_path / "whole", edits=edits)
    ids = ids_of(folder)
    assert torch.equal(logits(plain(tmp_path / "edited"), ids), logits(plain(tmp_path / "whole"), ids))
    index = json.loads((tmp_path / "edited" / "model.safetensors.index.json").read_text())
    sizes = [
        sum(t.nbytes for t in load_file(tmp_path / "edited" / name).values()) for name in set(index["weight_map"].values())
    ]
    assert index["metadata"]["total_size"] == sum(sizes)
    edit(tmp_path / "edited", out=tmp_path / "back", undo=True)
    same_files(sharded, tmp_path / "back")


def test_an_edit_file_of_another_model_is_refused(folder, tmp_path):
    converted = load(folder)
    mine, other = Edits(ablate={1: [3]}, model=fingerprint(converted)), Edits(ablate={1: [3]}, model="0123456789abcdef")
    check_for(mine, converted)
    path = tmp_path / "edits.yaml"
    path.write_text(other.to_yaml())
    assert read_edits(path) == other
    result = CliRunner().invoke(main, ["edit", str(folder), "--edits", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "0123456789abcdef" in result.output and fingerprint(converted) in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edits.yaml"]


def test_the_fingerprint_is_of_the_conversion_not_of_its_edits_or_dtype(folder, tmp_path):
    edit(folder, out=tmp_path / "edited", edits=edits_from({"layers": {1: ONE_OF_EACH}}, "here"))
    assert fingerprint(load(folder)) == fingerprint(load(folder, dtype="float32")) == fingerprint(load(tmp_path / "edited"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "not a mapping with the keys 'layers'"),
        ("layers: {1: {ablate: [1]}}\nmore: 2", "not a mapping with the keys 'layers'"),
        ("layers: {1: {explode: [1]}}", "no edit is named 'explode'"),
        ("layers: {one: {ablate: [1]}}", "a layer's number"),
        ("layers: {1: {ablate: [x]}}", "a list of experts"),
        ("layers: {1: {ablate: [-1]}}", "a list of experts"),
        ("layers: {1: {ablate: []}}", "a list of experts"),
        ("layers: {1: {scale: {3: .nan}}}", "a finite number for each"),
        ("layers: {1: {steer: {3: .inf}}}", "a finite number for each"),
        ("layers: {1: {scale: [3]}}", "a finite number for each"),
        ("layers: {1: {replace: {3: [1, .nan]}}}", "D finite numbers"),
        ("layers: {1: {replace: {3: [1, 2]}}}", "expected 192 finite ones"),
        ("layers: {1: {merge: [[3]]}}", "two experts or more"),
        ("layers: {1: {copy: {3: 256}}}", "no expert 256; expected 0 to 255"),
        ("layers: {1: {ablate: [256]}}", "no expert 256; expected 0 to 255"),
        ("layers: {0: {ablate: [1]}}", "layer 0 has no experts; layers that have: 1, 2"),
        ("layers: {1: {ablate: [3], scale: {3: 2.0}}}", "named twice"),
        ("layers: {1: {ablate: [3], copy: {4: 3}}}", "named twice"),
        ("layers: {1: {clamp: {3: 2.0}}}", "clamp cannot stand in the weights"),
        ("model: 7\nlayers: {1: {ablate: [3]}}", "a fingerprint"),
        ("layers: {1: {ablate: [1]", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_bad_edit_files_are_refused_by_name_and_nothing_is_written(folder, tmp_path, text, said):
    path = tmp_path / "edits.yaml"
    path.write_text(text)
    result = CliRunner().invoke(main, ["edit", str(folder), "--edits", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.output.startswith("EditError: "), result.output
    assert said in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edits.yaml"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no edits were given"),
        (["--ablate", "1"], "LAYER:EXPERT, several between commas"),
        (["--ablate", "1:3=2"], "LAYER:EXPERT, several between commas"),
        (["--scale", "1:3"], "LAYER:EXPERT=NUMBER"),
        (["--scale", "1:3=nan"], "LAYER:EXPERT=NUMBER"),
        (["--scale", "1:3=2,1:3=4"], "two numbers to scale"),
        (["--ablate", "1:3", "--steer", "1:3=1"], "named twice"),
        (["--ablate", "9:3"], "layer 9 has no experts"),
    ],
)
def test_bad_flags_are_refused_by_name(folder, tmp_path, flags, said):
    result = CliRunner().invoke(main, ["edit", str(folder), *flags, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output
    assert not list(tmp_path.iterdir())


def test_a_file_and_flags_join(tmp_path):
    path = tmp_path / "edits.yaml"
    path.write_text(yaml.safe_dump({"layers": {1: {"ablate": [3]}}}))
    made = edits_from_flags(path, ablate=["1:4", "2:5, 2:6"], steer="1:8=-2")
    assert made == Edits(ablate={1: [3, 4], 2: [5, 6]}, steer={1: {8: -2.0}})
    assert made.with_experts(lambda layer, expert: 100 * layer + expert).ablate == {1: [103, 104], 2: [205, 206]}
    assert edits_from(yaml.safe_load(made.to_yaml()), "here") == made


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ('{"layers": {"0": {"ablate": [3]}}}', Edits(ablate={0: [3]})),  # as json.dump writes it
        ('layers:\n  "0":\n    ablate: 3', Edits(ablate={0: [3]})),
        ("layers: {'1': {drop: '7', ablate: ['3', 4]}}", Edits(drop={1: [7]}, ablate={1: [3, 4]})),
        ('{"layers": {"1": {"scale": {"6": 1e-05, "7": "2"}}}}', Edits(scale={1: {6: 1e-5, 7: 2.0}})),
        ("layers: {1: {copy: {'10': '11'}, merge: [['12', 13]]}}", Edits(copy={1: {10: 11}}, merge={1: [[12, 13]]})),
        ("layers: {1: {replace: {'9': ['0.5', 1e-3]}}}", Edits(replace={1: {9: [0.5, 1e-3]}})),
        ("layers: {010: {ablate: [012]}}", Edits(ablate={10: [12]})),  # no octal numbers
    ],
)
def test_numbers_as_text_are_numbers(tmp_path, text, made):
    (tmp_path / "edits").write_text(text)
    assert read_edits(tmp_path / "edits") == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: {1: {ablate: [1]}, '1': {ablate: [2]}}", "layer 1 stands twice"),
        ("layers: {1: {scale: {3: 1, '3': 2}}}", "a finite number for each"),
        ("layers: {'1.0': {ablate: [1]}}", "a layer's number"),
        ("layers: {1: {ablate: ['-1']}}", "a list of experts"),
        ("layers: {1: {ablate: [true]}}", "a list of experts"),
        ("layers: {1: {scale: {3: 'nan'}}}", "a finite number for each"),
        ("layers: {1: {scale: {3: '1e99'}}}", "a finite number for each"),
    ],
)
def test_text_that_is_no_number_is_none(tmp_path, text, said):
    (tmp_path / "edits").write_text(text)
    with pytest.raises(EditError, match=said):
        read_edits(tmp_path / "edits")


@pytest.fixture
def elsewhere(folder, tmp_path):
    """The folder on a machine that does not have its text."""
    shutil.copytree(folder, tmp_path / "elsewhere")
    recipe = tmp_path / "elsewhere" / "recipe.yaml"
    changed = [re.sub("^((eval_)?data): .*", r"\1: /data/corpus/train.jsonl", line) for line in recipe.read_text().split("\n")]
    recipe.write_text("\n".join(changed))
    return tmp_path / "elsewhere"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        ["evaluate", "--growth"],
        ["effect", "--ablate", "1:3"],
        ["coefficients", "--out", "out"],
        ["experts"],
        ["heal", "--out", "out"],
        ["edit", "--ablate", "1:3", "--out", "out", "--tokens", "1k"],
    ],
)
def test_a_text_that_is_on_another_machine_is_the_recipes_and_another_can_be_given(elsewhere, monkeypatch, command):
    monkeypatch.chdir(elsewhere.parent)
    result = CliRunner().invoke(main, [command[0], str(elsewhere), *command[1:]])
    assert result.exit_code == 2, result.output
    found, *_, fix = result.output.strip().splitlines()[-3:]
    named = f"that is the text which the recipe in {str(elsewhere)!r} names"
    assert found.endswith(f"no text file '/data/corpus/train.jsonl'; {named}")
    assert fix == "to mend: give another text with --data"
    assert [path.name for path in elsewhere.parent.iterdir()] == ["elsewhere"]


def test_what_was_trained_on_need_not_be_there_to_measure(folder, elsewhere):
    recipe = Recipe(**load_recipe(folder / "recipe.yaml"))
    assert recipe.eval_data == "stdlib:heldout"
    gone = dataclasses.replace(recipe, data="/data/corpus/train.jsonl")
    assert held_out(load(elsewhere), gone).equal(held_out(load(folder), recipe))


def test_an_edit_needs_no_text(elsewhere, tmp_path):
    result = edit(elsewhere, out=tmp_path / "out", edits=Edits(ablate={1: [3]}))
    assert "/data/corpus/train.jsonl" in result["unmeasured"] and "delta_ce" not in result and "data" not in result
    assert "not measured: no text file" in str(edit_table(result)[0])
    measured = edit(elsewhere, out=tmp_path / "measured", edits=Edits(ablate={1: [3]}), data="stdlib", tokens=1000)
    assert "unmeasured" not in measured and "delta_ce" in measured
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "measured")]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    config = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(config)["mxd"]["edits"] == [{"edits": ["layer 1: ablate 3"]}] and "/data/corpus" not in config
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- layer 1: ablate 3" in card and "What this changed was not measured" in card
    edit(tmp_path / "out", out=tmp_path / "back", undo=True)
    same_files(elsewhere, tmp_path / "back")


def test_the_folder_that_is_edited_is_never_written_to(folder, tmp_path):
    with pytest.raises(OutputError, match="is the folder to edit"):
        edit(folder, out=folder, edits=edits_from_flags(ablate="1:3"), overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        edit(folder, out=tmp_path / "there", edits=edits_from_flags(ablate="1:3"))
    with pytest.raises(NotConvertedError):
        edit(tmp_path / "there", out=tmp_path / "out", edits=edits_from_flags(ablate="1:3"))
