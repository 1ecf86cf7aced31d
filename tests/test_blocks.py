"""Blocks are found by structure in every family, and proven; what cannot be proven is refused."""

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_model
from torch import nn

from mxdsurgery.blocks import TOLERANCE, find_blocks, prove_block
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.model import model_skeleton


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_block_is_found_from_the_config_and_proven_on_the_weights(family):
    _, kind, activation = FAMILIES[family]
    findings = find_blocks(model_skeleton(tiny_config(family)))
    model = tiny_model(family)
    assert [finding.layer for finding in findings] == [0, 1]
    for finding in findings:
        block = finding.block
        assert (block.kind, block.activation, block.d_model) == (kind, activation, 32)
        assert finding.error <= TOLERANCE
        assert prove_block(model, block) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_extracted_weights_recompute_what_the_block_did_inside_the_running_model(family):
    from mxdsurgery.activations import record_activations

    model = tiny_model(family)
    blocks = [finding.block for finding in find_blocks(model)]
    ids = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(0))
    for block in blocks:
        x, y = record_activations(model, blocks, ids)[block.layer]
        recomputed = block.output(model.base_model, block.hidden(model.base_model, x))
        torch.testing.assert_close(recomputed, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "quick_gelu", "relu2"])
def test_the_activation_is_told_from_its_values(activation):
    config = tiny_config("gpt_neox", hidden_act=activation)
    assert find_blocks(model_skeleton(config))[0].block.activation == activation


def test_a_config_that_names_the_wrong_activation_is_not_believed():
    model = tiny_model("llama")
    model.config.hidden_act = "gelu"
    assert find_blocks(model)[0].block.activation == "silu"


def test_gate_and_up_are_told_apart_by_what_they_do_and_not_by_their_order():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_first = nn.Linear(32, 80, bias=False)
            self.gate_second = nn.Linear(32, 80, bias=False)
            self.down = nn.Linear(80, 32, bias=False)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate_second(x)) * self.up_first(x))

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Swapped()
    block = find_blocks(model)[1].block
    assert block.encoder.path == "layers.1.mlp.gate_second" and block.encoder_up.path == "layers.1.mlp.up_first"


def test_fused_halves_are_told_apart(monkeypatch):
    class UpFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused = nn.Linear(32, 160)
            self.down = nn.Linear(80, 32)

        def forward(self, x):
            up, gate = self.fused(x).chunk(2, dim=-1)
            return self.down(nn.functional.gelu(gate) * up)

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = UpFirst()
    block = find_blocks(model)[0].block
    assert block.encoder.outputs == (80, 160, 1) and block.encoder_up.outputs == (0, 80, 1)
    assert block.encoder_bias and block.decoder_bias and block.activation == "gelu"


class _Scaled(nn.Module):
    """A block with something between its maps that no reading explains."""

    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


def test_a_block_that_does_something_else_is_refused_with_how_far_off_it_was():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Scaled(layer.mlp)
    finding = find_blocks(model)[0]
    assert finding.block is None
    assert "no reading of its linear maps reproduces its output" in finding.reason


def test_the_proof_on_the_weights_fails_when_the_weights_tell_otherwise():
    model = tiny_model("llama")
    block = find_blocks(model)[0].block
    model.model.layers[0].mlp = _Scaled(model.model.layers[0].mlp)
    with pytest.raises(UnsupportedBlockError, match="layers.0.mlp: its output differs"):
        prove_block(model, block)


def test_a_mixture_of_experts_is_refused():
    finding = find_blocks(model_skeleton(tiny_config("mixtral", num_local_experts=4)))[0]
    assert finding.block is None and finding.reason.startswith("holds")


def test_finding_leaves_no_hook_behind():
    model = tiny_model("opt")
    find_blocks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
