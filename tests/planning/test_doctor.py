"""``doctor``: what it finds is what is here, and what it says about it follows from that."""

import importlib.metadata
import json

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.hardware.device import devices
from mxdsurgery.planning import doctor as module


@pytest.fixture
def quick(monkeypatch):
    """Without timing anything."""
    rates = {"float32": 1e11, "bfloat16": 4e11}
    monkeypatch.setattr(module, "matmul_rate", lambda _device, dtype: rates[dtype])
    return rates


def test_it_finds_what_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = mxdsurgery.doctor()
    assert [device["name"] for device in found["devices"]] == devices()
    for device in found["devices"]:
        assert all(rate > 1e6 for rate in device["products"].values())
        assert device["free_bytes"] > 2**20 and device["compute"]["dtype"] in ("float32", "bfloat16")
    assert found["libraries"]["torch"] == importlib.metadata.version("torch")
    assert found["disk"]["folder"] == str(tmp_path) and 0 < found["disk"]["free_bytes"]
    assert found["memory_bytes"] > 2**28 and torch.backends.cpu.get_cpu_capability() in found["processor"]


def test_what_is_printed_is_json_or_a_table(quick):
    shown = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(shown.stdout)
    assert shown.exit_code == 0 and found["devices"][0]["products"] == {"float32": 1e11, "bfloat16": 4e11}
    table = CliRunner().invoke(main, ["doctor"]).stdout
    assert "100 GFLOP/s" in table and "400 GFLOP/s" in table and all(line in table for line in found["lacks"])


def test_slow_bf16_is_said_only_where_it_is_slow(quick):
    assert not any("bf16" in line for line in mxdsurgery.doctor()["lacks"])
    quick["bfloat16"] = 2.5e9
    assert any("bf16 products run at 0.025 times" in line for line in mxdsurgery.doctor()["lacks"])


def test_a_hub_that_does_not_answer_is_named_with_the_reason(quick, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert mxdsurgery.doctor()["hub"]["why_not"] == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    found = mxdsurgery.doctor()
    assert not found["hub"]["reachable"] and found["hub"]["why_not"]
    assert any(found["hub"]["why_not"] in line for line in found["lacks"])


def test_what_is_not_installed_is_named_with_what_it_is_for(quick, monkeypatch):
    monkeypatch.setitem(module._OPTIONAL, "no-such-package", ("dreams", "pip install no-such-package"))
    found = mxdsurgery.doctor()
    assert found["optional"]["no-such-package"]["version"] is None
    assert "no-such-package is not installed (dreams): pip install no-such-package" in found["lacks"]
