"""scripts/measure/all_layers.py: what it measures, what it concludes from that, and that it prints docs/all-layers.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import all_layers
import pytest
from click.testing import CliRunner
from running import ROOT

import mxdsurgery


def test_docs_all_layers_is_what_its_script_prints():
    command = [sys.executable, str(ROOT / "scripts" / "measure" / "all_layers.py"), "page"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout == (ROOT / "docs" / "all-layers.md").read_text()


def test_every_run_has_a_name_of_its_own_and_a_conversion_stands_before_what_heals_it():
    names = [name for *_, name in all_layers.all_runs()]
    assert len(set(names)) == len(names)
    assert "stories260K-transcoder-original" in names and "stories260K-mxd-original-heal-100k" in names
    for subject, way, name in all_layers.all_runs():
        if way.heals is not None:
            assert names.index(all_layers.run_name(subject, way, way.heals)) < names.index(name)


def test_the_least_share_is_that_of_the_layer_that_has_least():
    layers = [{"expert_share": 0.9, "few_experts_share": 0.6}, {"expert_share": 0.4, "few_experts_share": 0.5}]
    assert all_layers.least_share(layers) == 0.4
    assert all_layers.least_share([*layers, {"expert_share": None, "few_experts_share": None}]) is None


def test_texts_do_not_break_the_table():
    assert all_layers._cell("a|b\n*c* <s>") == "a\\|b⏎ \\*c\\* &lt;s>"


def test_runs_are_made_once_measured_and_printed(shared, tmp_path, monkeypatch):
    def heal(folder, *, out, tokens, reporter):
        shutil.copytree(folder, out)
        path = Path(out) / "evaluation.json"
        record = json.loads(path.read_text()) | {"healed": [{"tokens": tokens, "seconds": 60.0}]}
        path.write_text(json.dumps(record))

    monkeypatch.setattr(mxdsurgery, "heal", heal, raising=False)
    monkeypatch.setattr(all_layers, "KEPT", tmp_path / "kept")
    small = all_layers.Subject("stories260K", "tinystories-train.txt", "tinystories-heldout.txt", 512, ("Once", "The cat"))
    monkeypatch.setattr(all_layers, "SUBJECTS", (small,))
    monkeypatch.setattr(all_layers, "WAYS", tuple(w for w in all_layers.WAYS if w.name in ("original", "original-heal")))
    monkeypatch.setattr(all_layers, "CURVE_WAYS", ())

    def run(only):
        words = ["measure", "--shared", shared, "--runs", tmp_path / "runs", "--tokens", "8k", "--only", only]
        return CliRunner().invoke(all_layers.main, [str(word) for word in words])

    alone = run("stories260K-mxd-original-heal")
    assert alone.exit_code == 1 and "is not there yet" in alone.output
    assert run("stories260K-mxd-original").exit_code == 0
    assert run("continuations").exit_code == 0
    made = tmp_path / "runs" / "stories260K-mxd-original"
    written = (made / "evaluation.json").stat().st_mtime_ns
    assert run("stories260K-mxd-original").exit_code == 0 and (made / "evaluation.json").stat().st_mtime_ns == written

    plain, healed = json.loads((tmp_path / "kept" / "runs.json").read_text())["rows"]
    evaluation = json.loads((made / "evaluation.json").read_text())
    assert plain["delta_ce"] == healed["delta_ce"] == evaluation["all"]["delta_ce"]
    assert plain["tokens"] == evaluation["training"]["tokens"] and healed["tokens"] == plain["tokens"] + 8000
    assert healed["seconds"] == plain["seconds"] + 60 and plain["eval_data"] == "tinystories-heldout.txt"
    grown, same = json.loads((tmp_path / "kept" / "growth.json").read_text()).values()  # healed by a copy
    assert grown["bottom"] == same["bottom"]
    assert grown["bottom"][-1]["delta_ce"] == pytest.approx(plain["delta_ce"], abs=1e-6)
    (texts,) = json.loads((tmp_path / "kept" / "continuations.json").read_text()).values()
    for one in texts["rows"]:
        assert 0 <= one["same"] <= one["of"] == all_layers.NEW_TOKENS
        assert one["same"] <= one["chosen"] <= one["choices"]
        assert (one["original"] == one["converted"]) == (one["same"] == one["of"])
    assert str(shared.parent) not in "".join(path.read_text() for path in (tmp_path / "kept").iterdir())

    shutil.copy(ROOT / "docs" / "all-layers" / "introduction.md", tmp_path / "kept")
    shape = {"D": 64, "H": 160, "N": 64, "layers": 4, "parameters": 2**29, "dtype": "bfloat16"}
    bytes_ = {"peak_bytes": 2**30, "training_bytes": 2**29, "planned_bytes": 2**28, "reload_bytes": 2**31}
    line = {"way": "sequential", "seconds": 90.0, "shape": shape} | bytes_
    (tmp_path / "kept" / "memory.jsonl").write_text(json.dumps(line) + "\n")
    page = CliRunner().invoke(all_layers.main, ["page"]).output
    assert (
        f"{plain['delta_ce']:+.4f}" in page
        and grown["verdict"] in page
        and "| 1 GiB | 100% | 512 MiB | 256 MiB | 2 GiB | 1.5 |" in page
    )
    assert "(bfloat16: 1 GiB; D 64, H 160, N 64)" in page
