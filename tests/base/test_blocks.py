"""Blocks are found by structure in every family, and proven; what cannot be proven is refused."""

import pytest
import tiny_models
import torch
from tiny import FAMILIES, tiny_config, tiny_model
from torch import nn

from mxdsurgery import register_family
from mxdsurgery.base import families
from mxdsurgery.base.config import load_config
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.examination import check_causal
from mxdsurgery.base.families import Family
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.model import model_skeleton
from mxdsurgery.base.proof import TOLERANCE, prove_block
from mxdsurgery.errors import NotCausalLMError, UnknownFamilyError, UnsupportedBlockError


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_block_is_found_from_the_config_and_proven_on_the_weights(family):
    kind, activation = FAMILIES[family]
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
    from mxdsurgery.base.activations import record_activations

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
    finding = find_blocks(model_skeleton(tiny_config("mixtral")))[0]
    assert finding.block is None and finding.reason.startswith("is a mixture of experts")


def test_finding_leaves_no_hook_behind():
    model = tiny_model("opt")
    find_blocks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def replaced_blocks(make, **values):
    """A Llama whose MLP blocks are made by a function of the original block."""
    model = tiny_model("llama", **values)
    for layer in model.model.layers:
        layer.mlp = make(layer.mlp)
    return model


class _Multiplied(nn.Module):
    """Falcon-H1's and Inkling's: factors before the activation, at the up map and at the output; one of them learned."""

    def __init__(self, inner, before=0.7, up=1.0, after=1.3):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.before, self.up, self.after = before, up, after
        self.global_scale = nn.Parameter(torch.tensor([0.4]))

    def forward(self, x):
        hidden = nn.functional.silu(self.gate_proj(x) * self.before) * self.up_proj(x) * self.up
        return self.down_proj(hidden) * (self.global_scale if self.after is None else self.after)


def test_multipliers_are_found_among_the_numbers_of_module_and_config():
    model = replaced_blocks(_Multiplied)
    block = find_blocks(model)[1].block
    assert (block.encoder.scale, block.encoder_up.scale, block.decoder.scale) == (0.7, 1.0, 1.3)
    assert prove_block(model, block) <= TOLERANCE
    torch.testing.assert_close(block.decoder.weight(model.base_model), model.model.layers[1].mlp.down_proj.weight * 1.3)


def test_a_learned_scale_is_found_by_its_parameter_and_proven_on_its_value():
    model = replaced_blocks(lambda inner: _Multiplied(inner, up=0.3, after=None))
    block = find_blocks(model)[0].block
    assert block.decoder.scaled_by == "layers.0.mlp.global_scale" and block.encoder_up.scale == 0.3
    assert prove_block(model, block) <= TOLERANCE
    model.model.layers[0].mlp.global_scale.data.fill_(-2.0)
    assert prove_block(model, block) <= TOLERANCE


def test_a_factor_that_is_nowhere_said_is_refused():
    class Secret(_Multiplied):
        def forward(self, x):
            return super().forward(x) * 0.123

    assert find_blocks(replaced_blocks(Secret))[0].block is None


def test_a_layer_with_another_setting_is_looked_at_by_itself():
    model = replaced_blocks(_Multiplied)
    model.model.layers[1].mlp.after = 2.5
    assert [finding.block.decoder.scale for finding in find_blocks(model)] == [1.3, 2.5]


class _Norm(nn.Module):
    """BitNet's: a norm between the maps."""

    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.norm = nn.RMSNorm(inner.down_proj.in_features)

    def forward(self, x):
        return self.down_proj(self.norm(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


def test_a_clamp_that_only_large_values_reach_is_found():
    class Clamped(_Scaled):
        def forward(self, x):
            gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
            return self.down_proj(nn.functional.silu(gate) * up)

    assert "it clamps large values" in find_blocks(replaced_blocks(Clamped))[0].reason


def test_a_norm_between_the_maps_is_refused_by_its_name():
    assert "RMSNorm stands between its maps" in find_blocks(replaced_blocks(_Norm))[0].reason


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_block_that_adds_the_residual_itself_is_replaced_map_by_map(family):
    model = tiny_models.tiny_model(family)
    block = find_blocks(model)[0].block
    assert len(block.bypass) == 2 and block.holder_path == block.path.rpartition(".")[0]
    assert prove_block(model, block) <= TOLERANCE


def test_what_an_activation_has_learned_is_taken_along():
    from mxdsurgery.planning.plan import plan_layer
    from mxdsurgery.recipe import Recipe
    from mxdsurgery.training.initialize import initial_layer, measure_statistics

    model = tiny_models.tiny_model("apertus")
    block = find_blocks(model)[0].block
    assert block.activation == "xielu" and block.activation_path == "layers.0.mlp.act_fn"
    assert prove_block(model, block) <= TOLERANCE
    recipe = Recipe(model="x", data="x", n_experts=8, k=2)
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    statistics = measure_statistics(model, [block], [ids])[0]
    layer = initial_layer(model, plan_layer(block, recipe), recipe, statistics)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer.hidden(x), block.hidden(model.base_model, x), rtol=1e-5, atol=1e-6)


def test_a_vision_tower_of_as_many_layers_is_not_taken_for_the_decoder():
    path, _ = decoder_layers(model_skeleton(tiny_models.tiny_config("got_ocr2")))
    assert path.startswith("language_model")


def test_blocks_that_layers_share_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert [finding.reason for finding in find_blocks(model)] == ["shares its block with layers [0, 1]"] * 2


def test_the_dense_layers_of_a_mixed_model_are_found_and_the_others_named():
    findings = find_blocks(model_skeleton(tiny_models.tiny_config("lfm2_moe")))
    assert [finding.block is not None for finding in findings] == [True, True, False, False]
    assert findings[2].reason.startswith("is a mixture of experts")


class _OwnLinear(nn.Module):
    """A linear map of one's own, weights stored (in, out)."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.T.clone()), None

    def forward(self, x):
        return x @ self.weight


class _Foreign(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.second, self.third = (
            _OwnLinear(inner.up_proj),
            _OwnLinear(inner.gate_proj),
            _OwnLinear(inner.down_proj),
        )

    def forward(self, x):
        return self.third(torch.tanh(self.second(x)) * self.first(x))


def test_a_registered_family_says_what_the_structure_does_not(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    model = replaced_blocks(_Foreign)
    assert find_blocks(model)[0].block is None
    register_family("llama", Family("its linear maps are a class of its own", linears={"_OwnLinear": True}, block="mlp"))
    block = find_blocks(model)[1].block
    assert block.encoder.path == "layers.1.mlp.second" and block.encoder.transposed and block.activation == "tanh"
    assert prove_block(model, block) <= TOLERANCE
    with pytest.raises(UnknownFamilyError, match="registered already"):
        register_family("llama", Family("again"))
    with pytest.raises(UnknownFamilyError, match="without a model_type or a reason"):
        register_family("other", Family(""))


def test_a_registered_family_may_name_its_layers_or_be_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register_family("llama", Family("two lists are as long", layers="layers"))
    assert decoder_layers(tiny_model("llama"))[0] == "layers"
    register_family("gpt2", Family("for this test", refused="is not to be converted"))
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(NotCausalLMError, match="is not to be converted"):
        load_config(str(tmp_path))
    with pytest.raises(UnknownFamilyError, match="no module 'elsewhere'"):
        register_family("opt", Family("wrong", layers="elsewhere"))
        decoder_layers(tiny_model("opt"))


def test_a_model_that_reads_the_tokens_to_come_is_refused(tmp_path):
    model = tiny_model("llama")
    check_causal("right", model)
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, *_, **__: (hidden_states.flip(1), None)
    with pytest.raises(NotCausalLMError, match="reads the tokens to come"):
        check_causal("wrong", model)


def test_an_encoder_is_refused_and_says_so(tmp_path):
    tiny_models.tiny_model("roberta").save_pretrained(tmp_path)
    with pytest.raises(NotCausalLMError, match="is an encoder"):
        find_blocks(model_skeleton(load_config(str(tmp_path))))
