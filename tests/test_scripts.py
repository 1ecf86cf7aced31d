"""The benchmarks run and measure what they say, and the pages of figures in docs/ are what the scripts print."""

import dataclasses
import importlib.util
import json
import runpy
import sys

import pytest
from pages import DOCS, SCRIPTS
from steps import Step, costs_of, run_steps


@pytest.fixture
def run(forking):
    """The last line that a script printed, as JSON."""

    def printed(script, *words):
        done = forking.script(SCRIPTS / script, *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return printed


@pytest.mark.parametrize("block", [(), ("--glu",)], ids=["mlp", "glu"])
def test_our_step_and_the_dense_one_reach_the_same_loss_from_the_same_start(shared, block, run):
    shape = ("--d", 32, "--h", 64, "--n", 256, "--k", 8, "--batch", 128, "--steps", 20, *block)
    exact = ("--precision", "fp32", "--selection", "fp32")
    result = run("bench_step.py", *shape, *exact, "--yardstick", shared / "bench" / "dense_reference.py")
    assert result["loss_difference"] < 1e-4
    assert result["speedup"] > 0 and result["floor_seconds"] > 0
    assert result["ours"]["tokens_per_second"] > 0 and result["yardstick"]["tokens_per_second"] > 0


def test_bf16_reaches_the_loss_of_the_dense_fp32_step(shared, run):
    shape = ("--d", 64, "--h", 128, "--n", 512, "--k", 16, "--batch", 256, "--steps", 20)
    low = ("--precision", "bf16", "--selection", "bf16")
    result = run("bench_step.py", *shape, *low, "--yardstick", shared / "bench" / "dense_reference.py")
    assert result["our_precision"] == "bf16" and 0 < result["loss_difference"] < 1e-2


def test_all_layers_train_at_once_beside_what_the_plan_said(run):
    result = run("bench_pass.py", "--model", "tiny", "--device", "cpu", "--steps", 4, "--warm-up", 2)
    assert result["layers_at_once"] == 4 and result["groups"] == 1
    assert result["tokens_per_second"] > 0 and result["planned_tokens_per_second"] > 0
    assert result["planned_peak_bytes"] > 12 * result["trained_parameters"]


def test_inference_is_measured_for_every_n_beside_the_original(run):
    result = run("bench_inference.py", "--model", "tiny", "--n-experts", "64,256", "--seconds", 0.05, "--prompt", 16)
    assert list(result["by_n"]) == ["64", "256"]
    sizes = [result["original"]["weight_bytes"], *(at["weight_bytes"] for at in result["by_n"].values())]
    assert sizes == sorted(set(sizes)) and result["largest_n_within_1.3x"] >= 0


def test_a_conversion_is_timed_alone_and_beside_a_busy_process(run):
    result = run("bench_beside.py", "--tokens", 2048, "--threads", 1, "--precision", "default")
    assert result["tokens"] >= 2048 and result["alone"] > 0 and result["beside"] > 0


def test_kernels_are_measured_beside_plain_torch_where_they_run(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("bench_kernels.py", "--d", 16, "--n", 640, "--k", 1, "--batch", 8, "--seconds", 0.01)
    assert min(result["plain"].values()) >= 0 and {"mix", "dots", "scatter", "select_bf16"} < set(result["plain"])
    assert ("triton" in result) == (importlib.util.find_spec("triton") is not None)
    if "triton" in result:
        assert {"best_of_groups_bf16", "select_bf16"} < set(result["triton"]) and min(result["triton"].values()) > 0
        assert all(" in Triton, " in said for trials in result["trials"] for said in trials)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_without_a_gpu(run):
    result = run("compile_kernels.py", "--shape", "Llama-3.2-3B")
    names = {row["kernel"] for row in result["kernels"]}
    assert names == {"best bf16", "best fp32", "hidden g 32", "hidden g 16", "mix", "dots", "scatter"}
    for row in result["kernels"]:
        for target in (row["sm_80"], row["sm_90"]):
            assert 0 < target["registers"] <= 255 and target["stack"] <= 8 and target["shared"] <= 163 * 1024
    choice = {way["way"]: way["sum"] for way in result["ways"]}
    assert choice["best three of groups of 32"] < choice["plain torch"]


def test_trainings_that_keep_and_read_activations_are_timed_beside_one_without(run):
    text = ("--data", "stdlib", "--eval-data", "stdlib:heldout", "--shuffle", 0, "--tokens", "2k", "--eval-tokens", 300)
    result = run("bench_cache.py", "demo-glu", "--layer", 2, "--k", 4, "--rounds", 1, *text)
    width = {"float32": 4, "bfloat16": 2}[result["compute"]]
    assert result["tokens"] == 7 * 256 and result["bytes_per_token"] == 8 + 2 * 192 * width
    assert all(result[name]["command_cpu"] > result[name]["train_cpu"] for name in ("without", "writing", "reading"))


def test_steps_keep_what_commands_print_and_what_they_cost(tmp_path):
    work, kept = tmp_path / "work", tmp_path / "kept"
    work.mkdir()
    written = Step("written", "It writes:", "echo one; pwd; echo three; echo hidden >&2", last=2)
    failed = Step("failed", "", "echo begun; echo why >&2; exit 2")
    run_steps((written, failed), work, kept, None)
    assert written.markdown(kept) == f"It writes:\n\n```\n$ {written.command}\n{work}\nthree\n```\n"
    assert failed.markdown(kept) == f"```\n$ {failed.command}\nbegun\nwhy\n```\n"
    costs = costs_of(kept)
    assert list(costs) == ["written"] and costs["written"]["seconds"] > 0 and costs["written"]["peak_bytes"] > 100_000
    (kept / "written.txt").write_text("kept\n")
    run_steps((written, failed), work, kept, None)
    assert (kept / "written.txt").read_text() == "kept\n"  # what is there already is not run again, unless it is named
    run_steps((written, failed), work, kept, "written")
    assert (kept / "written.txt").read_text() != "kept\n"


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("performance.py", "performance.md"),
        ("frontiers.py", "frontier.md"),
        ("training_variants.py", "training.md"),
        ("smollm2.py", "smollm2.md"),
        ("scale.py", "scale.md"),
        ("reliability.py", "reliability.md"),
        ("families.py", "families.md"),
        ("controls.py", "controls.md"),
        ("defaults.py", "defaults.md"),
        ("single_experts.py", "single-experts.md"),
    ],
)
def test_a_page_of_figures_is_what_its_script_prints(script, page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "page"])
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as ended:  # as click leaves
        assert not ended.code
    assert capsys.readouterr().out == (DOCS / page).read_text()


def test_every_way_of_training_runs_and_is_judged(shared, tmp_path, monkeypatch):
    import training_variants

    often = dataclasses.replace(training_variants.VARIANTS["resampled"], resample=5)
    monkeypatch.setitem(training_variants.VARIANTS, "resampled", often)
    for name, value in (("PROBING", {"sentiment": 60}), ("MODEL", "stories260K"), ("LAYER", 2)):
        monkeypatch.setattr(training_variants, name, value)
    chosen = ["default", "transcoder", "centred C", "gate rows from the data", "half the hidden units", "resampled"]
    chosen += ["encoder frozen", "K constant, penalty .01 at first"]
    rows = list(training_variants.run(chosen, shared, tokens=2048 * 30, eval_tokens=512))
    assert [row["name"] for row in rows] == chosen
    for row in rows:
        assert 0 < row["nmse"] < 1.5 and 0 <= row["f1_sentiment"] <= 1
