"""What a text may be on this machine: files of all forms, told from what they hold; folders, patterns; rows with nothing."""

import bz2
import csv
import gzip
import json
import os
import re

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.errors import DataError, MxDWarning
from mxdsurgery.text.labelled import read_labelled
from mxdsurgery.text.places import lasting, on_hub, text_name
from mxdsurgery.text.sources import documents

ROWS = [{"text": "one", "n": 1}, {"text": ""}, {"text": "zwei ü\n"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)  # nothing here is looked for on the hub


def written(name, content):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return name


def read(spec, column="text", tokenizer=None):
    return list(documents(spec, column, tokenizer))


def said(spec, column="text", tokenizer=None):
    with pytest.raises(DataError) as caught:
        read(spec, column, tokenizer)
    return str(caught.value)


def packed(content):
    """By gzip, and the same at any time: what is written here is in the names of tests, which all processes must agree on."""
    return gzip.compress(content, mtime=0)


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", LINES),
        ("t.json", LINES),
        ("c4-train.00000.json.gz", packed(LINES)),
        ("t.jsonl.bz2", bz2.compress(LINES)),
        ("t.jsonl.zst", zstd(LINES)),
        ("unpacked-by-the-browser.jsonl.gz", LINES),
        ("packed.jsonl", packed(LINES)),
        ("lines.txt", LINES),
        ("without_an_ending", LINES),
        ("windows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("list.json", json.dumps(ROWS)),
        ("list.jsonl.gz", packed(json.dumps(ROWS, indent=2).encode())),
        ("list.txt", json.dumps(ROWS, indent=2)),
        ("strings.json", json.dumps([row["text"] for row in ROWS])),
        ("t.csv", 'text,n\none,1\n"",\n"zwei ü\n",2\n'),
        ("windows.csv", '\ufefftext,n\r\none,1\r\n"",\r\n"zwei ü\r\n",2\r\n'),
        ("semicolons.csv", 'n;text\n1;one\n2;"zwei ü\n"\n'),
        ("t.tsv.gz", packed('n\ttext\n1\tone\n2\t"zwei ü\n"\n'.encode())),
    ],
)
def test_a_file_is_read_as_what_it_holds(name, content):
    assert read(written(name, content)) == ["one", "zwei ü\n"]


def test_parquet_and_arrow_are_told_by_their_first_bytes():
    table = pa.table({"text": ["one", "two"], "n": [1, 2]})
    pq.write_table(table, "rows.data")
    pyarrow.feather.write_feather(table, "t.arrow")
    assert read("rows.data") == read("t.arrow") == ["one", "two"]
    os.truncate("t.arrow", os.path.getsize("t.arrow") - 20)
    assert "'t.arrow' is not a whole Arrow file" in said("t.arrow")


def test_plain_text_that_only_begins_like_json_is_plain_text():
    for content in ("[Illustration]\nfoo\n", "{ int x; }\n", '{"a": \n', "{}\n"):
        assert read(written("t.txt", content)) == [content]
    assert read(written("t.txt", "one\r\n<|endoftext|>\r\ntwo\r\n")) == ["one\n", "two\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}, {"text"', "entry 2: not JSON"),
        ('[{"text": "one"}', "entry 1: not JSON (it ends in the middle)"),
        ('[{"text": "one"} {"text": "two"}]', "entry 1: not JSON (no comma after it)"),
        ('[{"text": "one"}] x', "after its list: not JSON (something follows)"),
        ('[{"text": "one"}, 3]', "entry 2: no object but int"),
        ('{\n  "text": "one"\n}\n', "line 1: not JSON"),
        ("[" * 100_000, "entry 1: not JSON"),
    ],
)
def test_a_list_that_is_broken_is_named_by_file_and_entry(content, message):
    assert f"t.json, {message}" in said(written("t.json", content))


def test_a_list_is_read_entry_by_entry_and_a_long_entry_is_refused(monkeypatch):
    monkeypatch.setattr("mxdsurgery.text.forms._CHUNK", 7)
    rows = [{"text": "x" * 100, "n": -12.5e3}, {"text": 'a "quoted" ], one'}, {"text": "é"}]
    assert read(written("t.json", " [ " + " , ".join(map(json.dumps, rows)) + " ] \n")) == [row["text"] for row in rows]
    assert read(written("t.json", "[]")) == []
    monkeypatch.setattr("mxdsurgery.text.forms._MOST_CHARACTERS", 50)
    assert "t.json, entry 1: longer than 50 characters" in said(written("t.json", json.dumps(rows)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,hello\n", "line 1, has no column 'text'\nexpected: one of its columns: 1, hello\n"),
        ('text,n\n"open\n', "line 2: no comma-separated values"),
        ("text,n\na,1,b\n", "line 2: 3 values, and the first line names 2 columns"),
        ("text,n\n" + "a" * 200 + ",1\n", "line 2: longer than 100 characters"),
        ('text,n\n"' + ("a" * 40 + "\n") * 9 + '",1\n', "line 4: no comma-separated values: field larger than"),
    ],
)
def test_a_table_that_is_broken_is_named_by_file_and_line(content, message, monkeypatch):
    monkeypatch.setattr("mxdsurgery.text.forms._MOST_CHARACTERS", 100)
    limit = csv.field_size_limit(100)
    try:
        assert message in said(written("t.csv", content))
    finally:
        csv.field_size_limit(limit)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("words".encode("utf-16"), "text in UTF-16"),
        ("many words".encode("utf-16-le"), "bytes that are no text"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\xfd7zXZ\x00", "a file packed by xz"),
        (b"\x80\x04\x95", "a pickle, which is never read"),
        (b"%PDF-1.7", "a PDF document"),
        (packed(packed(LINES)), "a packed file inside a packed one"),
        (bytes(257) + b"ustar", "a tar archive"),
        ((80).to_bytes(8, "little") + b'{"w": {}}', "bytes that are no text"),
    ],
)
def test_what_holds_no_text_is_refused_by_name(content, what):
    message = said(written("t.jsonl", content))
    assert f"'t.jsonl' holds {what}" in message
    assert "to mend: unpack it" in message or not re.search("archive|xz", what)


def test_links_are_followed_and_pipes_are_refused():
    written("t.jsonl", LINES)
    os.symlink("t.jsonl", "link")
    os.symlink("nowhere.jsonl", "broken.jsonl")
    os.mkfifo("pipe")
    assert read("link") == read("t.jsonl")
    assert "no text file 'broken.jsonl'" in said("broken.jsonl")
    for spec in ("pipe", "-", "/dev/null"):
        assert f"the text {spec!r} is a pipe or a device" in said(spec) and "write it to a file" in said(spec)
    os.mkdir("folder")
    os.mkfifo("folder/pipe.txt")
    assert "'folder/pipe.txt' is no plain file" in said("folder")


# Folders and patterns


def test_the_shards_of_a_folder_or_pattern_are_read_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        written(f"data/shards/part-{number}.jsonl", json.dumps({"text": f"p{number}"}))
    pq.write_table(pa.table({"text": ["p11"]}), "data/shards/part-11.parquet")
    for name in ("README.md", "LICENSE.txt", ".cache/x.jsonl", "_SUCCESS", "_temporary/x.jsonl"):
        written(f"data/shards/{name}", "no text")
    whole = ["p1", "p2", "p10", "p11"]
    for spec in ("data/shards", "./data/shards", "data/shards/", "data", str(tmp_path / "data"), "data/*", "data/**/part-*"):
        assert read(spec) == whole, spec
    assert read("data/shards/part-?.jsonl") == ["p1", "p2"]
    assert "no file matches 'data/*.csv'" in said("data/*.csv")
    assert lasting("data/shards") == str(tmp_path / "data/shards") and lasting("data/*.x") == str(tmp_path / "data/*.x")
    assert (text_name("data/shards/"), text_name("data/*.jsonl"), text_name("user/set")) == ("shards", "*.jsonl", "user/set")


def test_what_is_left_out_of_a_folder_is_said(recwarn):
    written("data/train-0.jsonl", LINES)
    written("data/test-0.jsonl", LINES)
    written("data/logo.png", b"\x89PNG")
    assert len(read("data")) == 2
    (warning,) = recwarn
    assert str(warning.message) == "left out of the text 'data': logo.png, test-0.jsonl"
    os.remove("data/train-0.jsonl")
    written("data/validation/0.jsonl", LINES)
    assert "'data' holds several parts of a data set: test, validation" in said("data")
    assert len(read("data/test*")) == 2
    written("pictures/a.png", b"")
    assert "'pictures' holds no text, but a.png" in said("pictures")


def test_a_folder_of_save_to_disk_is_read_without_what_was_cached_beside_it():
    made = datasets.Dataset.from_dict({"text": [f"d{n}" for n in range(5)]})
    made.save_to_disk("saved", num_shards=2)
    written("saved/cache-1.arrow", b"something else")
    assert read("saved") == made["text"][:]
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk("both")
    with pytest.warns(MxDWarning, match="left out of the text 'both': test"):
        assert read("both") == made["text"][:]
    assert read("both/test") == ["d0"]
    for splits in (["."], ["../saved"], "train", []):
        written("both/dataset_dict.json", json.dumps({"splits": splits}))
        assert "'both'" in said("both")
    os.remove("saved/data-00000-of-00002.arrow")
    assert "data-00000-of-00002.arrow is missing" in said("saved")
    written("saved/state.json", '{"_data_files": [{"filename": "../x.arrow"}]}')
    assert "names no files in the folder" in said("saved")


def test_what_is_on_this_machine_is_not_looked_for_on_the_hub():
    written("org/name/t.txt", "one")
    assert read("org/name") == ["one"]
    assert [on_hub(spec) for spec in ("org/name", "org/*", "./org/x", "org/x.csv", "-")] == [False] * 5
    assert on_hub("org/other") and on_hub("org/name:en:test") and lasting("org/other") == "org/other"
    os.mkdir("stdlib")
    assert lasting("stdlib") == "stdlib"


# Rows


def test_dotted_names_reach_into_columns_and_columns_may_have_dots():
    rows = [{"doc": {"text": "one", "meta": {"id": "a"}}, "x.y": "b"}, {"doc": {"text": "two", "meta": None}, "x.y": "c"}]
    written("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    for spec in ("t.jsonl", "t.parquet", "saved"):
        assert read(spec, "doc.text") == ["one", "two"]
        assert read(spec, "x.y") == ["b", "c"]
        with pytest.warns(MxDWarning, match="1 of 2 rows"):
            assert read(spec, "doc.meta.id") == ["a"]
        assert "has no column 'doc.tex'\nexpected: one of its columns: doc.text, doc.meta.id, x.y" in said(spec, "doc.tex")
        assert "holds dict in its column 'doc'" in said(spec, "doc")


def test_rows_without_text_are_left_out_and_counted_the_same_in_every_form():
    rows = [{"text": "one", "label": "a"}, {"text": None, "label": "a"}, {"text": "two", "label": "b"}]
    table = pa.Table.from_pylist(rows)
    written("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    written("t.json", json.dumps(rows))
    written("t.csv", "label,text\na,one\na\nb,two\n")
    pq.write_table(table, "t.parquet")
    pyarrow.feather.write_feather(table, "t.arrow")
    for spec in ("t.jsonl", "t.json", "t.csv", "t.parquet", "t.arrow"):
        message = f"1 of 3 rows that were read of '{spec}' hold nothing .null. in the column 'text'"
        with pytest.warns(MxDWarning, match=message):
            assert read(spec) == ["one", "two"]
        with pytest.warns(MxDWarning, match=message):
            labelled = read_labelled(spec)
        assert (labelled.texts, labelled.labels) == (["one", "two"], ["a", "b"])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1, 2, 3], "token ids"),
        (["a", "b"], "a list of str"),
        (3, "int"),
        ([], "an empty list"),
        ([{"from": "me"}], "a list of dict"),
    ],
)
def test_other_things_than_text_are_refused_as_what_they_are(value, what):
    assert f"t.jsonl, line 1 holds {what} in its column 'x'" in said(written("t.jsonl", json.dumps({"x": value})), "x")


def test_chats_are_written_out_with_the_models_template_or_refused():
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "me"}]}]
    written("t.jsonl", json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    tokenizer = load_tokenizer("demo-glu")
    for spec in ("t.jsonl", "t.parquet"):
        tokenizer.chat_template = None
        assert "holds a chat in its column 'messages', and the model's tokenizer has no chat template" in said(
            spec, "messages", tokenizer
        )
        tokenizer.chat_template = TEMPLATE
        assert read(spec, "messages", tokenizer) == ["[user] hi\n[assistant] ho\n"]
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        assert "template refuses the chat in the column 'messages': roles must alternate" in said(spec, "messages", tokenizer)


def test_chats_of_messages_with_from_and_value_are_the_same_chats():
    turns = [("system", "be"), ("human", "hi"), ("GPT", "ho"), ("tool", "3"), ("user", "ha"), ("assistant", None)]
    rows = [{"conversations": [{"from": who, "value": what, "weight": None} for who, what in turns]}]
    rows += [{"conversations": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]}]
    written("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    tokenizer = load_tokenizer("demo-glu")
    tokenizer.chat_template = TEMPLATE
    first = "[system] be\n[user] hi\n[assistant] ho\n[tool] 3\n[user] ha\n[assistant] \n"
    for spec in ("t.jsonl", "t.parquet"):
        assert read(spec, "conversations", tokenizer) == [first, "[user] a\n[assistant] b\n"]
    written("t.jsonl", json.dumps({"conversations": [{"from": "alice", "value": "hi"}]}))
    message = said("t.jsonl", "conversations", tokenizer)
    assert "t.jsonl, line 1 holds a message from 'alice'" in message and "human, user, system, gpt" in message


def test_labels_are_read_from_dotted_names_folders_and_tables():
    written("data/1.jsonl", '{"doc": {"text": "a"}, "meta": {"kind": 1}}\n{"doc": {"text": "c"}}\n')
    written("data/2.jsonl", '{"doc": {"text": "b"}, "meta": {"kind": 0}}\n')
    with pytest.warns(MxDWarning, match="1 of 3 rows"):
        labelled = read_labelled("data", "doc.text", "meta.kind")
    assert (labelled.texts, labelled.labels) == (["a", "b"], ["1", "0"])
    with pytest.raises(DataError, match="has no column 'label'\nexpected: one of its columns: doc.text, meta.kind"):
        read_labelled("data", "doc.text")
    with pytest.raises(DataError, match="'t.txt' is plain text"):
        read_labelled(written("t.txt", "words"))


def test_a_label_that_is_no_number_is_none():
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]}), "t.parquet")
    with pytest.warns(MxDWarning, match="1 of 3 rows that were read of 't.parquet' .* 'label'"):
        assert read_labelled("t.parquet").labels == ["1.0", "0.0"]
