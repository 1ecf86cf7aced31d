"""``plot`` draws what a run recorded of its training, and says which layer went wrong first."""

import json
import math
import subprocess
import sys

import pytest

from mxdsurgery import plot
from mxdsurgery.errors import DivergedError, MetricsError, OutputError
from mxdsurgery.runs.journal import METRICS_FILE, Journal, Recording
from mxdsurgery.runs.plot import _beginnings, _curves, plot_table, read_metrics
from mxdsurgery.terminal.chart import training_chart
from mxdsurgery.terminal.console import Reporter


def falling(step, lowest=0.03):
    """An NMSE as it falls in a good training."""
    return lowest + math.exp(-step / 60)


def row(step, layers, stage="distil", group=1, **more):
    figures = {name: {"loss": 30 * nmse, "nmse": nmse, "dead_share": step / 10_000} for name, nmse in layers.items()}
    return {"stage": stage, "group": group, "step": step, "tokens": 100 * step, "layers": figures} | more


def written(folder, rows, end=""):
    """A folder with metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(one) + "\n" for one in rows) + end, encoding="utf-8")
    return folder


def good(names, steps=range(20, 421, 20), **more):
    return [row(step, {name: falling(step) for name in names}, **more) for step in steps]


def test_it_draws_png_and_svg_and_says_how_each_layer_ended(tmp_path):
    journal = Journal(written(tmp_path / "demo", []))
    for one in good(["0", "1"]):
        journal.metrics(**one)
    result = plot(tmp_path / "demo")
    png, svg = (tmp_path / "demo" / name for name in ("metrics.png", "metrics.svg"))
    assert result["figures"] == [str(png), str(svg)] and result["looks"] == 21
    assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text().startswith("<?xml")
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [METRICS_FILE, "metrics.png", "metrics.svg"]
    (stretch,) = result["stretches"]
    assert (stretch["stage"], stretch["group"], stretch["step"], stretch["tokens"]) == ("distil", 1, 420, 42_000)
    last = falling(420)
    ended = {"loss": 30 * last, "nmse": last, "dead_share": 0.042, "lowest_nmse": last, "lowest_step": 420}
    assert stretch["layers"] == {"0": ended, "1": ended} and result["went_wrong"] is None
    assert json.loads(json.dumps(result)) == result
    assert len(plot_table(result)) == 1


def test_the_first_layer_whose_nmse_grew_is_named(tmp_path):
    rows = good(["2", "3", "7"], steps=range(20, 401, 20))
    for one in rows:
        one["layers"]["3"]["nmse"] = 0.04 if one["step"] == 240 else 0.9 if one["step"] == 400 else 0.3
        one["layers"]["7"]["nmse"] = 0.01 if one["step"] == 300 else 0.5  # this one later
    result = plot(written(tmp_path, rows))
    assert result["went_wrong"] == "layer 3: NMSE 0.9 at step 400, lowest 0.04 at step 240"
    assert plot_table(result)[-1] == "Went wrong first: layer 3: NMSE 0.9 at step 400, lowest 0.04 at step 240"
    assert "layer 3: NMSE 0.9 at step 400" in (tmp_path / "metrics.svg").read_text()  # the SVG keeps its text in comments


def test_the_first_layer_whose_nmse_is_not_finite_is_named_with_its_group(tmp_path):
    rows = good(["0", "1"], steps=range(20, 101, 20)) + good(["2", "3"], steps=range(20, 101, 20), group=2)
    for one in rows[-2:]:
        one["layers"]["3"]["nmse"] = one["layers"]["3"]["loss"] = None  # as the journal writes NaN
    result = plot(written(tmp_path, rows))
    lowest = f"lowest {falling(60):.3g} at step 60"
    assert result["went_wrong"] == f"distil, group 2: layer 3: NMSE not finite at step 80, {lowest}"
    assert result["stretches"][1]["layers"]["3"]["nmse"] is None


@pytest.mark.parametrize("last", [1.9, 1.0])
def test_an_nmse_that_came_back_or_rose_a_little_is_well(tmp_path, last):
    rows = good(["0"], steps=range(20, 101, 20))
    for one, nmse in zip(rows, [1, 0.1, 0.9, 0.2, 0.1 * last], strict=True):
        one["layers"]["0"]["nmse"] = nmse
    assert plot(written(tmp_path, rows))["went_wrong"] is None


def test_of_a_step_that_was_written_twice_the_last_counts_layer_by_layer(tmp_path):
    rows = [row(20, {"0": 0.5}), row(40, {"0": 0.4, "1": 0.9}), row(20, {"0": 0.6}), row(40, {"1": 0.3})]
    stretches, _ = read_metrics(written(tmp_path, rows) / METRICS_FILE)
    assert [stretch.curve("0", "nmse") for stretch in stretches] == [[(20, 0.6), (40, 0.4)]]
    assert stretches[0].curve("1", "nmse") == [(40, 0.3)]


def test_a_cut_last_line_is_skipped_and_a_broken_one_before_it_refused(tmp_path):
    result = plot(written(tmp_path, good(["0"]), end='{"stage": "distil", "st'))
    assert result["cut_line"] and result["looks"] == 21 and "cut off" in plot_table(result)[-1]
    rows = good(["0"])
    text = (tmp_path / METRICS_FILE).read_text() + "\n" + json.dumps(rows[0]) + "\n"
    (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(MetricsError, match=r"line 22 of .*metrics.jsonl' is no look at a training"):
        plot(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "[]", "1", "null", '"text"', "{}", '{"stage": 1, "step": 1, "tokens": 1}', '{"stage": "a", "step": "1", "tokens": 1}',
        '{"stage": "a", "step": 1, "tokens": null}', '{"stage": "a", "step": 1, "tokens": "many"}',
        '{"stage": "a", "step": 1, "tokens": 1, "layers": [1]}', '{"stage": "a", "step": 1, "tokens": 1, "layers": {"0": 3}}',
        '{"stage": "a", "step": 1, "tokens": 1, "layers": {"0": {"nmse": "x"}}}', "[" * 100_000, "\x00", "\ud800",
        '{"stage": "a", "step": 1, "tokens": 1' + "0" * 5000 + "}", '{"stage": "a", "group": [], "step": 1, "tokens": 1}',
    ],
)  # fmt: skip
def test_any_other_line_is_refused_by_name(line, tmp_path):
    tmp_path.joinpath(METRICS_FILE).write_bytes(
        line.encode("utf-8", "surrogatepass") + b"\n" + json.dumps(row(1, {})).encode()
    )
    with pytest.raises(MetricsError, match="line 1 of"):
        plot(tmp_path)


def test_what_is_not_there_and_what_cannot_be_drawn_is_refused_by_name(tmp_path):
    with pytest.raises(MetricsError, match="holds no metrics.jsonl"):
        plot(tmp_path)
    with pytest.raises(MetricsError, match="is no folder"):
        plot(tmp_path / "none")
    with pytest.raises(MetricsError) as raised:
        plot(tmp_path)
    assert raised.value.fix is None  # it is no model of ours
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(MetricsError, match="an earlier version wrote none"):
        plot(tmp_path)
    for rows, end in ([], '{"sta'), ([{"stage": "heal", "step": 1, "tokens": 5, "layers": {}}], ""):
        with pytest.raises(MetricsError, match="holds no figure of a training"):
            plot(written(tmp_path, rows, end))
    written(tmp_path, good(["0"]))
    with pytest.raises(OutputError, match="neither PNG nor SVG"):
        plot(tmp_path, out=tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        plot(tmp_path, out=tmp_path / "none" / "a.png")


def test_a_folder_that_is_being_written_is_found_by_its_name_or_its_runs(tmp_path):
    run = written(tmp_path / "model.run", good(["0"]))
    for folder in (tmp_path / "model", run):
        result = plot(folder, out=tmp_path / "drawn.svg")
        assert result["metrics"] == str(run / METRICS_FILE)
        assert result["figures"] == [str(tmp_path / "drawn.png"), str(tmp_path / "drawn.svg")]


def test_the_error_that_ended_a_run_is_printed(tmp_path):
    journal = Journal(written(tmp_path, good(["0"])))
    assert plot(tmp_path)["ended_with"] is None
    with pytest.raises(DivergedError), Recording(Reporter(), journal) as reporter:
        reporter.say("distil     on and on")
        raise DivergedError("layer 0: the loss is nan", fix="lower --lr")
    result = plot(tmp_path)
    assert result["ended_with"] == "DivergedError: layer 0: the loss is nan\nto mend: lower lr="
    assert plot_table(result)[-1] == f"The run ended with {result['ended_with']}"
    journal.event("info", "distil", "goes on")
    assert plot(tmp_path)["ended_with"] is None


def test_groups_and_stages_stand_one_after_another(tmp_path):
    steps = [10, 20]
    heal = [
        {name: value for name, value in one.items() if name != "group"} for one in good(["0"], steps, stage="heal", kl=0.5)
    ]
    heal[-1]["validation_kl"] = 0.4
    rows = good(["0"], steps) + good(["1"], steps, group=2) + heal
    stretches, _ = read_metrics(written(tmp_path, rows) / METRICS_FILE)
    assert _beginnings(stretches) == {"distil, group 1": 0, "distil, group 2": 2000, "heal": 4000}
    curves = _curves(stretches)
    tokens = [x for x, y in curves["nmse"]["0"] if not math.isnan(y)]
    assert tokens == [1000, 2000, 5000, 6000] and math.isnan(curves["nmse"]["0"][2][1])
    assert [x for x, _ in curves["nmse"]["1"]] == [3000, 4000, 4000]
    assert curves["kl"]["kl"][:2] == [(5000, 0.5), (6000, 0.5)] and curves["kl"]["validation_kl"][0] == (6000, 0.4)
    described = plot(tmp_path)["stretches"]
    assert [(one["kl"], one["validation_kl"]) for one in described] == [(None, None), (None, None), (0.5, 0.4)]


def chart(names, panels=("loss", "nmse", "dead_share"), **more):
    points = [(0, 1.0), (10, 0.5), (20, math.nan)]
    return training_chart({panel: {name: points for name in names} for panel in panels}, {"distil": 0}, "title", **more)


def colours(figure):
    return [tuple(line.get_color()) for line in figure.axes[0].lines]


def test_few_layers_are_listed_and_many_are_read_off_a_bar():
    few, many = chart([str(layer) for layer in range(6)]), chart([str(layer) for layer in range(32)])
    assert [text.get_text() for text in few.legends[0].get_texts()] == [f"layer {layer}" for layer in range(6)]
    assert len(few.axes) == 3 and len(set(colours(few))) == 6
    assert not many.legends and len(many.axes) == 4 and many.axes[3].get_ylabel() == "layer"
    assert len(set(colours(many))) == 32 and many.axes[3].get_ylim() == (0, 31)


def test_kinds_keep_their_colour_and_more_experts_are_darker():
    names = [f"3 {kind} k{k}" for kind in ("mxd", "transcoder") for k in (16, 64)] + ["3 dense"]
    figure = chart(names)
    light, dark, _, other, dense = colours(figure)
    assert sum(light) > sum(dark) and len({light, dark, other, dense}) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"layer {name}" for name in names]


def test_layers_stand_in_the_order_of_their_numbers(tmp_path):
    rows = [row(1, {name: 0.5 for name in ("10", "9", "3 mxd k128", "3 mxd k16")})]
    assert list(plot(written(tmp_path, rows))["stretches"][0]["layers"]) == ["3 mxd k16", "3 mxd k128", "9", "10"]


def test_the_layer_that_went_wrong_is_drawn_thicker():
    widths = [line.get_linewidth() for line in chart(["0", "1", "2"], marked="1").axes[1].lines]
    assert widths[1] > 2 * widths[0] == 2 * widths[2]


def test_figures_of_nothing_but_zeros_and_of_a_single_look_are_drawn(tmp_path):
    rows = [row(0, {"0": 0.0}), row(20, {"0": 0.0})]
    assert plot(written(tmp_path / "zeros", rows))["looks"] == 2
    assert plot(written(tmp_path / "one", rows[:1]))["looks"] == 1
    assert plot(written(tmp_path / "bare", [{"stage": "heal", "step": 1, "tokens": 5, "kl": 0.1}]))["looks"] == 1
    extremes = row(20, {"$a^$": 1e308, "b": -1e308, "c": 5e-324, "\n$": 0.1}, stage="$heal^$") | {"tokens": 1e300}
    assert plot(written(tmp_path / "$odd^$", [row(1, {"b": 1e308}), extremes]))["looks"] == 2


def test_a_conversion_can_be_drawn(converted, tmp_path):
    result = plot(converted.out, out=tmp_path / "a.png")
    assert list(result["stretches"][0]["layers"]) == ["1", "2"] and result["looks"] >= 2
    last = result["stretches"][0]["layers"]["2"]
    assert 0 < last["nmse"] < 1.5 and last["loss"] > 0 and 0 <= last["dead_share"] <= 1


def test_the_command_prints_the_table_and_where_the_figures_are(tmp_path):
    written(tmp_path, good(["0"]))
    done = subprocess.run([sys.executable, "-m", "mxdsurgery", "plot", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "lowest NMSE" in done.stdout and f"The figures are {tmp_path}/metrics.png and" in done.stdout
