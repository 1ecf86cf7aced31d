"""The folder: plain transformers loads it, in every family, and it is written whole or not at all."""

import ast
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from running import without_reloads
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, IDS, export_tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import mxdsurgery
from mxdsurgery.base.surgery import replaced
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.checkpoint.export import Reference, check_reload, reference_outputs
from mxdsurgery.checkpoint.writing import check_apart, check_output, check_room, write_json, written_whole
from mxdsurgery.errors import ExportError, NotConvertedError, OutputError, WeightsError


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi3"])
def test_a_fresh_process_without_mxdsurgery_computes_the_same_logits(family, tmp_path):
    model, blocks, layers, differences = export_tiny(family, tmp_path / "out")
    assert differences == {"logits": 0.0, "hidden": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_load_it_as_a_subclass_of_the_familys_own(family, tmp_path, monkeypatch):
    without_reloads(monkeypatch)  # this test does it in this process
    model, blocks, layers, _ = export_tiny(family, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert isinstance(loaded, type(model)) and type(loaded).__name__ == f"MxD{type(model).__name__}"
    assert type(loaded).__module__.startswith("transformers_modules")
    base = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert isinstance(base, type(model.base_model))
    with torch.no_grad(), replaced(model, blocks, layers):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    export_tiny("llama", out, tie_word_embeddings=True)
    return out


def remote(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def test_without_trust_it_does_not_load_as_something_else(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_generate_with_the_cache_is_generate_without_it(folder):
    model = remote(folder)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options))


def test_tied_weights_stay_tied_and_saving_again_keeps_everything(folder, tmp_path):
    model = remote(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    again = remote(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_shards_dtypes_devices_and_attention_implementations_work(folder, tmp_path):
    model = remote(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        reference = model(IDS).logits
        for options in ({}, {"device_map": {"": "cpu"}}, {"attn_implementation": "eager"}):
            torch.testing.assert_close(remote(tmp_path / "shards", **options)(IDS).logits, reference, rtol=1e-4, atol=1e-4)
        half = remote(folder, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half(IDS).logits.isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    gradients = []
    for checkpointing in (False, True):
        model = remote(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".experts.weight" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_peft_lora_trains_its_attention(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(remote(folder), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_model_from_the_config_alone_gets_fresh_weights(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    layer = model.model.layers[0].mlp
    torch.testing.assert_close(layer.experts.weight.norm(dim=1), torch.ones(64))
    assert (layer.decoder.weight == 0).all() and layer.gate.weight.std() > 0


def test_the_code_that_travels_imports_torch_and_transformers_only_and_only_defines(folder):
    files = sorted(path.name for path in folder.glob("*.py"))
    ours = [
        "baselines",
        "changes",
        "configuration_mxd",
        "in_force",
        "interventions",
        "layer",
        "low_rank",
        "modeling_mxd",
        "peft_targets",
        "replacement",
        "sparse",
    ]
    assert files == [f"{name}.py" for name in ours]
    allowed_statements = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    for name in files:
        tree = ast.parse((folder / name).read_text())
        assert ast.get_docstring(tree)
        for node in tree.body[1:]:
            assert isinstance(node, allowed_statements), ast.dump(node)
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                assert not any(isinstance(part, ast.Call) for part in ast.walk(node))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named = {alias.name.split(".")[0] for alias in node.names}
                assert named <= {"functools", "inspect", "math", "sys", "threading", "torch", "transformers", "warnings"}
            if isinstance(node, ast.ImportFrom):
                siblings = {*ours} - {"modeling_mxd"}
                libraries = {
                    "torch",
                    "transformers",
                    "collections",
                    "contextlib",
                    "contextvars",
                    "dataclasses",
                    "numbers",
                    "types",
                    "typing",
                    "warnings",
                }
                assert node.module.split(".")[0] in (siblings if node.level else libraries)


def test_the_folder_holds_what_it_should(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "config.json", "evaluation.json", "generation_config.json", "model.safetensors"} <= names
    assert {"plan.json", "recipe.yaml", "tokenizer.json"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mxd-llama" and config["architectures"] == ["MxDLlamaForCausalLM"]
    assert config["mxd"]["layers"][1]["path"] == "layers.1.mlp"
    card = (folder / "README.md").read_text()
    assert "| all |" in card and "model.base_model.layers.0.mlp.gate" in card
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("import os")["input_ids"]


def test_load_reads_the_folder_without_running_its_code(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*.py"):
        path.write_text("raise SystemExit('this code was run')")
    loaded = load(copy)
    assert set(loaded.layers) == {0, 1} and loaded.layers[1] is loaded.model.model.layers[1].mlp
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, remote(folder)(IDS).logits)


def test_a_folder_of_format_1_is_read(folder, tmp_path):
    """Its config named no kind, its plan neither kind nor sparsity, and its recipe had fewer keys."""
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    config, plan = (json.loads((older / name).read_text()) for name in ("config.json", "plan.json"))
    config["mxd"]["format_version"] = 1
    for entry in config["mxd"]["layers"]:
        assert entry.pop("kind") == "mxd"
    for layer in plan["layers"]:
        assert (layer.pop("kind"), layer.pop("sparsity")) == ("mxd", "topk")
    (older / "config.json").write_text(json.dumps(config))
    (older / "plan.json").write_text(json.dumps(plan))
    with torch.no_grad():
        assert torch.equal(load(older).model(IDS).logits, load(folder).model(IDS).logits)


def test_a_newer_format_and_missing_weights_are_refused_by_name(folder, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    config = json.loads((newer / "config.json").read_text())
    config["mxd"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotConvertedError, match="format version 99"):
        load(newer)

    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    tensors = load_file(partial / "model.safetensors")
    removed = tensors.pop("model.layers.0.mlp.gate.weight")
    assert removed.shape == (64, 32)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="model.layers.0.mlp.gate.weight"):
        load(partial)


@pytest.fixture(params=["forked", "whole"])
def both_ways(request):
    """The test runs with reloads in forks, as most do, and with reloads as users have them."""
    if request.param == "whole":
        request.getfixturevalue("whole_reloads")


def test_the_reload_check_notices_other_weights_and_broken_code(folder, both_ways):
    outputs = {"logits": torch.zeros(2, 16, 64), "hidden": torch.zeros(2, 16, 32)}
    reference = Reference(IDS, outputs, torch.device("cpu"), torch.float32)
    with pytest.raises(ExportError, match="gives other logits"):
        check_reload(folder, reference)


def test_the_reload_check_notices_a_spoilt_checkpoint(folder, tmp_path, both_ways):
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    reference = reference_outputs(load(folder).model, IDS)
    assert check_reload(spoilt, reference) == {"logits": 0.0, "hidden": 0.0}
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.1.mlp.decoder.weight"][3] += 1
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="gives other logits"):
        check_reload(spoilt, reference)
    (spoilt / "layer.py").unlink()
    with pytest.raises(ExportError, match="does not load without mxdsurgery: .*layer"):
        check_reload(spoilt, reference)


def test_broken_code_is_an_export_error_and_leaves_no_folder(tmp_path, monkeypatch, both_ways):
    monkeypatch.setattr("mxdsurgery.checkpoint.export._MODELING", "import mxdsurgery\n")
    with pytest.raises(ExportError, match="does not load without mxdsurgery"):
        export_tiny("llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing_and_an_old_folder_untouched(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), written_whole(out) as staging:
        (staging / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with written_whole(out) as staging:
        (staging / "plan.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), written_whole(out) as staging:
        (staging / "plan.json").write_text("other")
        raise ZeroDivisionError
    assert (out / "plan.json").read_text() == "{}" and list(tmp_path.iterdir()) == [out]
    with written_whole(out) as staging:
        (staging / "plan.json").write_text("new")
    assert (out / "plan.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_a_named_error(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="No space left"), written_whole(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_beside_the_folder_that_is_read(tmp_path):
    for out, said in ((".", "is the model"), ("inside/it", "is inside"), ("..", "is around")):
        with pytest.raises(OutputError, match=said):
            check_apart(tmp_path / "model" / out, tmp_path / "model", "the model")
    check_apart(tmp_path / "model-mxd", tmp_path / "model", "the model")


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    check_room(tmp_path / "a" / "b", 2**20)
    with pytest.raises(OutputError, match="takes 2 MiB of disk while it is written, and 1 MiB are free"):
        check_room(tmp_path / "a" / "b", 2**21)
    with pytest.raises(OutputError, match="are free there"):
        mxdsurgery.convert("demo-glu", layers="0", tokens=5000, n_experts=64, k=4, out=str(tmp_path / "out"), device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664), (0o022, 0o755, 0o644)])
def test_what_is_written_has_the_modes_that_the_umask_gives(umask, folder, file, tmp_path):
    before = os.umask(umask)
    try:
        with written_whole(tmp_path / "made") as staging:
            (staging / "inside").mkdir()
            write_json(staging / "inside" / "a.json", {})
        write_json(tmp_path / "new" / "b.json", {})
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders = dict.fromkeys(("made", "made/inside", "new"), folder)
    assert modes == folders | dict.fromkeys(("made/inside/a.json", "new/b.json"), file)


def test_check_output_refuses_what_exists(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    (mine / "plan.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        check_output(mine, overwrite=False)
    assert check_output(mine, overwrite=True) == mine
    with pytest.raises(OutputError, match="was not written by mxdsurgery"):
        check_output(other, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_importing_the_exported_code_does_not_import_mxdsurgery(folder):
    code = (
        "import sys, importlib; sys.path.insert(0, sys.argv[1]); importlib.import_module(sys.argv[2] + '.modeling_mxd'); "
        "assert not any(m.startswith('mxdsurgery') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(folder.parent), folder.name], check=True, cwd=folder)


OUT_OF_MEMORY = {
    "a device": (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU": (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "the system": (-9, ""),
}


@pytest.mark.parametrize("ended", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_where_the_device_has_no_room_for_a_second_model_the_cpu_compares(ended, tmp_path, monkeypatch):
    outputs = {name: torch.linspace(-1, 1, 8) for name in ("logits", "hidden")}
    reference = Reference(IDS, outputs, torch.device("cuda"), torch.float32)
    freed, asked = [], []

    def run(words, environment, folder, ends=("cuda",)):
        asked.append(words[3])
        if words[3] in ends:
            return subprocess.CompletedProcess(words, *ended[:1], stdout="", stderr=ended[1])
        save_file({name: value + 2e-6 for name, value in outputs.items()}, words[2])  # other kernels round otherwise
        return subprocess.CompletedProcess(words, 0, stdout="", stderr="")

    monkeypatch.setattr("mxdsurgery.checkpoint.export.empty_cache", freed.append)
    monkeypatch.setattr("mxdsurgery.checkpoint.export._run_reload", run)
    differences = check_reload(tmp_path, reference)
    assert asked == ["cuda", "cpu"] and sorted(freed) == ["cpu", "cuda"]
    assert 0 < differences["logits"] < 3e-6
    monkeypatch.setattr("mxdsurgery.checkpoint.export._run_reload", lambda *words: run(*words, ends=("cuda", "cpu")))
    with pytest.raises(ExportError, match="not enough memory") as refused:
        check_reload(tmp_path, reference)
    assert "fault of mxdsurgery" not in str(refused.value)
