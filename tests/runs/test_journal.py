"""A run records what was reported and measured, whatever ends it; -q and -v print less and more of it."""

import json
import logging
import math
import re

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from rich.console import Console
from running import Said

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.disclosure import masked
from mxdsurgery.errors import DivergedError, OutputError
from mxdsurgery.runs.journal import LOG_FILE, METRICS_FILE, Journal, Recording
from mxdsurgery.terminal.console import ConsoleReporter, Reporter

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
TOKEN = "hf_" + "aB3dE5gH7j" * 3


def log(folder):
    """Level, stage and text of each line; the time is checked here."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert all(re.match(TIME + " ", line) for line in lines)
    return [tuple((line.split(maxsplit=3) + [""])[1:4]) for line in lines]


def metrics(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def test_a_line_has_time_level_stage_and_text_and_stays_one_line(tmp_path):
    journal = Journal(tmp_path / "new" / "a.run")
    journal.event("warning", "proof", "one\ntwo\r\x1b[31mthree \u2028four ΔCE")
    assert log(tmp_path / "new" / "a.run") == [("warning", "proof", "one\\ntwo\\r\\x1b[31mthree \\u2028four ΔCE")]


def test_what_is_said_goes_on_to_the_reporter_and_under_its_stage_to_the_log(tmp_path):
    said = Said()
    reporter = Recording(said, Journal(tmp_path))
    lines = ["proof      24 blocks", "checkpoint 11.6 MiB", "           on 2 disks", "", "left out   a, b"]
    for line in lines:
        reporter.say(line)
    assert said.lines == lines
    assert log(tmp_path) == [
        ("info", "proof", "24 blocks"),
        ("info", "checkpoint", "11.6 MiB"),
        ("info", "checkpoint", "on 2 disks"),
        ("info", "checkpoint", ""),
        ("info", "left", "out   a, b"),
    ]


def test_work_begins_and_ends_in_the_log_and_what_ends_it_too_soon_is_there(tmp_path):
    with Recording(Reporter(), Journal(tmp_path)) as reporter, reporter.progress("distil", "tokens") as line:
        line.update(1, 2)
    with pytest.raises(DivergedError), Recording(Reporter(), Journal(tmp_path)) as reporter:
        with reporter.progress("heal", "tokens"):
            raise DivergedError("layer 3: the loss is nan", expected="a falling loss")
    begun, ended, again, stopped, why = log(tmp_path)
    assert begun == ("info", "distil", "begins") and re.fullmatch(r"ended after \d+\.\d s", ended[2])
    assert again == ("info", "heal", "begins")
    assert stopped[:2] == ("error", "heal") and re.fullmatch(r"stopped after \d+\.\d s: DivergedError", stopped[2])
    assert why == ("error", "heal", "DivergedError: layer 3: the loss is nan\\nexpected: a falling loss")


def test_the_error_that_ends_a_run_is_not_hidden_by_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(KeyError), Recording(Reporter(), Journal(tmp_path / "file")):
        raise KeyError("the reason")
    with pytest.raises(OutputError, match="log.txt"):
        Journal(tmp_path / "file").event("info", "a", "b")
    with pytest.raises(OutputError, match="metrics.jsonl"):
        Journal(tmp_path / "file").metrics("a", step=1)


def test_numbers_of_any_library_are_json_and_what_is_not_finite_is_null(tmp_path):
    layers = {3: {"loss": torch.tensor(0.5), "nmse": math.nan}, "3 dense": {"loss": np.float32(0.25), "nmse": np.inf}}
    Journal(tmp_path).metrics("distil", group=1, step=np.int64(20), layers=layers, note=None, pair=(1, -math.inf), ok=True)
    (row,) = metrics(tmp_path)
    assert re.match(r"\d{4}-\d\d-\d\dT", row.pop("time"))
    layers = {"3": {"loss": 0.5, "nmse": None}, "3 dense": {"loss": 0.25, "nmse": None}}
    wanted = {"stage": "distil", "group": 1, "step": 20, "layers": layers, "note": None, "pair": [1, None], "ok": True}
    assert row == wanted and isinstance(row["step"], int)


def test_a_line_that_a_killed_run_left_unfinished_is_cut_off_when_the_next_one_writes(tmp_path):
    Journal(tmp_path).metrics("distil", step=1)
    Journal(tmp_path).event("info", "distil", "begins")
    for name in (METRICS_FILE, LOG_FILE):
        with open(tmp_path / name, "a") as file:
            file.write('{"time": "' + "x" * 100_000)  # longer than what is looked through at a time
    journal = Journal(tmp_path)
    journal.metrics("distil", step=2)
    journal.event("info", "distil", "goes on")
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert [text for *_, text in log(tmp_path)] == ["begins", "goes on"]
    (tmp_path / METRICS_FILE).write_text('{"no line')
    Journal(tmp_path)
    assert (tmp_path / METRICS_FILE).read_text() == ""


def test_secrets_get_into_neither_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "unusual-key-of-this-machine")
    journal = Journal(tmp_path)
    Recording(Reporter(), journal).say(f"push       with {TOKEN} and token=abc123def456ghi789")
    journal.event("error", "push", f"HubError: {TOKEN}\nunusual-key-of-this-machine https://me:hunter2@host/x")
    journal.metrics("push", url=f"https://host/?a={TOKEN}", more={"unusual-key-of-this-machine": [TOKEN]})
    written = (tmp_path / LOG_FILE).read_text() + (tmp_path / METRICS_FILE).read_text()
    for secret in (TOKEN, TOKEN[3:], "abc123def456ghi789", "unusual-key", "hunter2"):
        assert secret not in written
    assert "[a Hugging Face token]" in written and len(metrics(tmp_path)) == 1


def test_nothing_of_a_secrets_end_is_left_where_two_forms_overlap():
    assert masked(f"token: {TOKEN}.rest-1") == "token: [a Hugging Face token]"
    assert masked("nothing here, token by token") == "nothing here, token by token"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.event("info", "a", "b")
    journal.metrics("a", step=1)
    assert not list(tmp_path.iterdir())


def said_by(level, terminal=False):
    """What a reporter of some level says of a line and of a piece of work."""
    console = Console(force_terminal=terminal, highlight=False, soft_wrap=True, record=True, file=open("/dev/null", "w"))
    reporter = ConsoleReporter(console, level=level)
    reporter.say("proof      24 [bold]blocks")
    with reporter.progress("distil", "tokens") as line:
        line.update(2, 2, "NMSE 0.1")
    return console.export_text().splitlines()


def test_the_console_says_nothing_or_lines_or_events():
    assert said_by("warning") == said_by("warning", terminal=True) == []
    plain = said_by("info")
    assert plain[0] == "proof      24 [bold]blocks" and plain[1].startswith("distil 100%") and len(plain) == 2
    for terminal in (False, True):
        first, begun, line, ended = said_by("debug", terminal)
        assert re.fullmatch(TIME + r" info    proof      24 \[bold\]blocks", first)
        assert begun.endswith("info    distil     begins") and "info    distil     100%" in line and "ended after" in ended


@pytest.fixture
def folder(tmp_path):
    """Metrics with a cut line: `plot` says so."""
    (tmp_path / METRICS_FILE).write_text('{"stage": "distil", "step": 1, "tokens": 10, "layers": {"0": {"nmse": 1}}}\n{"sta')
    return str(tmp_path)


CUT = "the last line of"


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["plot", "DIR"], rf"plot       {CUT}"),
        (["-q", "plot", "DIR"], None),
        (["plot", "DIR", "--quiet"], None),
        (["-v", "plot", "DIR"], rf"{TIME} info    plot       {CUT}"),
        (["plot", "--verbose", "DIR"], rf"{TIME} info    plot       {CUT}"),
        (["-q", "plot", "DIR", "-v"], rf"{TIME} info    plot       {CUT}"),
        (["plot", "DIR", "-v", "-q"], None),
    ],
)
def test_quiet_and_verbose_go_before_a_command_or_after_and_the_last_one_counts(words, form, folder):
    result = CliRunner().invoke(main, [folder if word == "DIR" else word for word in words])
    assert result.exit_code == 0 and "The figures are" in result.stdout
    assert result.stderr == "" if form is None else re.match(form, result.stderr), result.stderr


@pytest.mark.parametrize("flag", ["-q", "-v"])
def test_named_errors_stay_as_they_are_at_every_level(flag, tmp_path):
    result = CliRunner().invoke(main, ["plot", flag, str(tmp_path / "none")])
    assert result.exit_code == 2 and result.stderr.startswith(f"MetricsError: '{tmp_path}/none' is no folder\nexpected: ")


def test_every_command_has_both_flags():
    for name, command in main.commands.items():
        assert {"-q", "-v"} <= {flag for option in command.params for flag in option.opts}, name


def test_what_libraries_warn_of_is_heard_with_verbose_only_and_holds_no_secret(folder, monkeypatch):
    def warns(*_, **__):
        logging.getLogger("transformers.somewhere").warning("the library warns of %s\nhere", TOKEN)
        raise KeyboardInterrupt

    monkeypatch.setattr(mxdsurgery, "plot", warns)
    before = list(logging.getLogger().handlers)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        assert "the library" not in CliRunner().invoke(main, ["plot", folder]).stderr
        said = CliRunner().invoke(main, ["-v", "plot", folder]).stderr
        assert re.match(TIME + r" warning transformers the library warns of \[a Hugging Face token\]\\nhere\n", said)
        assert "the library" not in CliRunner().invoke(main, ["plot", folder]).stderr
    finally:
        logging.getLogger().handlers[:] = before
        transformers.logging.disable_propagation()
        transformers.logging.enable_default_handler()
