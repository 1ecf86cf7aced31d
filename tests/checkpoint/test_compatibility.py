"""A folder of each format version up to the present one loads and computes what it did; one of a newer version is refused."""

import json
import shutil

import compatibility
import pytest
import torch
from click.testing import CliRunner
from running import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxdsurgery
from mxdsurgery.checkpoint.converted import FORMAT_VERSION, load_with_recipe
from mxdsurgery.errors import NotConvertedError
from mxdsurgery.layers.layer import MxDLayer

FIXTURES = ROOT / "tests" / "fixtures"
FOLDERS = sorted(path for path in FIXTURES.glob("format_*") if path.is_dir())


def stored(folder):
    """Ids and the logits that the model gave when its folder was written."""
    kept = load_file(compatibility.logits_file(folder))
    assert kept["logits"].abs().max() > 1
    return kept["input_ids"], kept["logits"]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def copied(folder, to, **mxd):
    """A copy whose config says something else of its format."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["mxd"] |= mxd
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_small_folder_of_every_version_is_kept():
    versions = [json.loads((folder / "config.json").read_text())["mxd"]["format_version"] for folder in FOLDERS]
    assert [folder.name for folder in FOLDERS] == [f"format_{version}" for version in versions]
    assert set(range(1, FORMAT_VERSION + 1)) == set(versions), "tests/fixtures/make.py writes the one of a version"
    for folder in FOLDERS:
        assert sum(path.stat().st_size for path in folder.rglob("*") if "__pycache__" not in path.parts) < 200 * 1024


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_older_folder_loads_here_with_its_plan_and_recipe(folder):
    ids, logits = stored(folder)
    converted, recipe = load_with_recipe(folder)
    assert recipe.k == 4 and recipe.n_experts == 24 and recipe.kind == "mxd"
    assert list(converted.layers) == [0, 1] and all(isinstance(layer, MxDLayer) for layer in converted.layers.values())
    with torch.no_grad():
        close(mxdsurgery.load(folder).model(ids).logits, logits)
    assert converted.tokenizer()("a b")["input_ids"] == [3, 39, 4]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_plain_transformers_loads_it_with_the_code_that_it_brought(folder):
    ids, logits = stored(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules") and type(model).__name__ == "MxDLlamaForCausalLM"
    with torch.no_grad():
        close(model(ids).logits, logits)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).decode([3, 4]) == "ab"


def test_what_is_made_of_a_folder_of_the_first_version_is_of_this_one(tmp_path):
    mxdsurgery.edit(
        FIXTURES / "format_1", out=str(tmp_path / "edited"), edits=mxdsurgery.edits_from_flags(None, ablate=["0:3"])
    )
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert config["mxd"]["format_version"] == FORMAT_VERSION and len(config["mxd"]["edits"]) == 1
    ids, logits = stored(FIXTURES / "format_1")
    with torch.no_grad():
        difference = (mxdsurgery.load(tmp_path / "edited").model(ids).logits - logits).abs().max()
    assert 0 < difference < 1


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 0, -1, None, "3", "three", [3], {}, 2.5])
def test_a_version_that_is_not_known_is_refused_by_name(version, tmp_path):
    folder = copied(FOLDERS[-1], tmp_path / "other", format_version=version)
    for use in (mxdsurgery.load, mxdsurgery.evaluate, load_with_recipe):
        with pytest.raises(NotConvertedError, match="has format version") as refused:
            use(folder)
        assert refused.value.expected == f"version {FORMAT_VERSION} or older" and refused.value.fix == "upgrade mxdsurgery"


def run(*words):
    result = CliRunner().invoke(compatibility.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_script_compares_in_a_fresh_process_and_says_what_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "built", lambda *_: "only a wheel for another machine can be had")
    words = ("--venvs", tmp_path, "--transformers", "5.17.0", "--torch", "2.9.1")
    here, elsewhere = json.loads(run(*words, FIXTURES / "format_1", "--json"))
    assert here["torch"] == torch.__version__ and here["reason"] is None and here["difference"] < 1e-4 < 1 < here["largest"]
    reason = "could not be installed here: only a wheel for another machine can be had"
    assert elsewhere == {"transformers": "5.17.0", "torch": "2.9.1", "reason": reason}
    assert list(compatibility.table([here, elsewhere]))[-1] == f"| 5.17.0 | 2.9.1 | | | {reason} | | |"


def test_the_script_says_why_a_folder_does_not_load(tmp_path):
    broken = copied(FIXTURES / "format_3", tmp_path / "broken")
    shutil.copy(compatibility.logits_file(FIXTURES / "format_3"), compatibility.logits_file(broken))
    (broken / "modeling_mxd.py").write_text("raise RuntimeError('of another time')")
    (row,) = json.loads(run("--venvs", tmp_path / "venvs", "--transformers", "", broken, "--json"))
    assert row["reason"] == "RuntimeError: of another time" and "difference" not in row
