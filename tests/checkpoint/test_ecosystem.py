"""A converted model in other libraries: examples with transformers' pipeline, PEFT, lm-evaluation-harness and Accelerate."""

import dataclasses
import os
import re
import runpy
import shutil
import sys

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from running import ROOT, without_reloads
from safetensors.torch import load_file
from tiny import IDS, RECIPE, export_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mxdsurgery
from mxdsurgery.base.config import model_source
from mxdsurgery.base.dtypes import as_stored, compute_in
from mxdsurgery.errors import NotConvertedError

EXAMPLES = ROOT / "examples"
# As on a machine without mxdsurgery.
WITHOUT = "import runpy, sys; sys.modules['mxdsurgery'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"


@pytest.fixture
def run(forking, tmp_path):
    """What an example prints that is run with some words, in a process of its own."""

    def printed(name, *words):
        done = forking.run(WITHOUT, [str(EXAMPLES / name), *map(str, words)], os.environ, str(tmp_path))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return printed


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


def numbers(pattern, text):
    """The groups of a pattern that the text must hold, as numbers."""
    found = re.search(pattern, text)
    assert found, text
    return [float(group.replace(",", "")) for group in found.groups()]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def test_the_pipeline_writes_what_the_model_does_with_and_without_experts(converted, run):
    prompts = ["def read(path):\n    with open(", "class Queue:\n    def __init__(self", "for name in sorted("]
    every = ",".join(map(str, range(256)))
    printed = run("text_pipeline.py", converted.out, "--layer", 1, "--experts", every, "--tokens", 6, "--prompt", *prompts)
    model, tokenizer = load(converted.out), AutoTokenizer.from_pretrained(converted.out)

    def written(prompt):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
        return repr(tokenizer.decode(made[0, ids.shape[1] :]))

    whole = [written(prompt) for prompt in prompts]
    with model.mxd.ablate({1: range(256)}):
        ablated = [written(prompt) for prompt in prompts]
    assert re.findall(r"^  whole    (.*)$", printed, re.M) == whole
    assert re.findall(r"^  ablated  (.*)$", printed, re.M) == ablated
    changed = sum(a != b for a, b in zip(whole, ablated, strict=True))
    assert changed and f"changed {changed} of 3 continuations" in printed


def test_lora_learns_is_reloaded_and_merged_and_leaves_the_experts_alone(converted, tmp_path, run):
    printed = run("lora_finetune.py", converted.out, "--out", tmp_path / "a", "--steps", 15, "--context", 32, "--mxd")
    tokens, before = numbers(r"Loss on ([\d,]+) held-out tokens before: ([\d.]+) nats", printed)
    (after,) = numbers(r"after 15 steps: ([\d.]+) nats", printed)
    assert tokens == 100 * 31 and after < before - 0.05
    assert numbers(r"fresh copy, its logits differ by at most ([\d.e+-]+);", printed) == [0]
    assert numbers(r"merged into the weights, by at most ([\d.e+-]+)\.", printed)[0] < 1e-3
    assert numbers(r"loads without PEFT; logits differ by ([\d.e+-]+);", printed) == [0]
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].partition(".layers.")[2] for name in saved}
    attention = {f"{block}.self_attn.{name}_proj" for block in range(4) for name in "qkvo"}
    assert adapted == attention | {f"{block}.mlp.{name}" for block in (1, 2) for name in ("encoder", "encoder_up", "decoder")}
    original, merged = (load_file(folder / "model.safetensors") for folder in (converted.out, tmp_path / "a" / "merged"))
    same = {name for name in original if torch.equal(original[name].float(), merged[name])}
    assert {name for name in original if ".gate." in name or ".experts." in name} <= same
    assert not {name for name in original if ".decoder." in name or "q_proj" in name} & same


def test_a_trainer_trains_saves_and_goes_on_and_what_it_saves_can_be_used_here(tmp_path):
    folder = ROOT / "tests/fixtures/format_3"
    row = {"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}
    how = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 1}

    def trainer(steps):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        given = TrainingArguments(str(tmp_path / "runs"), max_steps=steps, learning_rate=1e-2, **how)
        return Trainer(model=model, args=given, train_dataset=[row] * 8)

    first = trainer(2)
    first.train()
    second = trainer(3)
    second.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in second.state.log_history if "train_loss" in entry] == [3]
    second.save_model(str(tmp_path / "saved"))
    for run in (lambda: mxdsurgery.load(tmp_path / "saved"), lambda: mxdsurgery.generate(tmp_path / "saved", prompt="a")):
        with pytest.raises(NotConvertedError, match="copy plan.json and recipe.yaml there"):
            run()
    for name in ("plan.json", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "saved")
    trained = mxdsurgery.load(tmp_path / "saved").model
    ids = torch.tensor([row["input_ids"]])
    torch.testing.assert_close(trained(ids).logits, second.model.eval()(ids).logits)
    assert not torch.allclose(trained(ids).logits, mxdsurgery.load(folder).model(ids).logits, atol=1e-2)
    assert len(mxdsurgery.generate(tmp_path / "saved", prompt="a", max_new_tokens=2)) == 1


def test_lora_on_a_module_that_is_not_there_is_refused(converted, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("pass\n" * 2000)
    words = [converted.out, "--out", tmp_path / "a", "--text", tmp_path / "text", "--targets", "q_proj,c_attn"]
    monkeypatch.setattr(sys, "argv", ["lora_finetune.py", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "lora_finetune.py"))
    assert "the model has no module c_attn" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_the_harness_scores_both_models_on_every_example(converted, run):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mxdsurgery[test]'")
    printed = run("lm_eval_task.py", converted.out, "--original", model_source("demo-glu"))
    count = len((EXAMPLES / "lm_eval_tasks" / "python_pairs.jsonl").read_text().splitlines())
    examples, *accuracies = numbers(r"python_pairs\s+acc\s+(\d+)\s+([\d.]+)\s+([\d.]+)", printed)
    assert examples == count == 40
    assert all(0.65 <= accuracy <= 1 and (accuracy * count).is_integer() for accuracy in accuracies)  # chance: 0.5
    examples, original, made = numbers(r"python_bits\s+bits_per_byte\s+(\d+)\s+([\d.]+)\s+([\d.]+)", printed)
    assert examples == count and 0.5 < original < made < 3  # a converted model is a little worse, and far from 8 bits


def test_the_example_with_the_harness_says_what_it_needs(forking):
    done = forking.script(EXAMPLES / "lm_eval_task.py", lacks=["lm_eval"])
    assert done.returncode == 2 and done.stderr.startswith("this example needs lm-evaluation-harness")


def test_blocks_on_disk_compute_the_same_with_less_in_memory(converted, run):
    printed = run("offload.py", converted.out, "--disk", 3)
    assert "3 of 4 blocks are on disk" in printed and "the MxD layers [1, 2]" in printed
    kept, whole = numbers(r"In memory: ([\d.]+) MB of ([\d.]+) MB", printed)
    sizes = {name: 4 * tensor.numel() / 1e6 for name, tensor in load_file(converted.out / "model.safetensors").items()}
    away = sum(size for name, size in sizes.items() if re.search(r"layers\.[123]\.", name))
    assert whole == pytest.approx(sum(sizes.values()), abs=0.1) and kept == pytest.approx(whole - away, abs=0.1)
    assert numbers(r"model in memory by at most ([\d.e+-]+),", printed) == [0]
    assert numbers(r"all experts ablated by at most ([\d.e+-]+)", printed) == [0]
    assert numbers(r"changes them by up to ([\d.]+)\)", printed)[0] > 0.1


def test_the_threshold_is_never_rounded_whatever_a_checkpoint_is_loaded_in(tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    wanted, ids, least = torch.tensor(0.3012), torch.randint(1, 64, (64, 64), generator=torch.Generator().manual_seed(5)), {}
    for dtype in (torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        export_tiny("llama", out, dtype=dtype, recipe=dataclasses.replace(RECIPE, sparsity="batchtopk"))
        model = load(out)
        model.mxd.layers[0].gate.threshold.fill_(wanted)
        model.save_pretrained(out)
        model.mxd.layers[0].gate.register_forward_hook(lambda _module, _x, a: least.update(values=a.values))
        logits(model, ids)
        kept = least["values"]
        assert kept[kept > 0].min() >= wanted and kept[kept > 0].min() < wanted * 1.001  # none is rounded either
        for how in ({}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float32}, {"device_map": "cpu"}):
            loaded = load(out, **how)
            assert torch.equal(loaded.mxd.layers[0].gate.threshold, wanted), how
            assert torch.equal(loaded.to(torch.bfloat16).mxd.layers[0].gate.threshold, wanted)
        for name in ("auto", "float32", "bfloat16"):
            ours = mxdsurgery.load(out, dtype=name)
            assert torch.equal(ours.layers[0].gate.threshold, wanted)
        for to in (torch.float32, torch.bfloat16, torch.float16):
            compute_in(ours.model, to)
            as_stored(ours.model)
            assert torch.equal(ours.layers[0].gate.threshold, wanted)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"sparsity": "batchtopk"}),
        ("llama", {"kind": "skip-transcoder"}),
        ("llama", {"kind": "topk-sae"}),
        ("llama", {"kind": "molt", "sparsity": "jumprelu"}),
        ("llama", {"kind": "dense"}),
    ],
)
def test_every_kind_of_layer_works_from_disk_as_a_whole_and_in_parts(family, changes, tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    out = tmp_path / "out"
    export_tiny(family, out, recipe=dataclasses.replace(RECIPE, **changes))
    model = load(out)
    if model.mxd.layers and (threshold := model.mxd.layers[0].gate.threshold) is not None:
        threshold.fill_(0.3)  # a buffer, and one that matters
        model.save_pretrained(out)
    layers = {layer: range(0, mxd.gate.n_experts, 2) for layer, mxd in model.mxd.layers.items()}
    with model.mxd.ablate(layers):
        expected_ablated = logits(model)
    expected = logits(model)
    path = f"{model.base_model_prefix}.{model.config.mxd['layers'][0]['path']}"
    parts = [f"{path}.{name}" for name, part in model.get_submodule(path).named_children() if list(part.parameters())]
    for disk in ([path], parts):
        where = {}
        for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            inside = next((part for part in disk if name.startswith(f"{part}.")), None)
            where[inside or (name if name == f"{path}.bias" else name.rpartition(".")[0])] = "disk" if inside else "cpu"
        offloaded = load(out, device_map=where, offload_folder=tmp_path / "away")
        away = {name for name, tensor in offloaded.named_parameters() if tensor.is_meta}
        assert away == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{part}." for part in disk))}
        hooks = [module._hf_hook for module in offloaded.get_submodule(path).modules() if hasattr(module, "_hf_hook")]
        assert any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)
        assert torch.equal(logits(offloaded), expected)
        with offloaded.mxd.ablate(layers):
            assert torch.equal(logits(offloaded), expected_ablated)
        assert not layers or not torch.equal(expected, expected_ablated)
        assert {name for name, tensor in offloaded.named_parameters() if tensor.is_meta} == away
