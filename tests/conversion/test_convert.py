"""The main job from end to end, as a library and as a command, on the embedded demo model."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from running import ROOT, held_at_reload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mxdsurgery
from mxdsurgery.aside import MARKER
from mxdsurgery.cli import main
from mxdsurgery.errors import BaseModelError, DataError, OutputError
from mxdsurgery.planning.plan import read_plan
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.terminal.console import duration


def test_a_conversion_leaves_a_folder_that_plain_transformers_runs(converted):
    model = AutoModelForCausalLM.from_pretrained(converted.out, trust_remote_code=True)
    layers = model.model.layers
    assert [type(layer.mlp).__name__ for layer in layers] == ["LlamaMLP", "MxDLayer", "MxDLayer", "LlamaMLP"]
    assert [entry["layer"] for entry in converted.evaluation["layers"]] == [1, 2]
    assert converted.evaluation["all"]["nmse"] < 1.0


def test_the_saved_recipe_makes_the_same_weights_again(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("mxdsurgery.text.sources.VALIDATION_TOKENS", 8_192)  # as it was for the first
    again = mxdsurgery.convert("demo-glu", recipe=converted.out / "recipe.yaml", out=str(tmp_path / "again"))
    first = mxdsurgery.load(converted.out).model.state_dict()
    second = mxdsurgery.load(again.out).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.evaluation["all"] == converted.evaluation["all"]
    assert again.evaluation == json.loads((again.out / "evaluation.json").read_text())
    assert again.plan == read_plan(again.out / "plan.json")
    assert again.recipe == Recipe(**load_recipe(again.out / "recipe.yaml"))


def test_evaluate_measures_the_folder_as_convert_did_and_takes_another_text(converted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted.out, folder)
    again = mxdsurgery.evaluate(folder)
    assert again == converted.evaluation
    text = tmp_path / "other.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    other = mxdsurgery.evaluate(folder, data=str(text), tokens=500)
    assert other["data"] == str(text) and other["tokens"] != again["tokens"]
    assert json.loads((folder / "evaluation.json").read_text()) == other
    assert f"Measured on {other['tokens']:,} held-out tokens" in (folder / "README.md").read_text()


def test_single_layers_can_be_measured_on_fewer_tokens_and_every_row_says_on_how_many(converted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted.out, folder)
    done = CliRunner().invoke(main, ["evaluate", str(folder), "--tokens-single", "1280"])
    assert done.exit_code == 0 and "each layer alone on 1,260 of them" in done.output
    fewer, every = json.loads((folder / "evaluation.json").read_text()), converted.evaluation
    assert fewer["all"] == every["all"] and fewer["tokens"] == every["tokens"] == 31 * 126
    assert [entry["tokens"] for entry in fewer["layers"]] == [10 * 126] * 2
    assert [entry["tokens"] for entry in every["layers"]] == [31 * 126] * 2  # fewer than 8k: all of them
    assert converted.plan.eval_tokens_single == 31 * 128
    rests_on = "position 0 left out), each layer alone on 1,260 of them, computed in float32, against"
    assert rests_on in (folder / "README.md").read_text()
    assert "each layer alone" not in (converted.out / "README.md").read_text()
    refused = CliRunner().invoke(main, ["evaluate", str(folder), "--tokens-single", "1280", "--growth"])
    assert refused.exit_code == 2 and "--tokens-single does not go with --growth" in refused.output


@pytest.mark.parametrize(
    "where", ["measuring.fidelity.prediction_sums", "checkpoint.export.model_card", "checkpoint.export.write_json"]
)
def test_an_interrupted_evaluation_leaves_the_folder_as_it_was(converted, tmp_path, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "copy"
    shutil.copytree(converted.out, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(f"mxdsurgery.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mxdsurgery.evaluate(folder, tokens=300)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_resumed_run_measures_single_layers_on_as_many_tokens_as_it_had_chosen(tmp_path, monkeypatch):
    options = {"layers": "0-1", "tokens": 5_000, "eval_tokens": 1_000, "n_experts": 64, "k": 4, "device": "cpu"}
    options |= {"shuffle": 20_000, "out": str(tmp_path / "out")}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mxdsurgery.planning.effort.fewest_contexts_alone", lambda *_: 4)
    monkeypatch.setattr("mxdsurgery.conversion.convert.EVALUATION_SHARE", 0.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="A checkpoint of step 19 is in"):
        patched.setattr("mxdsurgery.measuring.fidelity.Measurement.run", interrupted)
        mxdsurgery.convert("demo-glu", **options)
    monkeypatch.setattr("mxdsurgery.planning.effort.fewest_contexts_alone", lambda *_: 2)  # as if there were less time
    made = mxdsurgery.convert("demo-glu", **options, resume=True)
    assert [entry["tokens"] for entry in made.evaluation["layers"]] == [4 * 126] * 2
    assert made.plan.eval_tokens_single == 4 * 128
    again = mxdsurgery.evaluate(made.out)
    assert [entry["tokens"] for entry in again["layers"]] == [4 * 126] * 2


def test_evaluate_does_not_reach_into_the_text_that_was_trained_on(tmp_path):
    out = str(tmp_path / "out")
    options = {"layers": "0", "tokens": 2_500, "eval_tokens": 500, "n_experts": 64, "k": 4, "shuffle": 20_000}
    made = mxdsurgery.convert("demo-glu", data="stdlib:train", out=out, **options)
    assert mxdsurgery.evaluate(out, tokens=300)["tokens"] < made.evaluation["tokens"]
    with pytest.raises(DataError, match="only the first 500 of 'stdlib:train' were held out"):
        mxdsurgery.evaluate(out, tokens=700)
    assert mxdsurgery.evaluate(out, data="stdlib:heldout", tokens=700)["tokens"] > made.evaluation["tokens"]


def test_a_folder_named_as_a_text_does_not_take_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()
    _, recipe = mxdsurgery.plan("demo-glu", data="stdlib")
    assert recipe.data == "stdlib"


def test_evaluate_refuses_another_base_model(converted):
    with pytest.raises(BaseModelError, match="demo-mlp"):
        mxdsurgery.evaluate(converted.out, base="demo-mlp")


def test_generate_continues_the_prompt_and_repeats_itself_with_the_same_seed(converted):
    first = mxdsurgery.generate(converted.out, prompt="import os\n", max_new_tokens=12, samples=2)
    assert len(first) == 2 and all(text.startswith("import os\n") and len(text) > 10 for text in first)
    assert mxdsurgery.generate(converted.out, prompt="import os\n", max_new_tokens=12, samples=2) == first
    assert mxdsurgery.generate(converted.out, prompt="import os\n", max_new_tokens=12, seed=1) != first[:1]


@pytest.mark.parametrize("model", ["demo-glu", "demo-mlp"])
def test_analyze_and_plan_print_tables_and_json(model):
    for command in (["analyze", model], ["plan", model, "--no-measure"]):
        table = CliRunner().invoke(main, command)
        assert table.exit_code == 0 and model in table.output
        parsed = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
        assert len(parsed["layers"]) == 4


def test_the_commands_do_what_the_functions_do(tmp_path, whole_reloads):
    out = tmp_path / "out"
    options = "--layers -1 --tokens 5k --eval-tokens 500 --n-experts 64 --k 4 --shuffle 20k --out".split()
    made = CliRunner().invoke(main, ["convert", "demo-mlp", *options, str(out)])
    assert made.exit_code == 0, made.output
    assert "expert share" in made.output and str(out) in made.output
    measured = CliRunner().invoke(main, ["evaluate", str(out), "--json"])
    assert json.loads(measured.stdout)["all"] == json.loads((out / "evaluation.json").read_text())["all"]
    spoken = CliRunner().invoke(main, ["generate", str(out), "--prompt", "import", "--max-new-tokens", "5"])
    assert spoken.exit_code == 0 and spoken.output.startswith("import")


@pytest.mark.parametrize("inputs", ["original", "joint"])
def test_no_model_is_in_memory_while_what_was_written_is_loaded_elsewhere(inputs, tmp_path, monkeypatch):
    held = held_at_reload(monkeypatch)
    size = {"layers": "1-2", "tokens": 2048, "eval_tokens": 512, "context": 64, "n_experts": 256, "k": 8, "shuffle": 20_000}
    mxdsurgery.convert("demo-glu", **size, inputs=inputs, warmup=0.0, out=str(tmp_path / "out"), device="cpu")
    assert len(held) == 1 and held[0] < 2**20, held


def test_ctrl_c_says_what_is_there_and_writes_no_model(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "mxdsurgery",
        "convert",
        "demo-glu",
        "--tokens",
        "2M",
        "--layers",
        "0",
        "--n-experts",
        "64",
        "--shuffle",
        "20k",
    ]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("distil"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, "".join(lines) + rest
    assert "Traceback" not in rest and "with --resume goes on from there" in rest
    assert not out.exists()
    kept = tmp_path / "out.run"
    assert {MARKER, "checkpoints", "log.txt", "metrics.jsonl", "recipe.yaml", "plan.json"} == {
        path.name for path in kept.iterdir()
    }
    (checkpoint,) = (kept / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["finished"] == 0


def test_an_output_that_cannot_be_written_after_training_loses_no_layers(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mxdsurgery.checkpoint.export.write_code", full)
    options = {"layers": "0", "tokens": 5_000, "eval_tokens": 500, "n_experts": 64, "k": 4, "shuffle": 20_000}
    options["out"] = str(tmp_path / "out")
    with pytest.raises(OutputError, match="No space left(.|\n)*out.run; the same call with resume=True"):
        mxdsurgery.convert("demo-glu", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr("mxdsurgery.training.distill.train_step", lambda *_: steps.append(1))
    mxdsurgery.convert("demo-glu", **options, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not steps


# Layers that are large compared with the base model, so that training takes more memory than evaluation.
IN_GROUPS = {"layers": "0-2", "tokens": 2_600, "eval_tokens": 500, "n_experts": 6144, "k": 4, "batch": 512, "shuffle": 2_000}


def memory_for_groups(**options):
    """GiB in which not all layers fit together."""
    plan, recipe = mxdsurgery.plan("demo-glu", device="cpu", **options)
    memory = (plan.peak_bytes - 1) / 2**30
    assert len(mxdsurgery.plan("demo-glu", device="cpu", **options, memory=memory)[0].groups) == 2
    return memory


def test_layers_trained_in_groups_are_bit_for_bit_those_trained_together(tmp_path):
    together = mxdsurgery.convert("demo-glu", device="cpu", out=str(tmp_path / "together"), **IN_GROUPS)
    memory = memory_for_groups(**IN_GROUPS)
    parted = mxdsurgery.convert("demo-glu", device="cpu", out=str(tmp_path / "parted"), memory=memory, **IN_GROUPS)
    assert [group.layers for group in parted.plan.groups] == [[0, 1], [2]]
    assert parted.evaluation["training"]["groups"] == [[0, 1], [2]]
    first = mxdsurgery.load(together.out).model.state_dict()
    second = mxdsurgery.load(parted.out).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("all", "layers"):
        assert parted.evaluation[name] == together.evaluation[name]
    assert parted.evaluation["training"]["dead_share"] == together.evaluation["training"]["dead_share"]


def test_the_plan_stands_beside_what_was_measured(converted):
    training = converted.evaluation["training"]
    stages = ("seconds", "evaluation_seconds", "export_seconds")
    planned = {stage: getattr(converted.plan, stage) for stage in stages}  # None where it was too short to be measured first
    planned = {stage: seconds and round(seconds, 1) for stage, seconds in planned.items()}
    assert training["planned"] == planned | {"peak_bytes": converted.plan.peak_bytes}
    assert all(training["measured"][stage] > 0 for stage in stages)
    assert training["measured"]["seconds"] == training["seconds"] > 0
    peak = training["measured"]["peak_bytes"]
    assert peak is None or peak > 0
    card = (converted.out / "README.md").read_text()
    assert "| training | planned | measured |" in card and "| time | " in card
    for words, stage in (
        ("time", "seconds"),
        ("time to evaluate", "evaluation_seconds"),
        ("time to export", "export_seconds"),
    ):
        cell = "n/a" if planned[stage] is None else duration(planned[stage])
        assert f"| {words} | {cell} | {duration(training['measured'][stage])} |" in card


def test_an_interrupted_run_keeps_the_groups_that_are_finished(tmp_path, interrupted_in_layer_2):
    options = IN_GROUPS | {"memory": memory_for_groups(**IN_GROUPS), "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(KeyboardInterrupt, match="A checkpoint of step 5 is in"):
        mxdsurgery.convert("demo-glu", **options)
    (kept,) = (tmp_path / "out.run" / "checkpoints").iterdir()
    assert {path.name for path in kept.iterdir()} == {
        "group_0.safetensors",
        "group_0.1.safetensors",
        "group_0.2.safetensors",  # what of the text it was trained on
        "manifest.json",
        "state.json",
    }
    tensors = load_file(kept / "group_0.safetensors") | load_file(kept / "group_0.1.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"0 mxd k4", "1 mxd k4"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_example_runs_on_a_converted_model_without_mxdsurgery(converted, forking):
    done = forking.script(ROOT / "examples" / "ablate_expert.py", converted.out, lacks=["mxdsurgery"])
    assert done.returncode == 0, done.stderr
    assert "ablated, the mean loss where it fired goes from" in done.stdout


def stories(shared):
    names = {"data": "tinystories-train.txt", "eval_data": "tinystories-heldout.txt"}
    return {key: str(shared / "text" / name) for key, name in names.items()}


@pytest.mark.parametrize("name", ["books-llama-6m", "stories260K", "tinystories-chat-gpt2-3M"])
def test_every_model_beside_the_project_converts_in_all_layers(name, shared, tmp_path):
    made = mxdsurgery.convert(
        str(shared / "models" / name),
        layers="all",
        **stories(shared),
        tokens=40_000,
        eval_tokens=1_000,
        n_experts=256,
        k=8,
        shuffle=20_000,
        out=str(tmp_path / "out"),
        device="cpu",
    )
    assert made.evaluation["all"]["nmse"] < 1.0
    assert made.evaluation["all"]["delta_ce"] < made.evaluation["all"]["zero_delta_ce"]


def test_a_relative_path_from_another_folder_still_evaluates(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(shared / "models")
    made = mxdsurgery.convert(
        "stories260K",
        layers="0",
        **stories(shared),
        tokens=5_000,
        eval_tokens=500,
        n_experts=64,
        k=4,
        shuffle=0,
        out=str(tmp_path / "out"),
        device="cpu",
    )
    monkeypatch.chdir(tmp_path)
    assert mxdsurgery.evaluate("out")["all"] == made.evaluation["all"]


def test_the_tensorboard_tracker_gets_the_losses(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'mxdsurgery[tensorboard]'")
    options = {"layers": "0", "tokens": 5_000, "eval_tokens": 500, "n_experts": 64, "k": 4, "shuffle": 20_000}
    mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), tracker="tensorboard", **options)
    events = next((tmp_path / "out.runs").rglob("events.out.tfevents.*"))
    assert b"nmse/layer_0_mxd_k" in events.read_bytes()


QUICK = {
    "layers": "1-2",
    "n_experts": 64,
    "k": 4,
    "tokens": 10_000,
    "batch": 1024,
    "eval_tokens": 500,
    "device": "cpu",
    "shuffle": 20_000,
}


def test_layers_can_be_trained_together_from_their_start(tmp_path):
    made = mxdsurgery.convert("demo-glu", **QUICK, inputs="joint", out=str(tmp_path / "joint"))
    (group,) = made.plan.groups
    assert group.layers == [1, 2]
    every = made.evaluation["all"]
    assert every["delta_ce"] < every["mean_delta_ce"] and made.evaluation["training"]["tokens"] == 9_216
    layers = mxdsurgery.load(made.out).layers
    assert all(layer.gate.k == 4 and layer.decoder.weight.any() for layer in layers.values())


def test_what_is_written_may_be_an_adapter_that_gives_the_checkpoint_back(tmp_path):
    options = QUICK | {"layers": "2", "tokens": 6_000}
    whole = mxdsurgery.convert("demo-glu", **options, out=str(tmp_path / "whole"))
    small = mxdsurgery.convert("demo-glu", **options, format="adapter", out=str(tmp_path / "small"))
    assert not (small.out / "model.safetensors").exists()
    mxdsurgery.apply(small.out, out=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (whole.out / "config.json").read_bytes()
    assert "format: checkpoint" in (tmp_path / "again" / "recipe.yaml").read_text()
