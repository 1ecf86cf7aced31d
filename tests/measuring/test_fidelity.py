"""The figures: exact where they can be, by their definitions, and without flattery."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import batches, tiny_model, train

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.scores import likeliest
from mxdsurgery.base.surgery import ConstantOutput, FrozenExperts, replaced, resumed_at
from mxdsurgery.layers.sparse import CHUNK_BYTES
from mxdsurgery.measuring.controls import SHARES
from mxdsurgery.measuring.fidelity import Measurement, measure
from mxdsurgery.measuring.scoring import run_original
from mxdsurgery.measuring.usage import UsageSums
from mxdsurgery.planning.effort import Alone

IDS = torch.cat(list(itertools.islice(batches(seed=5), 2)))


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def measured(request):
    model = tiny_model(request.param)
    layers, _, blocks = train(model, steps=60)
    layers = {index: layer.eval().requires_grad_(False) for index, layer in layers.items()}
    return model, blocks, layers, measure(model, blocks, layers, IDS, batch=256)


def cross_entropy(model):
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return F.cross_entropy(logits[:, 1:-1].flatten(0, 1).double(), IDS[:, 2:].flatten()).item()


def test_the_original_blocks_put_back_cost_exactly_nothing():
    model = tiny_model("llama")
    layers, _, blocks = train(model, steps=3)
    for block in blocks:  # a layer to look at, that computes what the block does
        layers[block.layer].forward = model.base_model.get_submodule(block.path).forward
    result = measure(model, blocks, layers, IDS, batch=256)
    for entry in [result["all"], *result["layers"]]:
        assert entry["delta_ce"] == entry["kl"] == entry["nmse"] == 0.0
        assert entry["jacobian_nmse"] < 1e-9
        assert entry["top1_agreement"] == 1.0
        assert entry["delta_ce_ci"] == [0.0, 0.0]
        assert entry["loss_recovered"] in (1.0, None) and entry["loss_recovered_ci"] in ([1.0, 1.0], None)


def test_delta_ce_is_the_difference_of_two_plain_cross_entropies(measured):
    model, blocks, layers, result = measured
    original = cross_entropy(model)
    assert result["original"]["ce"] == pytest.approx(original, abs=1e-6)
    with replaced(model, blocks, layers):
        assert result["all"]["delta_ce"] == pytest.approx(cross_entropy(model) - original, abs=1e-6)
    for entry in result["layers"]:
        with replaced(model, blocks, {entry["layer"]: layers[entry["layer"]]}):
            assert entry["delta_ce"] == pytest.approx(cross_entropy(model) - original, abs=1e-6)


def test_a_layers_nmse_and_best_constant_are_those_of_its_definition(measured):
    model, blocks, layers, result = measured
    for entry in result["layers"]:
        index = entry["layer"]
        x, y = (t[:, 1:].flatten(0, 1).double() for t in record_activations(model, blocks, IDS)[index])
        layer = copy.deepcopy(layers[index]).double()
        error = (layer(x) - y).square().sum() / y.square().sum()
        assert entry["nmse"] == pytest.approx(error.item(), rel=1e-4)
        errors = (layer(x) - y).square().sum(-1) / y.square().sum(-1)
        assert entry["median_error"] == pytest.approx(errors.flatten().median().item(), rel=1e-3)
        variance = (y - y.mean(0)).square().sum() / y.square().sum()
        assert entry["fvu"] == pytest.approx((error / variance).item(), rel=1e-4)
        m = layer.decoder(layer.hidden(x))
        c = torch.linalg.lstsq(m.T[:, :, None], (y - layer.bias).T[:, :, None]).solution.squeeze()  # one problem per dimension
        constant = (c * m + layer.bias - y).square().sum() / y.square().sum()
        assert entry["constant_gate_nmse"] == pytest.approx(constant.item(), rel=1e-4)


def test_the_nmse_of_all_layers_is_the_mean_of_each_ones_with_all_in_place(measured):
    model, blocks, layers, result = measured
    original = record_activations(model, blocks, IDS)
    with replaced(model, blocks, layers):
        inputs = run_with_inputs(model, layers)
    nmse = []
    for block in blocks:
        y = original[block.layer].y[:, 1:].double()
        with torch.no_grad():
            y_hat = layers[block.layer](inputs[block.layer])[:, 1:].double()
        nmse.append(((y_hat - y).square().sum() / y.square().sum()).item())
    assert [entry["nmse_together"] for entry in result["layers"]] == pytest.approx(nmse, rel=1e-4)
    assert result["all"]["nmse"] == pytest.approx(sum(nmse) / len(nmse), rel=1e-4)  # the largest outputs do not decide


def run_with_inputs(model, layers):
    """What each layer is given when all are in place: by layer index (B, T, D)."""
    inputs = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, index=index: inputs.__setitem__(index, args[0].view(*IDS.shape, -1))
        )
        for index, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


def test_expert_share_and_loss_recovered_follow_from_the_other_figures(measured):
    for entry in [measured[3]["all"], *measured[3]["layers"]]:
        ce, constant, zero = entry["delta_ce"], entry["constant_gate_delta_ce"], entry["zero_delta_ce"]
        if entry["expert_share"] is not None:
            assert entry["expert_share"] == pytest.approx((constant - ce) / (zero - ce))
        if entry["loss_recovered"] is not None:
            assert entry["loss_recovered"] == pytest.approx(1 - ce / zero)
        certain = entry["zero_delta_ce_ci"][0] > 0
        assert (entry["loss_recovered"] is not None) == certain


def test_every_figure_has_an_interval_around_it_and_says_its_tokens(measured):
    result = measured[3]
    assert result["tokens"] == IDS.shape[0] * (IDS.shape[1] - 2)
    for entry in [result["all"], *result["layers"]]:
        shares = {"expert_share", "loss_recovered", *SHARES.values()}
        figures = [name for name in entry if f"{name}_ci" in entry]
        assert {"delta_ce", "kl", "top1_agreement", "nmse", "constant_gate_delta_ce", *shares} <= set(figures)
        for name in figures:
            if entry[name] is None:
                assert name in shares and entry[f"{name}_ci"] is None
            else:
                low, high = entry[f"{name}_ci"]
                assert low <= entry[name] <= high
        assert 0 < entry["l0"] <= 4
        assert sum(entry["firing_frequency"].values()) + entry["dead_share"] == pytest.approx(1.0)


def naive_figures(model, blocks, modules, ids):
    """Cross-entropy, KL(original ‖ it) and agreement, from whole logits in float64, each position for itself."""
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[:, 1:-1].double().log_softmax(-1)
        with replaced(model, blocks, modules):
            log_q = model(input_ids=ids).logits[:, 1:-1].double().log_softmax(-1)
    ce = -log_q.gather(-1, ids[:, 2:, None]).mean().item()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return ce, kl, (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("held", [2**28, 1])  # variants held in memory: all at once, and one at a time
def test_figures_in_parts_are_those_of_whole_logits(measured, monkeypatch, held):
    model, blocks, layers, _ = measured
    monkeypatch.setattr("mxdsurgery.measuring.scoring.HELD_BYTES", held)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 64 * 7)  # seven positions of 64 words go through the head at a time
    result = measure(model, blocks, layers, IDS, batch=256)
    recorded = record_activations(model, blocks, IDS)
    outputs = {index: pair.y[:, 1:].mean((0, 1)) for index, pair in recorded.items()}
    original = cross_entropy(model)
    for entry, subset in [(result["all"], blocks), *zip(result["layers"], ([block] for block in blocks), strict=True)]:
        ce, kl, agree = naive_figures(model, subset, {block.layer: layers[block.layer] for block in subset}, IDS)
        assert entry["delta_ce"] == pytest.approx(ce - original, abs=1e-6)
        assert entry["kl"] == pytest.approx(kl, rel=1e-4) and entry["top1_agreement"] == pytest.approx(agree)
        for name, value in (("zero", 0.0), ("mean", 1.0)):
            ablated = {block.layer: ConstantOutput(value * outputs[block.layer]) for block in subset}
            for layer, module in ablated.items():
                module.first = recorded[layer].y[:, :1]
            ce, _, _ = naive_figures(model, subset, ablated, IDS)
            assert entry[f"{name}_delta_ce"] == pytest.approx(ce - original, abs=1e-5)


def test_what_layers_are_compared_with_keeps_what_stands_at_position_0(measured):
    """There real models have an attention sink: without it they break, and any layer would look faithful."""
    model, blocks, layers, _ = measured
    block, layer = blocks[0], layers[blocks[0].layer]
    own, spoilt = (measure(model, [block], {block.layer: of}, IDS, 256)["all"] for of in (layer, _SpoilsPosition0(layer)))
    assert own["zero_delta_ce"] == spoilt["zero_delta_ce"]  # with the block's own output there
    pair = record_activations(model, [block], IDS)[block.layer]
    sums = UsageSums()
    sums.add(layer, *(part[:, 1:].flatten(0, 1) for part in (pair.x, pair.y.double())))
    frozen = FrozenExperts(layer, sums.usage().best_constant)
    for of, found in ((layer, own), (_SpoilsPosition0(layer), spoilt)):
        ce, _, _ = naive_figures(model, [block], {block.layer: _FirstOf(of, frozen)}, IDS)
        assert found["constant_gate_delta_ce"] == pytest.approx(ce - cross_entropy(model), abs=1e-5)


class _FirstOf(torch.nn.Module):
    def __init__(self, layer, other):
        super().__init__()
        self.layer, self.other = layer, other

    def forward(self, x):
        y = self.other(x).clone()
        _first(y).copy_(_first(self.layer(x)))
        return y


def test_single_layers_on_fewer_contexts_are_measured_on_a_sample_spread_over_all(measured):
    model, blocks, layers, every = measured
    length = IDS.shape[1]
    result = measure(model, blocks, layers, IDS, batch=256, alone=Alone(tokens=4 * length + 1))
    assert result["all"] == every["all"] and result["tokens"] == every["tokens"]
    chosen = IDS[[len(IDS) * part // 8 for part in (1, 3, 5, 7)]]
    of_sample = measure(model, blocks, layers, chosen, batch=256)
    for entry, same in zip(result["layers"], of_sample["layers"], strict=True):
        assert entry["tokens"] == same["tokens"] == 4 * (length - 2)
        for name in ("delta_ce", "kl", "top1_agreement", "zero_delta_ce"):
            assert entry[name] == pytest.approx(same[name], rel=1e-6)
    # Usage of experts comes from the pass for statistics, which covers all contexts anyway.
    assert [entry["dead_share"] for entry in result["layers"]] == [entry["dead_share"] for entry in every["layers"]]


def test_what_is_announced_is_what_is_done(measured):
    model, blocks, layers, _ = measured
    measurement = Measurement(model, blocks, [layers], IDS, 256, alone=Alone(tokens=2 * IDS.shape[1]))
    said = []
    measurement.run(lambda done, total: said.append((done, total)))
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1][0] == pytest.approx(said[-1][1]) and len({total for _, total in said}) == 1
    words = measurement.announcement()
    scored = IDS.shape[1] - 2
    assert f"all layers together on {len(IDS) * scored:,} tokens, each alone on {2 * scored:,}: about " in words
    assert measurement.tokens_alone == 2 * IDS.shape[1]
    for seconds in (0.0, 1e9):  # so few contexts are all measured, however long it takes
        assert Measurement(model, blocks, [layers], IDS, 256, alone=Alone(seconds=seconds)).contexts_alone == len(IDS)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 200, 4096])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary):
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16()  # in which many are equal
    assert (logits == logits.amax(-1, keepdim=True)).sum() >= 50
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(likeliest(logits), first)


def test_the_model_holds_its_own_blocks_afterwards(measured):
    model, blocks, layers, _ = measured
    assert not any(module in layers.values() for module in model.modules())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_position_0_does_not_count():
    model = tiny_model("llama")
    layers, _, blocks = train(model, steps=20)
    one = measure(model, blocks, layers, IDS[:, :3], batch=256)
    assert one["tokens"] == len(IDS)
    # Whatever the layers make of the first token: with position 0 alone spoilt, the layer's own error is unchanged.
    spoilt = {index: _SpoilsPosition0(layer) for index, layer in layers.items()}
    same = measure(model, blocks[1:], spoilt, IDS, batch=256)["layers"][0]["nmse"]
    assert same == pytest.approx(measure(model, blocks[1:], layers, IDS, batch=256)["layers"][0]["nmse"])


class _SpoilsPosition0(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.gate, self.experts = layer, layer.gate, layer.experts
        self.dense_path, self.coefficients, self.combine = layer.dense_path, layer.coefficients, layer.combine
        self.mixture = layer.mixture

    def forward(self, x):
        y = self.layer(x).clone()
        _first(y).fill_(1e4)
        return y


def _first(y):
    """What stands at position 0 of contexts, or of first tokens alone."""
    return y[:, 0] if y.dim() == 3 else y.view(-1, IDS.shape[1], y.shape[-1])[:, 0]


def test_a_run_resumed_above_the_unchanged_layers_is_the_whole_run():
    model = tiny_model("gpt2")
    layers, _, blocks = train(model, steps=3)
    _, decoder = decoder_layers(model)
    outputs = run_original(model, blocks, IDS).layer_outputs
    with torch.no_grad(), replaced(model, blocks[1:], layers):
        whole = model(input_ids=IDS, use_cache=False).logits
        with resumed_at(decoder, 1, outputs):
            resumed = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(whole, resumed)
    assert not any("forward" in vars(layer) for layer in decoder)


def test_an_exception_while_replaced_leaves_the_model_whole():
    model = tiny_model("opt")
    layers, _, blocks = train(model, steps=2)
    before = dict(model.named_modules())
    with pytest.raises(ZeroDivisionError), replaced(model, blocks, layers):
        assert dict(model.named_modules()) != before
        raise ZeroDivisionError
    assert dict(model.named_modules()) == before


def test_finding_blocks_twice_is_the_same():
    model = tiny_model("llama")
    assert find_blocks(model) == find_blocks(model)


def test_the_jacobians_error_is_that_of_whole_jacobians(measured):
    """Of every token's (D, D) Jacobian, by autograd through the block itself; `jacobian_nmse` takes some directions."""
    model, blocks, layers, result = measured
    assert result["jacobian_inputs"] == IDS.shape[0] * (IDS.shape[1] - 1)  # all that there are
    for entry in result["layers"]:
        block = blocks[entry["layer"]]
        x = record_activations(model, [block], IDS[:16])[block.layer].x[:, 1:].flatten(0, 1)
        module = model.base_model.get_submodule(block.path)
        if block.bypass:  # it is no module of its own
            decoder = model.base_model.get_submodule(block.holder_path)
            module = torch.nn.Sequential(decoder.fc1, decoder.activation_fn, decoder.fc2)
        own, new = (torch.func.vmap(torch.func.jacrev(one))(x) for one in (module, layers[block.layer]))
        whole = (new - own).square().sum() / own.square().sum()
        assert entry["jacobian_nmse"] == pytest.approx(whole.item(), rel=0.1)
        low, high = entry["jacobian_nmse_ci"]
        assert 0 < low < entry["jacobian_nmse"] < high and high - low < 0.2 * high
    every = [entry["jacobian_nmse"] for entry in result["layers"]]
    assert result["all"]["jacobian_nmse"] == pytest.approx(sum(every) / len(every))
