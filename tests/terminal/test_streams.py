"""What commands print where the encoding lacks letters, nobody reads, or the disk is full."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxdsurgery.terminal.console import ConsoleReporter
from mxdsurgery.terminal.results import print_json, print_table
from mxdsurgery.terminal.streams import can_show, say, show_all_letters

ENCODINGS = ["ascii", "cp1252", "latin-1"]


def command(*words, to=subprocess.PIPE, **environment):
    """Runs a command in a process of its own, which is left as it is: its streams are what is tested."""
    done = subprocess.run(
        [sys.executable, "-m", "mxdsurgery", *words],
        stdout=to,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return done


@pytest.fixture
def streams(monkeypatch):
    """Standard output and error in an encoding; what was written to them."""

    def start(encoding):
        made = io.TextIOWrapper(io.BytesIO(), encoding=encoding), io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        show_all_letters()
        return made

    yield start


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_are_printed_in_every_encoding(encoding, streams, converted):
    from mxdsurgery.checkpoint.card import evaluation_table

    evaluation = json.loads((Path(converted.out) / "evaluation.json").read_text(encoding="utf-8"))
    stdout, _ = streams(encoding)
    print_table(evaluation_table(evaluation))
    printed = stdout.buffer.getvalue().decode(encoding)
    assert "dCE: nats per token" in printed and "\\u" not in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 2 and len({len(row) for row in rows}) == 1  # columns stay columns


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_names_in_other_scripts(encoding, streams):
    stdout, stderr = streams(encoding)
    name = "модель \udcff"  # the latter: a byte of a file's name that is not UTF-8
    say(name)
    say(name, err=True)
    ConsoleReporter().say(name)
    for stream in (stdout, stderr):
        stream.flush()
        printed = stream.buffer.getvalue().decode(encoding)
        assert printed.startswith("модель" if encoding == "utf-8" else "\\u043c\\u043e") and "\\udcff" in printed


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_json_is_json_in_every_encoding(encoding, streams):
    stdout, _ = streams(encoding)
    print_json({"text": "Δ модель é"})
    printed = stdout.buffer.getvalue().decode(encoding)
    assert json.loads(printed) == {"text": "Δ модель é"}
    assert can_show("é") == (encoding != "ascii")


def test_a_mistake_is_named_in_ascii(tmp_path):
    done = command("analyze", str(tmp_path / "модель"), PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"ModelNotFoundError" in done.stderr and b"\\u043c" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_is_a_named_error(tmp_path):
    with open("/dev/full", "wb") as full:
        done = command("plan", "demo-glu", "--no-measure", to=full)
    assert done.returncode == 2 and b"OutputError: the result cannot be printed: No space" in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_left_ends_the_result_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    done = command("analyze", "demo-glu", to=writes)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


def test_work_goes_on_when_nobody_reads_what_it_says(monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writes, "w"))
    reporter = ConsoleReporter()
    for line in ("one", "two"):
        reporter.say(line)
    assert reporter.console.quiet
    sys.stderr.close()


def test_work_goes_on_when_what_it_says_finds_no_room(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("Linux has it")
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))
    reporter = ConsoleReporter()
    reporter.say("one")
    assert reporter.console.quiet


@pytest.mark.parametrize("words", [("evaluate", "x", "--tökens"), ("--bäd",), ("füg",)])
def test_clicks_own_errors_have_the_letters_that_stderr_has(words, streams):
    from mxdsurgery.cli import main

    _, stderr = streams("ascii")
    with pytest.raises(SystemExit) as ended:
        main(list(words), prog_name="mxdsurgery")
    said = stderr.buffer.getvalue()
    assert ended.value.code == 2 and ascii(words[-1])[1:-1].encode() in said and said.startswith(b"Usage: mxdsurgery")
