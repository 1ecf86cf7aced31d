"""The comparison of kinds and K: one pass, the table, its files, its verdict, and resuming."""

import csv
import importlib
import json
import shutil
from collections import Counter

import pytest
import torch
from click.testing import CliRunner

import mxdsurgery
from mxdsurgery.base.activations import record_activations
from mxdsurgery.cli import main
from mxdsurgery.errors import Interrupted, OutputError, RecipeError
from mxdsurgery.measuring.frontier_table import layer_file, load_layer, read_frontier, remove_frontier, verdict
from mxdsurgery.terminal.chart import frontier_chart
from mxdsurgery.terminal.figures import with_range

SMALL = {"tokens": 12_000, "eval_tokens": 2_000, "expansion": 6, "batch": 1024, "device": "cpu", "shuffle": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier") / "out"
    kinds = ("mxd", "transcoder", "topk-sae", "dense")
    return mxdsurgery.frontier("demo-glu", layer=2, k=(4, 8), kinds=kinds, out=str(out), **SMALL)


def test_every_kind_and_k_has_a_row_with_figures_and_intervals(made):
    named = [(row["layer"], row["kind"], row["k"]) for row in made.rows]
    assert named == [
        *[(2, kind, k) for kind in ("mxd", "transcoder", "topk-sae") for k in (4, 8)],
        (2, "dense", None),
    ]
    for row in made.rows:
        low, high = row["delta_ce_ci"]
        assert low <= row["delta_ce"] <= high and row["kl"] > 0 and 0 < row["nmse"] < 1.5
        assert row["l0"] is None if row["kind"] == "dense" else 0 < row["l0"] <= row["k"]
        assert row["train_tokens"] == 11 * 1024
    assert made.tokens == 15 * 126


def test_kinds_have_about_the_same_parameters_and_their_layers_are_kept(made):
    matched = [row["params"] for row in made.rows if row["kind"] != "dense"]
    assert max(matched) - min(matched) < 2 * 192 + 1 + 2 * 512  # the formula counts biases that the block lacks
    for row in made.rows:
        layer = load_layer(layer_file(made.out, row["layer"], row["kind"], row["k"]))
        assert row["params"] == sum(
            weight.numel() for name, weight in layer.named_parameters() if not name.startswith("block.")
        )


def test_the_files_say_what_was_returned(made):
    read = json.loads((made.out / "frontier.json").read_text())
    assert read["rows"] == made.rows and read["tokens"] == made.tokens and read["verdicts"] == made.verdicts
    with (made.out / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["delta_ce"]) for row in rows] == [row["delta_ce"] for row in made.rows]
    assert [float(row["kl_high"]) for row in rows] == [row["kl_ci"][1] for row in made.rows]
    assert rows[-1]["k"] == "" and (made.out / "frontier.png").read_bytes()[1:4] == b"PNG"
    drawing = (made.out / "frontier.svg").read_text()
    assert drawing.count("<svg") == 1 and len(drawing) > 5000


def test_what_the_experts_can_claim_is_in_the_table_the_csv_and_the_chart(made):
    number, row = next((n, row) for n, row in enumerate(made.rows) if row["few_experts_share"] is not None)
    table = made.table()
    for heading, name in (("beyond a few", "few_experts_share"), ("earned", "earned_share")):
        (column,) = [column for column in table.columns if column.header == heading]
        assert [*column.cells] == [with_range(row, name, ".2f") for row in made.rows] and "[" in [*column.cells][number]
    with (made.out / "frontier.csv").open() as file:
        written = [*csv.DictReader(file)][number]
    for name in ("permuted_share", "shuffled_share", "random_gate_share", "few_experts_share", "earned_share"):
        assert float(written[name]) == row[name] and float(written[f"{name}_high"]) == row[f"{name}_ci"][1]
    drawn = frontier_chart(made.rows, "model", 3.0, made.tokens)
    assert [axes.get_ylabel() for axes in drawn.axes][1:] == ["expert share,\nbeyond a few", "expert share,\nearned"]
    for axes, name in zip(drawn.axes, ("delta_ce", "few_experts_share", "earned_share"), strict=True):
        of_kinds = [[row[name] for row in made.rows if row["kind"] == kind] for kind in ("mxd", "transcoder", "topk-sae")]
        known = [[share for share in shares if share is not None] for shares in of_kinds]
        curves = [one.lines[0].get_ydata().tolist() for one in axes.containers]
        assert [curve for curve in curves if len(curve) > 1] == [shares for shares in known if len(shares) > 1]


def test_the_base_model_runs_once_for_all_of_them(tmp_path, monkeypatch):
    passes = Counter()

    def counted(model, blocks, input_ids):
        passes[tuple(block.layer for block in blocks)] += 1
        return record_activations(model, blocks, input_ids)

    monkeypatch.setattr("mxdsurgery.base.activations.record_activations", counted)
    mxdsurgery.frontier("demo-glu", layer=1, k=(4, 8), kinds=("mxd", "transcoder"), out=str(tmp_path / "out"), **SMALL)
    assert passes == {(1,): 11}


def test_what_is_there_is_kept_and_what_is_new_joins_it(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=("transcoder",), out=str(out), **SMALL)
    kept = layer_file(out, 2, "transcoder", 4).stat().st_mtime_ns
    both = mxdsurgery.frontier("demo-glu", layer=2, k=(4, 8), kinds=("transcoder",), out=str(out), **SMALL)
    assert layer_file(out, 2, "transcoder", 4).stat().st_mtime_ns == kept
    assert [row["k"] for row in both.rows] == [4, 8]
    # Trained beside others or alone, a layer is the same.
    theirs = {(row["kind"], row["k"]): row for row in made.rows}
    assert all(row["delta_ce"] == theirs[row["kind"], row["k"]]["delta_ce"] for row in both.rows)
    other = mxdsurgery.frontier("demo-glu", layer=-1, k=(4,), kinds=("transcoder",), out=str(out), **SMALL)
    assert [(row["layer"], row["k"]) for row in other.rows] == [(2, 4), (2, 8), (3, 4)]
    assert len(other.verdicts) == 2
    monkeypatch.setattr(
        "mxdsurgery.base.model.BaseModel.load_examined",
        lambda *_, **__: pytest.fail("nothing is left to do"),
    )
    assert mxdsurgery.frontier("demo-glu", layer=3, k=(4,), kinds=("transcoder",), out=str(out), **SMALL) == other


def in_turns(monkeypatch):
    """Makes every layer a group of its own, as a memory budget would that only one fits."""
    module = importlib.import_module("mxdsurgery.planning.plan")
    make_groups = module.make_groups

    def alone(layers, *arguments):
        return [group for layer in layers for group in make_groups([layer], *arguments)]

    monkeypatch.setattr(module, "make_groups", alone)


def test_groups_that_take_turns_give_the_same_table(made, tmp_path, monkeypatch):
    in_turns(monkeypatch)
    groups, module = [], importlib.import_module("mxdsurgery.conversion.frontier")
    train_groups = module.train_groups
    monkeypatch.setattr(module, "train_groups", lambda *args, **kept: (groups.append(1), train_groups(*args, **kept)))
    tight = mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=("mxd", "transcoder"), out=str(tmp_path / "out"), **SMALL)
    assert len(groups) == 2
    theirs = {(row["kind"], row["k"]): row["nmse"] for row in made.rows}
    assert {(row["kind"], row["k"]): row["nmse"] for row in tight.rows}.items() <= theirs.items()


def test_ctrl_c_keeps_the_rows_of_finished_groups(tmp_path, monkeypatch):
    out, module = tmp_path / "out", importlib.import_module("mxdsurgery.conversion.frontier")
    train_groups, begun = module.train_groups, []

    def interrupted(*arguments, **kept):
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        train_groups(*arguments, **kept)

    in_turns(monkeypatch)
    monkeypatch.setattr(module, "train_groups", interrupted)
    options = {"layer": 2, "k": (4, 8), "kinds": ("transcoder",), "out": str(out), **SMALL}
    with pytest.raises(Interrupted, match="holds 1 finished rows"):
        mxdsurgery.frontier("demo-glu", **options)
    monkeypatch.setattr(module, "train_groups", train_groups)
    assert [row["k"] for row in mxdsurgery.frontier("demo-glu", **options).rows] == [4, 8]


def test_rows_of_other_settings_are_not_mixed(made):
    with pytest.raises(OutputError, match="other settings: tokens 12000, now 24000"):
        mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=("mxd",), out=str(made.out), **SMALL | {"tokens": 24_000})


def test_a_folder_from_before_a_recipe_key_goes_on_with_its_default(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    kept = json.loads((out / "frontier.json").read_text())
    del kept["settings"]["unit_norm"]
    (out / "frontier.json").write_text(json.dumps(kept))
    ks = tuple(sorted({row["k"] for row in made.rows if row["kind"] == "mxd"}))
    again = mxdsurgery.frontier("demo-glu", layer=2, k=ks, kinds=("mxd",), out=str(out), **SMALL)
    assert again.rows == made.rows  # nothing was trained again
    with pytest.raises(OutputError, match="other settings: unit_norm False, now True"):
        mxdsurgery.frontier("demo-glu", layer=2, k=ks, kinds=("mxd",), out=str(out), **SMALL, unit_norm=True)


def test_begun_anew_only_its_own_files_are_removed(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    (out / "notes.txt").write_text("mine")
    (out / "layers" / "mine.safetensors").write_text("mine")
    remove_frontier(out)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == {"notes.txt", "layers", "layers/mine.safetensors"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds no frontier.json"):
            mxdsurgery.frontier("demo-glu", layer=2, k=(4,), out=str(tmp_path), overwrite=overwrite, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "4,many"], "recipe key 'k' is 'many'"),
        (["--kinds", "mxd,sae"], "recipe key 'kind' is 'sae'"),
        (["--k", "4,0"], "recipe key 'k' is '0'"),
        (["--k", "5000"], "more than the"),
        (["--layer", "9"], "layer"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path):
    words = ["frontier", "demo-glu", "--layer", "2", *words, "--out", str(tmp_path / "out"), "--tokens", "10k"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_is_a_mistake():
    with pytest.raises(RecipeError, match="nothing to compare"):
        mxdsurgery.frontier("demo-glu", layer=2, k=(), **SMALL)


def row(kind, k, loss, half=0.001):
    return {"layer": 0, "kind": kind, "k": k, "delta_ce": loss, "delta_ce_ci": [loss - half, loss + half]}


def test_the_verdict_says_who_wins_where_and_what_cannot_be_told_apart():
    rows = [row("mxd", 16, 0.002), row("transcoder", 16, 0.02), row("mxd", 64, 0.0022), row("transcoder", 64, 0.0021)]
    assert verdict([*rows, row("dense", None, 0.0)]) == (
        "mxd loses the least at K = 16; none loses the least for certain at K = 64. "
        "At K = 16: mxd +0.0020 nats per token, transcoder +0.0200 (10.0 times as much). "
        "At K = 64: transcoder +0.0021 nats per token, mxd +0.0022 (the intervals overlap)."
    )
    assert verdict([row("mxd", 16, 0.1)]) == "there is nothing to compare yet."
    near_zero = verdict([row("mxd", 16, 0.0005), row("transcoder", 16, 0.02)])
    assert "transcoder +0.0200 (more)" in near_zero  # not 40 times as much: mxd's loss may be none
    unsure = [row("mxd", 16, 0.01) | {"delta_ce_ci": None}, row("transcoder", 16, 0.02) | {"delta_ce_ci": None}]
    assert "none loses the least for certain" in verdict(unsure) and "one context" in verdict(unsure)


def test_a_broken_layer_file_is_a_named_error(made, tmp_path):
    path = tmp_path / "layer.safetensors"
    path.write_bytes(layer_file(made.out, 2, "mxd", 4).read_bytes()[:1000])
    with pytest.raises(OutputError, match="cannot be read"):
        load_layer(path)
    assert read_frontier(made.out).rows == made.rows


def test_batch_top_k_trains_and_is_measured(tmp_path):
    made = mxdsurgery.frontier(
        "demo-glu",
        layer=2,
        k=(4,),
        kinds=("mxd", "transcoder"),
        sparsity="batchtopk",
        out=str(tmp_path / "out"),
        **SMALL | {"tokens": 60_000, "batch": 256},  # the threshold follows the steps
    )
    for entry in made.rows:
        assert entry["sparsity"] == "batchtopk" and 2 < entry["l0"] < 10
        layer = load_layer(layer_file(made.out, 2, entry["kind"], 4))
        assert layer.gate.threshold > 0 and torch.isfinite(layer.gate.threshold)
        assert layer.gate.weight.dtype == torch.bfloat16 and layer.gate.threshold != layer.gate.threshold.bfloat16()
