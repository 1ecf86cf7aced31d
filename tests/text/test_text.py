"""Where text comes from, the errors if it cannot be read, and how it becomes contexts."""

import gzip
import itertools
import json
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.errors import DataError
from mxdsurgery.text.ahead import run_ahead
from mxdsurgery.text.sources import Packing, TextStream, documents

BOS, EOS = 0, 1


def word_tokenizer(adds_bos=False, bos="<s>", eos="</s>"):
    """Words w2, w3, ... are the token ids 2, 3, ...; BOS is 0, EOS is 1."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | {f"w{n}": n for n in range(2, 100)} | {"a": 100}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def words(*ids):
    return " ".join(f"w{n}" for n in ids)


def said(spec, text_column="text"):
    with pytest.raises(DataError) as caught:
        list(documents(str(spec), text_column))
    return str(caught.value)


def text_stream(tmp_path, texts, context=4, **options):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextStream(str(path), Packing(word_tokenizer(), context), **options)


# Documents


def test_a_txt_file_is_cut_at_lines_that_hold_nothing_but_the_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n\nstill one\n<|endoftext|>\n<|endoftext|>\n  <|endoftext|>  \ntwo <|endoftext|> two\n")
    assert list(documents(str(path))) == ["one\n\nstill one\n", "two <|endoftext|> two\n"]


def test_json_lines_are_documents_plain_and_gzipped_and_blank_lines_and_empty_texts_are_none(tmp_path):
    lines = '{"text": "one", "n": 1}\n\n{"text": ""}\n{"text": "zwei \\u00fc\\n"}\n'
    plain, packed = tmp_path / "text.jsonl", tmp_path / "text.jsonl.gz"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    assert list(documents(str(plain))) == list(documents(str(packed))) == ["one", "zwei ü\n"]


def test_the_text_column_is_read_from_json_and_parquet_and_null_is_no_document(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": ["no", "no", "no"], "body": ["one", None, "two"]}), path)
    assert list(documents(str(path), "body")) == ["one", "two"]
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "no", "body": "one"}\n')
    assert list(documents(str(path), "body")) == ["one"]


def test_the_standard_library_has_a_training_and_a_heldout_part_that_share_nothing():
    train, heldout = (set(itertools.islice(documents(f"stdlib:{split}"), 200)) for split in ("train", "heldout"))
    assert len(train) > 100 and len(heldout) > 20
    assert not train & heldout
    assert next(documents("stdlib")) == next(documents("stdlib:train"))
    assert "expected: stdlib, stdlib:train or stdlib:heldout" in said("stdlib:test")


def test_a_line_that_is_not_json_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut\n')
    message = said(path)
    assert f"{path}, line 3: not JSON" in message and "one JSON object per line" in message


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ('{"body": "x", "id": 3}', "line 2 has no column 'text'\nexpected: one of its columns: body, id\n"),
        ('{"text": 3}', "line 2 holds int in its column 'text'"),
        ('["text"]', "line 2: no object but list"),
        ("3", "line 2: no object but int"),
    ],
)
def test_a_line_without_text_is_named_with_what_it_has(tmp_path, line, has):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert f"{path}, {has}" in said(path)


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"body": ["one"], "id": [1]}), path)
    message = said(path)
    assert f"{path} has no column 'text'" in message and "body, id" in message and "text_column=" in message
    assert "holds int in its column 'id'" in said(path, "id")


def gzip_cut_short(path):
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 5000)[:-60])


def gzip_with_other_bytes_inside(path):
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n')[:10] + b"\xff" * 100)


@pytest.mark.parametrize("spoil", [gzip_cut_short, gzip_with_other_bytes_inside])
def test_a_gzip_file_that_is_not_whole_is_refused(tmp_path, spoil):
    path = tmp_path / "text.jsonl.gz"
    spoil(path)
    assert f"{str(path)!r} is not a whole gzip file" in said(path)


def test_a_parquet_file_that_is_none_or_not_whole_is_refused(tmp_path):
    path = tmp_path / "text.parquet"
    path.write_text("text\none\n")
    assert f"{str(path)!r} is not a whole Parquet file" in said(path)
    texts = [str(random.Random(n).random()) for n in range(20_000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="snappy")
    content = bytearray(path.read_bytes())
    content[1000:50_000] = bytes(49_000)
    path.write_bytes(content)
    assert f"{str(path)!r} is not a whole Parquet file" in said(path)


@pytest.mark.parametrize("spec", ["../nowhere.txt", "nowhere.jsonl", "/no/where.parquet", "~/nowhere", "x" * 300 + ".txt"])
def test_a_missing_file_is_not_looked_for_on_the_hub(spec, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    message = said(spec)
    assert f"no text file {spec!r}" in message and ".parquet" in message


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("one")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert f"{str(path)!r} cannot be read: Permission denied" in said(path)


# Data sets on the hub; the library is replaced


def fake_hub(monkeypatch, rows):
    """``load_dataset`` yields these rows, raises those that are exceptions, and notes how it was called."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))

        def stream():
            for row in rows:
                if isinstance(row, Exception):
                    raise row
                yield row

        return stream()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("spec", "args", "split"),
    [
        ("user/set", ("user/set", None), "train"),
        ("user/set:en", ("user/set", "en"), "train"),
        ("user/set:en:test", ("user/set", "en"), "test"),
        ("user/set::test", ("user/set", None), "test"),
    ],
)
def test_a_data_set_is_streamed_with_the_config_and_split_of_its_spec(monkeypatch, spec, args, split):
    calls = fake_hub(monkeypatch, [{"text": "one"}, {"text": None}, {"text": ""}, {"text": "two"}])
    assert list(documents(spec)) == ["one", "two"]
    assert calls == [(args, {"split": split, "streaming": True})]


def test_a_data_set_is_not_read_further_than_asked(monkeypatch):
    fake_hub(monkeypatch, [{"text": "one"}, {"text": "two"}, AssertionError("read too far")])
    assert list(itertools.islice(documents("user/set"), 2)) == ["one", "two"]


def test_a_data_set_without_the_column_or_with_other_things_in_it_is_refused(monkeypatch):
    fake_hub(monkeypatch, [{"body": "one", "meta": {"n": 1}}])
    message = said("user/set")
    assert "the data set 'user/set' has no column 'text'" in message and "body, meta" in message
    assert "holds dict in its column 'meta'" in said("user/set", "meta")


def test_what_the_hub_raises_at_once_or_later_names_the_data_set_and_the_reason(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'user/set' on the Hub\nlong advice")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = said("user/set")
    assert "the data set 'user/set' cannot be read: Couldn't reach 'user/set' on the Hub\n" in message
    assert "long advice" not in message and "expected: a .txt" in message
    fake_hub(monkeypatch, [{"text": "one"}, TimeoutError()])
    assert "the data set 'user/set' cannot be read: TimeoutError" in said("user/set")


def test_of_a_data_set_with_a_loading_script_the_hubs_converted_copy_is_read(monkeypatch):
    def load_dataset(name, config, revision=None, **_):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")
        return [{"text": "one"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents("user/set")) == ["one"]


def test_a_fault_of_whoever_reads_is_not_taken_for_a_fault_of_the_data_set(monkeypatch):
    fake_hub(monkeypatch, [{"text": "one"}, {"text": "two"}])
    with pytest.raises(ZeroDivisionError):
        for _ in documents("user/set"):
            raise ZeroDivisionError


# Packing


def packed(texts, context=4, prepend_bos=None, **tokenizer):
    return [row.tolist() for row in Packing(word_tokenizer(**tokenizer), context, prepend_bos).pack(iter(texts))]


def test_documents_follow_each_other_with_eos_between_and_the_rest_is_dropped():
    texts = [words(2, 3), words(4, 5, 6, 7, 8), words(9), words(10, 11)]
    assert packed(texts) == [[2, 3, EOS, 4], [5, 6, 7, 8], [EOS, 9, EOS, 10]]


def test_a_tokenizer_without_eos_gets_none():
    assert packed([words(2, 3), words(4, 5, 6)], eos=None) == [[2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("adds_bos", "prepend_bos", "begins"),
    [(False, None, False), (True, None, True), (False, True, True), (True, False, False), (True, True, True)],
)
def test_contexts_begin_with_bos_where_the_tokenizer_does_so_or_it_is_asked_for(adds_bos, prepend_bos, begins):
    rows = packed([words(*range(2, 20)), words(*range(20, 40))], adds_bos=adds_bos, prepend_bos=prepend_bos)
    assert all(row.count(BOS) == (1 if begins else 0) for row in rows)
    assert all((row[0] == BOS) is begins for row in rows)
    tokens = [token for row in rows for token in (row[1:] if begins else row)]
    text = [*range(2, 20), EOS, *range(20, 40), EOS]
    assert tokens == text[: len(tokens)] and len(text) - len(tokens) < 4


def test_a_bos_that_the_tokenizer_does_not_have_cannot_be_asked_for():
    assert packed([words(2, 3, 4, 5)], bos=None) == [[2, 3, 4, 5]]
    with pytest.raises(DataError, match="no BOS token"):
        packed([words(2, 3, 4, 5)], prepend_bos=True, bos=None)


def test_every_context_is_full_over_many_documents_of_all_lengths():
    lengths = random.Random(0)
    texts = [words(*range(2, 2 + lengths.randrange(0, 60))) for _ in range(200)]
    for context in (2, 7, 64):
        rows = list(Packing(word_tokenizer(), context).pack(iter(texts)))
        assert {(tuple(row.shape), row.dtype) for row in rows} == {((context,), torch.int64)}
        stream = [token for text in texts for token in [*(int(w[1:]) for w in text.split()), EOS]]
        assert torch.cat(rows).tolist() == stream[: len(stream) // context * context]


def test_packing_with_the_demo_tokenizer_loses_no_text():
    tokenizer = load_tokenizer("demo-glu")
    texts = ["def f(x):\n    return x + 1\n", "import os\n"] * 40
    tokens = torch.cat(list(Packing(tokenizer, 16, prepend_bos=False).pack(iter(texts))))
    whole = tokenizer.eos_token.join(texts) + tokenizer.eos_token
    assert whole.startswith(tokenizer.decode(tokens))
    assert len(tokens) > 16 * 20


# Streams


def test_passes_are_counted_and_batches_go_on_without_end(tmp_path):
    stream = text_stream(tmp_path, [words(*range(2, 13))])  # 11 words and EOS: 3 contexts
    batches = stream.batches(2)
    rows = torch.cat([next(batches) for _ in range(4)])
    assert rows.shape == (8, 4)
    assert torch.equal(rows[:3], rows[3:6])
    assert stream.passes == 3


def test_skipped_contexts_are_left_out_of_every_pass(tmp_path):
    stream = text_stream(tmp_path, [words(*range(2, 33))], skip=2)
    heldout = text_stream(tmp_path, [words(*range(2, 33))]).first(8)
    assert heldout.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    batches = stream.batches(3)
    seen = {token for _ in range(6) for token in next(batches).flatten().tolist()}
    assert stream.passes == 3
    assert not seen & set(heldout.flatten().tolist()) and 10 in seen


def test_shuffling_changes_the_order_from_pass_to_pass_and_loses_nothing(tmp_path):
    texts = [words(*range(2 + n, 9 + n)) for n in range(60)]  # 8 tokens each: two contexts
    plain = [row.tolist() for row in text_stream(tmp_path, texts).contexts()]

    def passes(**options):
        batches = text_stream(tmp_path, texts, **options).batches(len(plain))
        return [next(batches).tolist() for _ in range(2)]

    assert passes() == [plain, plain]
    for buffer in (4 * 10, 4 * 1000):  # smaller and larger than the text
        first, second = passes(shuffle=buffer, seed=3)
        assert sorted(first) == sorted(second) == sorted(plain)
        assert first != plain and second != first
        assert passes(shuffle=buffer, seed=3) == [first, second]
        assert passes(shuffle=buffer, seed=4)[0] != first


def test_first_takes_the_beginning_and_at_least_one_context(tmp_path):
    stream = text_stream(tmp_path, [words(*range(2, 93))])
    assert stream.first(1).tolist() == [[2, 3, 4, 5]]
    assert stream.first(11).shape == (2, 4)
    assert stream.first(10**6).shape == (23, 4)


def test_spread_takes_as_much_as_first_from_many_documents(tmp_path):
    texts = [words(*[n] * 31) for n in range(2, 82)]  # eight contexts per document
    stream = text_stream(tmp_path, texts)
    rows = stream.spread(40)
    assert rows.shape == stream.first(40).shape == (10, 4)
    assert len({row[0].item() for row in rows}) == 10
    assert len({row[0].item() for row in stream.first(40)}) == 2
    assert torch.equal(stream.spread(10**6), torch.stack(list(stream.contexts())))


@pytest.mark.parametrize("take", [lambda s: s.first(100), lambda s: s.spread(100), lambda s: next(s.batches(2))])
@pytest.mark.parametrize("texts", [[], [words(2, 3)]])
def test_a_text_that_does_not_fill_one_context_is_refused_naming_it(tmp_path, take, texts):
    stream = text_stream(tmp_path, texts)
    with pytest.raises(DataError, match="does not fill one context of 4 tokens") as caught:
        take(stream)
    assert stream.spec in str(caught.value) and "a smaller context=" in str(caught.value)


def test_a_text_that_is_all_held_out_is_refused_saying_so(tmp_path):
    stream = text_stream(tmp_path, [words(*range(2, 12))], skip=2)
    with pytest.raises(DataError, match="beyond the 2 that are held out"):
        next(stream.contexts())


def test_a_file_named_like_a_data_set_is_read_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "set.txt").write_text("one")
    monkeypatch.setattr("datasets.load_dataset", None)
    assert list(documents("user/set.txt")) == ["one"]


def test_running_ahead_gives_the_same_items_and_makes_no_more_than_it_may():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = run_ahead(items(), depth=3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert len(made) <= 5 + 3 + 1
    assert not any(thread.name == "run_ahead" for thread in threading.enumerate())
    assert list(run_ahead(iter(range(20)), depth=2)) == list(range(20))


def test_what_is_raised_while_running_ahead_arrives_in_its_place():
    def items():
        yield 1
        raise DataError("a broken line")

    ahead = run_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(DataError, match="a broken line"):
        next(ahead)
