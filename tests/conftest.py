"""Small deterministic models for the tests, and the way to the material that may lie beside the project."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import pytest
import torch
from forked import ForkingInterpreter
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mxdsurgery.console import Reporter

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2_NAMES = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OPT_NAMES = {"hidden_size": 32, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
_NEO_NAMES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
_VOCAB = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# family: (config values, kind, activation)
FAMILIES = {
    "gpt2": (_GPT2_NAMES, "mlp", "gelu_new"),
    "gpt_neo": (_NEO_NAMES | _VOCAB, "mlp", "gelu_new"),
    "gpt_neox": (_COMMON, "mlp", "gelu"),
    "opt": (_OPT_NAMES | _VOCAB, "mlp", "relu"),
    "phi": (_COMMON, "mlp", "gelu_new"),
    "phi3": (_COMMON, "glu", "silu"),
    "llama": (_COMMON, "glu", "silu"),
    "mistral": (_COMMON, "glu", "silu"),
    "qwen2": (_COMMON, "glu", "silu"),
    "qwen3": (_COMMON, "glu", "silu"),
    "gemma": (_COMMON, "glu", "gelu_pytorch_tanh"),
    "gemma2": (_COMMON, "glu", "gelu_pytorch_tanh"),
    "olmo2": (_COMMON, "glu", "silu"),
}


def tiny_config(family: str, **changes):
    """A config of two layers, 32 wide, of any family."""
    values = FAMILIES[family][0] if family in FAMILIES else _COMMON
    return CONFIG_MAPPING[family](**values | changes)


def tiny_model(family: str, seed: int = 0, **changes):
    """A random model of `tiny_config`, in fp32, with biases and norms that are not at their trivial start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


class Said(Reporter):
    """Keeps the lines that a command says."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def interrupt_layer_2(patch: pytest.MonkeyPatch) -> None:
    """Lets Ctrl-C come when layer 2 begins to train."""
    from mxdsurgery.distill import distill

    def interrupted(layers, *rest):
        if any(planned.block.layer == 2 for planned in layers):
            raise KeyboardInterrupt
        distill(layers, *rest)

    patch.setattr("mxdsurgery.train.distill", interrupted)


def shared_folder() -> Path | None:
    """The material beside the project: ../shared, or where MXD_SHARED points."""
    path = Path(os.environ.get("MXD_SHARED", Path(__file__).parents[2] / "shared"))
    return path if (path / "models").is_dir() else None


@pytest.fixture
def shared() -> Path:
    path = shared_folder()
    if path is None:
        pytest.skip("no ../shared beside the project, and MXD_SHARED points nowhere: its models and texts are needed")
    return path


@pytest.fixture(scope="session", autouse=True)
def float32_is_fast():
    """The same machine everywhere, and the fastest for most: what a model computes in is float32, whatever it is stored in.

    tests/test_compute.py has other machines, and measures this one.
    """
    from mxdsurgery import compute

    with pytest.MonkeyPatch.context() as patch:
        for name in ("layer_seconds", "product_seconds"):
            patch.setattr(compute, name, lambda _device, dtypes, *_shape: {d: 1.0 if d == "float32" else 4.0 for d in dtypes})
        yield


@pytest.fixture(scope="session")
def forking():
    """Runs code in fresh processes without mxdsurgery that need not import transformers first."""
    interpreter = ForkingInterpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session", autouse=True)
def forked_reloads(forking):
    """`check_reload` does so in forks of one interpreter; yields its own way, an interpreter each time."""
    from mxdsurgery import export

    whole = export._run_reload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_run_reload", lambda *given: forking.run(export._RELOAD, *given))
        yield whole


@pytest.fixture
def whole_reloads(forked_reloads, monkeypatch):
    """Checkpoints are reloaded as they are for users: each command has a test that wants this."""
    monkeypatch.setattr("mxdsurgery.export._run_reload", forked_reloads)


@pytest.fixture
def interrupted_in_layer_2(monkeypatch):
    interrupt_layer_2(monkeypatch)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """demo-glu with two layers converted in a few steps; tests read the folder and never change it."""
    import mxdsurgery

    out = tmp_path_factory.mktemp("converted") / "demo"
    return mxdsurgery.convert(
        "demo-glu", layers="1-2", tokens=40_000, eval_tokens=4_000, n_experts=256, k=8, shuffle=100_000, out=str(out),
        device="cpu",
    )  # fmt: skip
