"""The sweep: each expert's figures are those of the whole model without it, although much is not computed again."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, N, S, T, coefficients, tiny_opened

from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.editing.held import SweepBytes
from mxdsurgery.editing.sweep import _Counts, _ranked, _Unedited, ablate_each, survey_layer, sweep, sweep_table
from mxdsurgery.errors import LayerSelectionError, MemoryBudgetError, UnsupportedBlockError
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.terminal.console import ProgressLine, Reporter


def swept(opened, layer, most=S, seed=0):
    survey = survey_layer(opened, layer, most, torch.Generator().manual_seed(seed), ProgressLine())
    return survey, ablate_each(opened, layer, survey, ProgressLine())


@torch.no_grad()
def without(model, ids, layer, expert):
    """ΔCE and KL of each context when the whole model runs without an expert: (S,), (S,)."""
    log_p = model(input_ids=ids, use_cache=False).logits[:, 1:-1].double().log_softmax(-1)
    with model.mxd.ablate({layer: [expert]}):
        log_q = model(input_ids=ids, use_cache=False).logits[:, 1:-1].double().log_softmax(-1)
    ce = [-log.gather(2, ids[:, 2:, None]).sum((1, 2)) for log in (log_p, log_q)]
    return ce[1] - ce[0], (log_p.exp() * (log_p - log_q)).sum((1, 2))


def check_all_experts(opened, layer, sums, experts=range(N)):
    # to fp64's rounding, or to fp32's of a small part where a family's attention computes in fp32 (GPT-Neo)
    for expert in experts:
        delta_ce, kl = without(opened.model, opened.input_ids, layer, expert)
        assert sums.delta_ce[expert].item() == pytest.approx(delta_ce.sum().item(), abs=1e-9, rel=1e-8)
        assert sums.kl[expert].item() == pytest.approx(kl.sum().item(), rel=1e-6, abs=1e-10)
        assert sums.kl_squares[expert].item() == pytest.approx(kl.square().sum().item(), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_the_whole_model_without_the_expert_in_every_family(family):
    opened = tiny_opened(family)
    for layer in (0, 1):
        survey, sums = swept(opened, layer)
        assert sums.kl.max() > 1e-3  # there is something to compare
        check_all_experts(opened, layer, sums, survey.contexts.topk(3).indices.tolist() + [int(survey.expert[0])])
        run = _Unedited(opened, layer, opened.input_ids)
        assert run.resumes_midway() and len(run.modules) > layer + 1  # the shortcuts are in use


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip-transcoder", "topk-sae", "molt"])
def test_every_expert_of_every_kind_is_measured(kind):
    opened = tiny_opened("gpt2", kind=kind)
    survey, sums = swept(opened, 0)
    check_all_experts(opened, 0, sums)
    assert sums.measured.tolist() == survey.contexts.tolist()


def test_a_sliding_window_that_is_shorter_than_the_context_is_kept():
    opened = tiny_opened("mistral", sliding_window=6)
    survey, sums = swept(opened, 0)
    check_all_experts(opened, 0, sums, survey.contexts.topk(4).indices.tolist())


def test_a_module_that_runs_before_and_after_the_block_is_not_taken_for_known():
    opened = tiny_opened("phi")
    layer = opened.decoder[0]
    assert layer.resid_dropout not in _Unedited(opened, 0, opened.input_ids).modules


def test_an_expert_that_fires_at_position_0_only_is_measured_and_has_no_firings():
    opened = tiny_opened("llama")
    a = coefficients(opened, 0)
    opened.converted.layers[0].gate.weight.data[5] = 0
    opened.converted.layers[0].gate.bias.data[5] = -1e3
    handle = opened.converted.layers[0].gate.register_forward_hook(at_position_0(5))
    survey = survey_layer(opened, 0, S, torch.Generator().manual_seed(0), ProgressLine())
    sums = ablate_each(opened, 0, survey, ProgressLine())
    (row,) = [row for row in _ranked(survey, sums, 1, 1) if row["expert"] == 5]
    assert a[:, 1:, 5].any()  # without the hook, the gate would choose it elsewhere
    assert row["fired"] == 0 and row["contexts"] == S and row["token"] is None and row["kl_per_firing"] is None
    handle.remove()
    log_p = opened.model(input_ids=opened.input_ids).logits[:, 1:-1].log_softmax(-1)
    handle = opened.converted.layers[0].gate.register_forward_hook(at_position_0(5))
    log_q = opened.model(input_ids=opened.input_ids).logits[:, 1:-1].log_softmax(-1)
    handle.remove()
    # Here "without" is the plain run, and "with" the hooked one.
    assert row["kl"] == pytest.approx(1000 * (log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-6)


def at_position_0(expert):
    """A hook that lets an expert fire at position 0 as well."""

    def hook(_module, _inputs, a):
        values = torch.zeros_like(a.values[..., :1])
        values[:, 0] = 0.7
        joined = torch.cat([a.values, values], -1), torch.cat([a.indices, torch.full_like(a.indices[..., :1], expert)], -1)
        return type(a)(*joined)

    return hook


@pytest.mark.parametrize("batch", [1, T, 5 * T, 1000 * T])
def test_the_batch_changes_nothing(batch):
    _, wanted = swept(tiny_opened("gpt2"), 1)
    _, found = swept(tiny_opened("gpt2", batch=batch), 1)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.delta_ce, wanted.delta_ce, rtol=1e-7, atol=1e-12)


def test_where_passes_cannot_begin_midway_they_begin_at_the_start(monkeypatch):
    opened, resumed, starts = tiny_opened("llama"), _Unedited._resumed, []

    def broken(self, y, rows, start):
        starts.append(start)
        logits = resumed(self, y, rows, start)
        return logits + torch.randn_like(logits) if start else logits

    monkeypatch.setattr(_Unedited, "_resumed", broken)
    survey, sums = swept(opened, 0)
    check_all_experts(opened, 0, sums, survey.contexts.topk(4).indices.tolist())
    assert starts[0] == T // 2 and not any(starts[1:])


def test_a_model_that_cannot_be_taken_up_at_a_layer_is_refused(monkeypatch):
    resumed = _Unedited._resumed
    monkeypatch.setattr(_Unedited, "_resumed", lambda *given: resumed(*given).flip(-1))
    with pytest.raises(UnsupportedBlockError, match="does not give the same predictions"):
        swept(tiny_opened("llama"), 1)


def test_a_layer_whose_experts_never_fire_has_nothing_to_measure():
    opened = tiny_opened("llama")
    opened.converted.layers[0].gate.bias.data.fill_(-1e9)
    survey, sums = swept(opened, 0)
    assert len(survey.expert) == 0 and not sums.measured.any() and _ranked(survey, sums, 1, 1) == []


def test_counts_are_those_of_the_gate():
    opened = tiny_opened("gpt2")
    fires = coefficients(opened, 1) > 0
    survey = survey_layer(opened, 1, S, torch.Generator().manual_seed(0), ProgressLine())
    assert survey.fired.tolist() == fires[:, 1:].sum((0, 1)).tolist()
    assert survey.contexts.tolist() == fires.any(1).sum(0).tolist()
    for expert in range(N):
        tokens = opened.input_ids[:, 1:][fires[:, 1:, expert]]
        if len(tokens):
            counts = torch.bincount(tokens)
            assert survey.token[expert] == counts.argmax() and survey.token_fired[expert] == counts.max()
        else:
            assert survey.token[expert] == -1
    for expert, context, first in zip(survey.expert, survey.context, survey.first, strict=True):
        assert first == fires[context, :, expert].int().argmax()


def test_counts_that_are_added_up_in_between_are_the_same(monkeypatch):
    codes = torch.randint(0, 60, (40, 50), generator=torch.Generator().manual_seed(0))
    whole, often = _Counts(), None
    monkeypatch.setattr("mxdsurgery.editing.sweep._COUNTS", 7)
    often = _Counts()
    for part in codes:
        whole.add(part)
        often.add(part)
    for ours, others in zip(whole.largest(6, 10), often.largest(6, 10), strict=True):
        assert ours.tolist() == others.tolist()
    counts = torch.bincount(codes.flatten(), minlength=60).view(6, 10)
    assert often.largest(6, 10)[1].tolist() == counts.amax(1).tolist()
    assert often.largest(6, 10)[0].tolist() == counts.argmax(1).tolist()


def test_estimates_from_few_contexts_are_unbiased():
    opened = tiny_opened("gpt2")
    survey, exact = swept(opened, 0)
    draws = 60
    estimates = torch.zeros(draws, N, dtype=torch.float64)
    errors = torch.zeros(draws, N, dtype=torch.float64)
    for seed in range(draws):
        some, sums = swept(opened, 0, most=2, seed=seed)
        assert sums.measured.tolist() == survey.contexts.clamp_max(2).tolist()
        for row in _ranked(some, sums, 1000, 1):
            estimates[seed, row["expert"]], errors[seed, row["expert"]] = row["kl"], row["kl_error"]
    spread = estimates.std(0)
    assert ((estimates.mean(0) - exact.kl).abs() <= 4 * spread / draws**0.5 + 1e-12).all()
    assert (spread > 0).any()
    # The standard error that each draw claims, in the mean square, is the spread that the draws have.
    assert errors.square().mean(0).sum() == pytest.approx(spread.square().sum(), rel=0.25)


def test_what_was_measured_on_all_contexts_has_no_error_and_one_of_many_an_unknown_one():
    opened = tiny_opened("gpt2")
    survey, sums = swept(opened, 0)
    rows = _ranked(survey, sums, S * (T - 2), S * (T - 1))
    assert all(row["kl_error"] == 0 and row["measured"] == row["contexts"] for row in rows)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    one = rows[0]
    assert one["kl"] == pytest.approx(1000 * sums.kl[one["expert"]].item() / (S * (T - 2)))
    assert one["kl_per_firing"] == pytest.approx(sums.kl[one["expert"]].item() / one["fired"])
    survey, sums = swept(opened, 0, most=1)
    many = [row for row in _ranked(survey, sums, 1, 1) if row["contexts"] > 1]
    assert many and all(row["kl_error"] is None and row["measured"] == 1 for row in many)


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    return shutil.copytree(converted.out, tmp_path_factory.mktemp("swept") / "demo")


@pytest.fixture(scope="module")
def result(folder):
    return sweep(folder, layer=-2, tokens=384, contexts_per_expert=3, device="cpu")


def test_a_folder_is_swept_and_the_result_kept_in_it(folder, result):
    assert result["layer"] == 2 and result["sequences"] == 3 and result["tokens"] == 3 * (result["context"] - 2)
    assert json.loads((folder / "effects" / "sweep-layer2.json").read_text()) == result
    rows = result["experts"]
    assert len(rows) + result["never_fired"] == 256
    assert sum(row["measured"] for row in rows) == result["pairs"]
    assert all(row["frequency"] == row["fired"] / (3 * (result["context"] - 1)) for row in rows)
    assert all(0 < row["share"] <= 1 and isinstance(row["token"], str) for row in rows if row["fired"])


def test_a_folders_figures_are_those_of_the_whole_model(folder, result, converted):
    loaded = load(folder, dtype="float32")
    ids = held_out(loaded, converted.recipe, None, 384)
    rows = result["experts"]
    for row in (rows[0], rows[1], rows[len(rows) // 2]):
        delta_ce, kl = without(loaded.model, ids, 2, row["expert"])
        assert row["kl"] == pytest.approx(1000 * kl.sum().item() / result["tokens"], rel=1e-3, abs=1e-6)
        assert row["delta_ce"] == pytest.approx(1000 * delta_ce.sum().item() / result["tokens"], rel=1e-3, abs=1e-4)


def test_the_table_shows_the_first_rows(result):
    from rich.console import Console

    odd = dict(result["experts"][0], token="[/b]", kl_error=None)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(sweep_table(result | {"experts": [odd, *result["experts"][1:]]}, top=3))
    text = console.export_text()
    assert "'[/b]'" in text and str(result["experts"][2]["expert"]) in text and "Layer 2" in text
    assert sweep_table(result, top=3).row_count == 3


def test_a_layer_without_experts_is_named(folder):
    with pytest.raises(LayerSelectionError, match="no experts in some of the layers 3"):
        sweep(folder, layer=3, tokens=1024)


def test_ctrl_c_leaves_nothing_behind(converted, tmp_path):
    folder = shutil.copytree(converted.out, tmp_path / "demo")

    class Impatient(Reporter, ProgressLine):
        def progress(self, label, unit):
            self.label = label
            return super().progress(label, unit) if label != "sweep" else _entered(self)

        def update(self, done, total, note=""):
            raise KeyboardInterrupt

    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, layer=1, tokens=1024, contexts_per_expert=1, device="cpu", reporter=Impatient())
    assert sorted(path.name for path in folder.rglob("*")) == before


def _entered(line):
    import contextlib

    return contextlib.nullcontext(line)


def test_an_interrupted_sweep_leaves_the_model_as_it_was():
    opened = tiny_opened("llama")

    class Impatient(ProgressLine):
        def update(self, done, total, note=""):
            raise KeyboardInterrupt

    survey = survey_layer(opened, 1, S, torch.Generator().manual_seed(0), ProgressLine())
    before = opened.model(input_ids=opened.input_ids).logits
    with pytest.raises(KeyboardInterrupt):
        ablate_each(dataclasses.replace(opened, batch=T), 1, survey, Impatient())
    assert torch.equal(opened.model(input_ids=opened.input_ids).logits, before)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in opened.model.modules())
    assert F.cross_entropy(before.flatten(0, 1), opened.input_ids.flatten()).isfinite()


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_it_holds_is_bounded_and_as_the_arithmetic_says(family, monkeypatch):
    """With few positions left, many pairs would fit a batch: each of them needs all that is cached of its context."""
    opened = tiny_opened(family, batch=1000 * T)
    held, resumed, kept, run, starts = SweepBytes.of(opened, 1), _Unedited._resumed, [], [], set()

    def recording(self, y, rows, start):
        cached = [tensor for _, *pair in self.cached if start for tensor in pair]
        copied = sum(bytes_of(tensor) // len(tensor) * len(rows) * start // T for tensor in cached)
        logits = resumed(self, y, rows, start)
        run.append((copied + bytes_of(logits), len(rows) * held.pair_bytes(start)))
        kept.append((bytes_of(self.logits, self.p), len(self.ids)))
        starts.add(start)
        return logits

    monkeypatch.setattr(_Unedited, "_resumed", recording)
    monkeypatch.setattr("mxdsurgery.editing.held.HELD_BYTES", 40 * T * held.run)
    _, wanted = swept(tiny_opened(family), 1)
    run.clear()
    _, found = swept(opened, 1)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-7, atol=1e-12)
    assert all(real <= said for real, said in run) and max(starts) > T // 2
    unbounded = max(1000 * T // (T - start) * held.pair_bytes(start) for start in starts)
    assert max(said for _, said in run) <= 40 * T * held.run < unbounded
    assert all(logits <= contexts * held.kept * T <= 40 * T * held.run for logits, contexts in kept)


def test_a_large_model_s_cache_and_vocabulary_bound_a_pass():
    """Llama-3.2-3B's shape: 28 layers with 8 heads of 128 for keys and values, contexts of 1,024, a batch of 8,192."""
    cached, logits = 2 * 8 * 128 * 2, 128_256 * 2
    shape = SweepBytes(1024, 128_256 * 10 + 28 * cached, 28 * cached, logits + 28 * cached, 6 * 128_256 * 4)
    assert 8192 * shape.copied * 1023 > 900e9  # what a batch of last positions would have copied
    assert shape.pairs(8192, 1023) == 2**30 // shape.pair_bytes(1023) == 9
    assert shape.contexts(8192) == 1 and shape.peak(8192) < 6 * 2**30
    assert dataclasses.replace(shape, kept=2**10).contexts(8192) == 8


def test_what_does_not_fit_is_refused_before_the_text_is_run(converted, monkeypatch):
    monkeypatch.setattr("mxdsurgery.editing.held.free_memory", lambda device: 2**20)
    monkeypatch.setattr("mxdsurgery.editing.sweep.survey_layer", None)
    with pytest.raises(MemoryBudgetError, match="beside the model, and 1 MiB are free on cpu"):
        sweep(converted.out, layer=1, device="cpu")


def test_logits_bound_a_pass_over_the_text(monkeypatch):
    opened = tiny_opened("gpt2", batch=3 * T)
    assert {len(ids) for ids in opened.batches()} <= {3, S % 3}
    monkeypatch.setattr("mxdsurgery.editing.predictions.HELD_BYTES", 2 * 2 * T * vocabulary_size(opened.model) * 8)
    assert {len(ids) for ids in opened.batches()} <= {2, S % 2}
