"""What can be known to be wrong is named before any weights are read, and nothing is left behind."""

import shutil

import pytest
from transformers import PreTrainedModel

import mxdsurgery
from mxdsurgery.editing.judge import Judge
from mxdsurgery.errors import BaseModelError, DataError, JudgeError, OutputError, RecipeError

ONE = mxdsurgery.Edits(steer={1: {3: 1.0}})
NOBODY = Judge("http://127.0.0.1:9", "no-judge", tries=1)
AT_ZERO = {"prompt": "a", "temperature": 0.0, "samples": 2}
FRONTIER = {"layer": 1, "k": [4], "kinds": ["mxd"], "tokens": 4_096, "eval_tokens": 1_000, "n_experts": 64, "device": "cpu"}


@pytest.fixture
def folder(tmp_path, converted, monkeypatch):
    """A converted model in a folder where files stand in the way; its weights cannot be read."""

    def read(*_, **__):
        raise AssertionError("weights were read before that")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    made = tmp_path / "made"
    shutil.copytree(converted.out, made, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "file").write_text("in the way")
    return made


NO_TEXT, NO_BASE, IN_A_FILE = {"data": "missing.txt"}, {"base": "missing/folder/x"}, {"out": "file/out"}
MISTAKES = [
    (mxdsurgery.evaluate, NO_TEXT, DataError),
    (mxdsurgery.evaluate, NO_BASE, BaseModelError),
    (mxdsurgery.evaluate, {"base": "made"}, BaseModelError),
    (mxdsurgery.growth, NO_TEXT, DataError),
    (mxdsurgery.growth, NO_BASE, BaseModelError),
    (mxdsurgery.heal, {"out": "new"} | NO_TEXT, DataError),
    (mxdsurgery.heal, {"out": "new"} | NO_BASE, BaseModelError),
    (mxdsurgery.heal, IN_A_FILE, OutputError),
    (mxdsurgery.probe, NO_TEXT, DataError),
    (mxdsurgery.probe, {"data": "file"} | NO_BASE, BaseModelError),
    (mxdsurgery.dissect, NO_TEXT, DataError),
    (mxdsurgery.dissect, NO_BASE, BaseModelError),
    (mxdsurgery.experts, NO_TEXT, DataError),
    (mxdsurgery.experts, IN_A_FILE, OutputError),
    (mxdsurgery.experts, {"out": "file"}, OutputError),
    (mxdsurgery.coefficients, {"out": "new"} | NO_TEXT, DataError),
    (mxdsurgery.coefficients, IN_A_FILE, OutputError),
    (mxdsurgery.edit, {"out": "new", "edits": ONE} | NO_TEXT, DataError),
    (mxdsurgery.edit, {"edits": ONE} | IN_A_FILE, OutputError),
    (mxdsurgery.effect, {"edits": ONE} | NO_TEXT, DataError),
    (mxdsurgery.sweep, {"layer": 1} | NO_TEXT, DataError),
    (mxdsurgery.generate, AT_ZERO, RecipeError),
    (mxdsurgery.steering, {"edits": ONE} | AT_ZERO, RecipeError),
    (mxdsurgery.steering, {"edits": ONE, "judge": NOBODY}, JudgeError),
    (mxdsurgery.steering, {"edits": ONE} | NO_BASE, BaseModelError),
]


@pytest.mark.parametrize(("function", "options", "error"), MISTAKES)
def test_a_mistake_is_named_before_weights_are_read(function, options, error, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(error):
        function(folder, **options)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize(
    ("function", "options", "kept"),
    [
        (mxdsurgery.evaluate, {}, "evaluation.json/x"),
        (mxdsurgery.probe, {"data": "made/recipe.yaml"}, "probing"),
        (mxdsurgery.dissect, {}, "dissection"),
        (mxdsurgery.sweep, {"layer": 1}, "effects"),
    ],
)
def test_what_a_result_could_not_be_kept_in_is_named_before(function, options, kept, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/" in kept:
        (folder / "evaluation.json").unlink()
        (folder / "evaluation.json").mkdir()
    else:
        if (folder / kept).is_dir():  # of another test
            shutil.rmtree(folder / kept)
        (folder / kept).write_text("a file of this name")
    with pytest.raises(OutputError, match="cannot be written"):
        function(folder, **options)


def test_a_frontier_s_folder_is_tried_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mxdsurgery.conversion.frontier.with_time", lambda *_: pytest.fail("the machine was measured"))
    with pytest.raises(OutputError, match="cannot be written"):
        mxdsurgery.frontier("demo-glu", out=str(tmp_path / "file" / "out"), **FRONTIER)
    with pytest.raises(OutputError, match="that can be read"):
        mxdsurgery.frontier("demo-glu", out=str(tmp_path / "file"), **FRONTIER)
    (tmp_path / "out.run" / "checkpoints" / "step-4").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds an unfinished run"):
        mxdsurgery.frontier("demo-glu", out=str(tmp_path / "out"), **FRONTIER)
    monkeypatch.setattr("mxdsurgery.checkpoint.writing.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OutputError, match="of disk while it is written"):
        mxdsurgery.frontier("demo-glu", out=str(tmp_path / "new"), **FRONTIER)
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_what_experts_keep_and_what_is_written_is_known_to_have_room_before_the_text_is_read(converted, tmp_path, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the text was run through the model")

    for name in ("experts.read_corpus", "coefficients._read"):
        monkeypatch.setattr(f"mxdsurgery.catalogue.{name}", read)
    with monkeypatch.context() as small:
        small.setattr("mxdsurgery.catalogue.experts.free_memory", lambda _: 1_000)
        with pytest.raises(mxdsurgery.errors.MemoryBudgetError, match="experts takes"):
            mxdsurgery.experts(converted.out, out=tmp_path / "catalogue")
    monkeypatch.setattr("mxdsurgery.checkpoint.writing.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    for write in (mxdsurgery.experts, mxdsurgery.coefficients):
        with pytest.raises(OutputError, match="of disk while it is written"):
            write(converted.out, out=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_s_checkpoint_is_known_to_have_room_before_its_base_is_read(converted, tmp_path, monkeypatch):
    mxdsurgery.make_adapter(converted.out, out=tmp_path / "adapter")
    monkeypatch.setattr("mxdsurgery.checkpoint.apply.right_base", lambda *_: pytest.fail("the base model was read"))
    monkeypatch.setattr("mxdsurgery.checkpoint.writing.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OutputError, match="of disk while it is written"):
        mxdsurgery.apply(tmp_path / "adapter", out=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_base_of_an_adapter_is_looked_for_before_edits_are_compared(converted, tmp_path, monkeypatch):
    made = tmp_path / "made"
    shutil.copytree(converted.out, made)
    plan = made / "plan.json"
    plan.write_text(plan.read_text().replace('"model": "demo-glu"', '"model": "missing/folder/x"'))
    monkeypatch.setattr("mxdsurgery.editing.edit._compared", lambda *_: pytest.fail("the models were compared"))
    with pytest.raises(BaseModelError, match="base model is needed"):
        mxdsurgery.edit(made, out=tmp_path / "new", edits=ONE, format="adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
