"""Rare properties of models and texts: converted and measured all the same, or refused by name."""

import json
import math
import time
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import dispatch_model
from running import without_reloads
from tiny import RECIPE, export_tiny, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mxdsurgery
from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.config import load_config
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.model import check_context, load_tokenizer, open_model
from mxdsurgery.base.offload import execution_device, is_offloaded
from mxdsurgery.base.proof import prove_block
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.errors import DataError, NotCausalLMError, RecipeError, WeightsError
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.text import packing
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.sources import TextStream, documents, token_strings
from mxdsurgery.training.initialize import initial_layer, measure_statistics

# A conversion of a second: one layer, 20 steps.
QUICK = {"layers": "0", "context": 16, "batch": 256, "tokens": 5120, "eval_tokens": 512, "n_experts": 16, "k": 4}


@pytest.fixture(autouse=True)
def not_reloaded(monkeypatch):
    """Other tests reload what is exported in a process of its own; here one does."""
    without_reloads(monkeypatch)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\nclass A:\n    pass\n" * 1500)
    return path


@pytest.fixture
def convert(tmp_path, text):
    """Converts a tiny base model in a few steps and loads the result: the conversion and what was loaded."""

    def run(base, **options):
        out = tmp_path / "out"
        options = QUICK | {"data": str(text), "device": "cpu", "out": str(out), "overwrite": True} | options
        return mxdsurgery.convert(str(base), **options), load(out)

    return run


def base_model(folder, family="llama", tokenizer=None, dtype=torch.float32, change=None, **changes):
    """A tiny model and a tokenizer, saved: its folder."""
    tokenizer = tokenizer or load_tokenizer("demo-glu")
    model = tiny_model(family, vocab_size=changes.pop("vocab_size", len(tokenizer)), **changes).to(dtype)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bare_tokenizer():
    """Words w0, w1, ... between spaces; no BOS, no EOS, no padding."""
    vocabulary = {word: number for number, word in enumerate(["<unknown>", *(f"w{n}" for n in range(60))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def words(count, seed=0):
    numbers = torch.randint(60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{number}" for number in numbers)


def figures_are_finite(evaluation):
    whole = evaluation["all"]
    return all(math.isfinite(whole[name]) for name in ("delta_ce", "kl", "top1_agreement", "nmse", "zero_delta_ce"))


def refused(error, run):
    with pytest.raises(error) as caught:
        run()
    return str(caught.value)


# Text


def stream(tmp_path, texts, tokenizer, context=8):
    path = tmp_path / "stream.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return TextStream(str(path), Packing(tokenizer, context))


def test_without_an_end_of_text_token_documents_follow_each_other(tmp_path):
    texts = [words(5, seed) for seed in range(8)]
    contexts = list(stream(tmp_path, texts, bare_tokenizer()).contexts())
    assert torch.cat(contexts).tolist() == bare_tokenizer()(" ".join(texts))["input_ids"]


def test_empty_documents_and_those_of_blanks_alone_take_no_place(tmp_path):
    texts = ["", words(8), "   ", "\n\n", words(8, 1), ""]
    contexts = list(stream(tmp_path, texts, bare_tokenizer()).contexts())
    assert torch.cat(contexts).tolist() == bare_tokenizer()(f"{words(8)} {words(8, 1)}")["input_ids"]


def test_a_text_of_empty_documents_is_refused(tmp_path):
    message = refused(DataError, lambda: next(stream(tmp_path, ["", "  "] * 1000, bare_tokenizer()).contexts()))
    assert "does not fill one context of 8 tokens" in message
    message = refused(DataError, lambda: next(stream(tmp_path, [""] * 1000, load_tokenizer("demo-glu")).batches(2)))
    assert "does not fill one context" in message


def byte_level_tokenizer():
    return load_tokenizer("demo-glu")


def tokenizer_that_adds_a_space():
    """As Llama 2's: a text begins with a space, whether it does or not."""
    vocabulary = {"▁": 0, "▁a": 1, "a": 2, "b": 3, "▁b": 4, "<u>": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (byte_level_tokenizer, "def f(x):\n    return x + 1  # and so on\n\n"),
        (tokenizer_that_adds_a_space, "aba ab  b a\n\n    ab b\n"),
        (bare_tokenizer, "w1 w2 w3\n"),
    ],
)
def test_a_long_document_is_tokenised_in_pieces_to_the_same_tokens(monkeypatch, made, line):
    tokenizer = made()
    long = line * 500
    whole = list(Packing(tokenizer, 16).pack(iter([long, "ab", long])))
    monkeypatch.setattr(packing, "_PIECE", 200)
    pieces = list(Packing(tokenizer, 16)._pieces(long))
    assert len(pieces) > 20 and max(len(piece) for piece, _ in pieces) <= 200 and [last for _, last in pieces].count(True) == 1
    in_pieces = list(Packing(tokenizer, 16).pack(iter([long, "ab", long])))
    assert len(whole) == len(in_pieces) > 100
    assert all(torch.equal(one, other) for one, other in zip(whole, in_pieces, strict=True))


def test_a_document_without_spaces_is_cut_anywhere_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(packing, "_PIECE", 100)
    tokenizer = load_tokenizer("demo-glu")
    long = "".join(chr(ord("a") + n % 26) for n in range(5050))
    pieces = list(Packing(tokenizer, 16)._pieces(long))
    assert "".join(piece for piece, _ in pieces) == long and len(pieces) == 51


def test_memory_and_time_do_not_grow_with_the_length_of_one_document(monkeypatch, tmp_path):
    """The way of 50 MB, with pieces a hundredth as long: docs/reliability.md has what those take."""
    monkeypatch.setattr(packing, "_PIECE", 2**13)
    tokenizer, took, peaks = load_tokenizer("demo-glu"), [], []
    for size in (2**17, 2**20):
        path = tmp_path / f"{size}.txt"
        path.write_text("def f(x):\n    return x + 1\n" * (size // 27))
        tracemalloc.start()
        start = time.perf_counter()
        count = sum(1 for _ in Packing(tokenizer, 128).pack(_without_the_text(path)))
        took.append((time.perf_counter() - start) / count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 8 * 2**20  # the document itself, and no more of its tokens
    assert took[1] < 3 * took[0]


def _without_the_text(path):
    yield from documents(str(path))


def test_a_long_line_of_text_is_read_as_several_documents(monkeypatch, tmp_path):
    monkeypatch.setattr("mxdsurgery.text.forms._MOST_CHARACTERS", 1000)
    path = tmp_path / "text.txt"
    path.write_text("a" * 2500 + "\n<|endoftext|>\nend\n")
    found = list(documents(str(path)))
    assert "".join(found) == "a" * 2500 + "\nend\n" and max(map(len, found)) <= 1000
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a" * 2500}) + "\n")
    assert "line 1: longer than 1000 characters" in refused(DataError, lambda: list(documents(str(path))))


def test_invalid_utf8_and_halves_of_characters_become_the_replacement_character(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"one \xff\xfe two\n")
    assert list(documents(str(tmp_path / "text.txt"))) == ["one \ufffd\ufffd two\n"]
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "one \xff"}\n{"text": "two \\ud800 three"}\n')
    assert list(documents(str(tmp_path / "text.jsonl"))) == ["one \ufffd", "two \ufffd three"]
    for one in documents(str(tmp_path / "text.jsonl")):
        assert load_tokenizer("demo-glu")(one)["input_ids"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert list(documents(str(tmp_path / "text.jsonl"))) == ["one"]
    assert list(documents(str(tmp_path / "text.txt"))) == ["one\n"]


def test_a_parquet_file_of_bytes_that_are_no_text_is_refused(tmp_path):
    path = tmp_path / "text.parquet"
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())  # as a careless program writes it
    pq.write_table(pa.table({"text": bad}), path)
    assert str(path) in refused(DataError, lambda: list(documents(str(path))))


# Tokenizers


def test_a_tokenizer_without_special_tokens_is_enough(tmp_path, convert):
    base = base_model(tmp_path / "base", tokenizer=bare_tokenizer(), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    path = tmp_path / "words.txt"
    path.write_text(words(8000))
    conversion, converted = convert(base, data=str(path))
    assert figures_are_finite(conversion.evaluation)
    tokenizer = converted.tokenizer()
    assert tokenizer.bos_token is None and tokenizer.eos_token is None and tokenizer.pad_token is None
    assert mxdsurgery.evaluate(conversion.out)["all"] == conversion.evaluation["all"]
    for prompt in ("w1 w2", ""):
        (made,) = mxdsurgery.generate(conversion.out, prompt=prompt, max_new_tokens=5)
        assert len(made.split()) >= 5
    assert "has no BOS token" in refused(DataError, lambda: convert(base, data=str(path), prepend_bos=True))


def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path, convert):
    tokenizer = load_tokenizer("demo-glu")
    base = base_model(tmp_path / "base", vocab_size=len(tokenizer) + 300)
    conversion, converted = convert(base)
    assert figures_are_finite(conversion.evaluation)
    assert converted.model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 300
    beyond = len(tokenizer) + 7
    assert token_strings(converted.tokenizer(), [beyond]) == [f"<{beyond}>"]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_training(tmp_path, convert):
    base = base_model(tmp_path / "base", vocab_size=300)
    message = refused(DataError, lambda: convert(base))
    assert "and the model has 300 of them" in message and "the tokenizer that the model was trained with" in message


# Models


def test_tied_embeddings_stay_tied(tmp_path, convert):
    conversion, converted = convert(base_model(tmp_path / "base", tie_word_embeddings=True))
    assert converted.model.lm_head.weight is converted.model.model.embed_tokens.weight
    assert mxdsurgery.evaluate(conversion.out)["all"] == conversion.evaluation["all"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_converted_in_it(tmp_path, convert, monkeypatch, dtype):
    monkeypatch.undo()  # it is reloaded without mxdsurgery, too
    conversion, converted = convert(base_model(tmp_path / "base", dtype=dtype))
    assert conversion.plan.dtype == str(dtype).removeprefix("torch.") and converted.model.dtype == dtype
    assert all(weight.dtype == dtype for weight in converted.layers[0].parameters())
    assert figures_are_finite(conversion.evaluation)
    assert conversion.evaluation["all"]["nmse"] < 1.0


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "zork"])
def test_a_quantised_base_is_refused_by_name(tmp_path, convert, method):
    base = base_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}}
    (base / "config.json").write_text(json.dumps(config))
    for run in (lambda: load_config(str(base)), lambda: mxdsurgery.analyze(str(base)), lambda: convert(base)):
        message = refused(WeightsError, run)
        assert f"is quantised ({method})" in message and "convert the model that it was quantised from" in message


def test_a_converted_model_as_base_is_refused_and_the_original_is_named(tmp_path, convert):
    export_tiny("llama", tmp_path / "out")
    message = refused(NotCausalLMError, lambda: convert(tmp_path / "out"))
    assert "already a converted model (model_type 'mxd-llama')" in message
    assert "name the original model: llama" in message and "mxdsurgery heal" in message


IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("on_disk", [(), PARTS[2:3], (PARTS[0], PARTS[1], PARTS[5]), PARTS], ids=len)
def test_a_model_on_several_devices_is_found_proven_and_measured_alike(tmp_path, on_disk):
    """What was dispatched by a device_map: parts in memory, others read from disk when they are needed."""
    base = str(base_model(tmp_path / "base"))
    plain = open_model(base).load()
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    if on_disk:
        spread = AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=str(tmp_path / "offload")).eval()
    else:  # transformers dispatches nothing where there is one device
        spread = dispatch_model(open_model(base).load(), places, main_device="cpu", force_hooks=True)
    assert len(spread.hf_device_map) == len(PARTS) and is_offloaded(spread) == bool(on_disk)
    assert execution_device(spread) == torch.device("cpu")
    blocks = [finding.block for finding in find_blocks(spread)]
    assert blocks == [finding.block for finding in find_blocks(plain)] and None not in blocks
    assert [prove_block(spread, block) for block in blocks] == [prove_block(plain, block) for block in blocks]
    layers = {}
    for model in (spread, plain):
        statistics = measure_statistics(model, blocks, [IDS])
        layers[model] = {b.layer: initial_layer(model, plan_layer(b, RECIPE), RECIPE, statistics[b.layer]) for b in blocks}
    for index, layer in layers[spread].items():
        for name, weight in layers[plain][index].state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)
    for layer in layers[plain].values():
        torch.nn.init.normal_(layer.decoder.weight)
        layer.eval().requires_grad_(False)
    figures = [measure(model, blocks, layers[plain], IDS, batch=32) for model in (spread, plain)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_contexts_longer_than_the_models_are_refused_before_training(tmp_path, convert, family):
    base = base_model(tmp_path / "base", family)
    message = refused(RecipeError, lambda: convert(base, context=65))
    assert "'context' is 65, and the model reads at most 64 tokens" in message and "context=64" in message
    check_context(load_config(str(base)), 64)


def sink(model):
    """Makes the first block's output 10,000 times as large at position 0 as elsewhere, as attention sinks do."""
    first = model.transformer.h[0]
    model.transformer.wpe.weight[0] = 0.0
    model.transformer.wpe.weight[0, 0] = 1000.0
    first.attn.c_proj.weight.zero_()
    first.ln_2.weight.fill_(1.0)
    first.ln_2.bias.zero_()
    first.mlp.c_fc.weight[:, 0] = 0.0
    first.mlp.c_fc.weight[0, 0], first.mlp.c_fc.bias[0] = 100.0, -300.0
    first.mlp.c_proj.weight[0] = 50.0


@pytest.mark.parametrize("kind", ["mxd", "transcoder"])
def test_huge_norms_at_position_0_neither_spoil_training_nor_flatter_figures(tmp_path, convert, kind):
    base = base_model(tmp_path / "base", "gpt2", change=sink)
    model = open_model(str(base)).load()
    y = record_activations(model, [find_blocks(model)[0].block], IDS)[0].y.norm(dim=-1)
    assert (y[:, 0] > 5000 * y[:, 1:].amax(1)).all()
    conversion, _ = convert(base, kind=kind)
    assert figures_are_finite(conversion.evaluation)
    # With position 0 in them they would be nearly 0: it holds all the size there is.
    assert 0.05 < conversion.evaluation["all"]["nmse"] < 1.0 and conversion.evaluation["all"]["fvu"] > 0.05


def zero_block(model):
    for weight in model.model.layers[0].mlp.parameters():
        weight.zero_()


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "random"}, {"kind": "transcoder"}, {"kind": "topk-sae"}, {"kind": "dense"}, {"inputs": "converted"}]
    + [{"unit_norm": True, "auxk": 0.1, "sparsity": "batchtopk"}],
    ids=str,
)
def test_a_block_of_zeros_is_learned_without_dividing_by_its_norm(tmp_path, convert, options):
    conversion, converted = convert(base_model(tmp_path / "base", change=zero_block), **options)
    whole = conversion.evaluation["all"]
    assert whole["delta_ce"] == pytest.approx(0.0, abs=1e-4) and whole["kl"] == pytest.approx(0.0, abs=1e-4)
    assert whole["nmse"] is None or whole["nmse"] < 1.0  # of nothing there is no share
    assert all(weight.isfinite().all() for weight in converted.layers[0].state_dict().values())
    assert "n/a" in (conversion.out / "README.md").read_text()


@pytest.mark.parametrize(
    ("weight", "value", "named"),
    [
        ("model.layers.1.self_attn.q_proj.weight", float("nan"), "NaN"),
        ("model.layers.0.mlp.up_proj.weight", -float("inf"), "infinity"),
        ("model.norm.weight", float("inf"), "infinity"),
    ],
)
def test_a_base_weight_that_is_no_number_is_named_before_training(tmp_path, convert, weight, value, named):
    def spoil(model):
        model.get_parameter(weight).view(-1)[3] = value

    base = base_model(tmp_path / "base", change=spoil)
    message = refused(WeightsError, lambda: convert(base))
    assert f"the weight {weight} of" in message and f"holds {named}" in message
    assert weight in refused(WeightsError, lambda: open_model(str(base)).load(offload=tmp_path / "offload"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_found_in_half_precision_too(tmp_path, dtype):
    base = base_model(tmp_path / "base", dtype=dtype, change=lambda model: model.lm_head.weight[5, 5:6].fill_(float("nan")))
    assert "lm_head.weight" in refused(WeightsError, lambda: open_model(str(base)).load())


# Evaluation


def test_an_evaluation_of_nothing_is_refused(tmp_path, convert, text):
    base = base_model(tmp_path / "base")
    assert "'eval_tokens' is 0" in refused(RecipeError, lambda: convert(base, eval_tokens=0))
    (tmp_path / "empty.txt").write_text("")
    assert "does not fill one context" in refused(DataError, lambda: convert(base, eval_data=str(tmp_path / "empty.txt")))
    model = open_model(str(base)).load()
    blocks = [finding.block for finding in find_blocks(model)]
    for shape, said in (((0, 16), "there is no text"), ((4, 0), "there is no text"), ((4, 2), "no prediction to score")):
        ids = torch.ones(shape, dtype=torch.int64)
        assert said in refused(DataError, lambda ids=ids: measure(model, blocks, {}, ids, 16))


def test_an_evaluation_of_one_context_is_one(tmp_path, convert):
    conversion, _ = convert(base_model(tmp_path / "base"), eval_tokens=1)
    assert conversion.evaluation["sequences"] == 1 and conversion.evaluation["tokens"] == 14
    assert figures_are_finite(conversion.evaluation)
