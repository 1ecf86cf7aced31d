"""Kills runs, spoils their checkpoints and fills their disk, goes on with them, and compares what comes of it.

    python scripts/measure/reliability.py kills --count 50 --runs DIR  # some minutes; docs/reliability/kills.json
    python scripts/measure/reliability.py faults --runs DIR  # docs/reliability/faults.json
    python scripts/measure/reliability.py processes --runs DIR  # docs/reliability/processes.json
    python scripts/measure/reliability.py page > docs/reliability.md  # with fuzz.md and versions.md from there

A run is a small conversion of demo-glu, or the healing of one, with a checkpoint every second step. It is forked from this
process, killed with its children by SIGKILL at a random instant between its start and its end, and started again with resume,
until it ends by itself. After every kill, the folder of the result has to be what it was before the run or what an
uninterrupted run writes; in the end it has to be the latter, bit for bit.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from pages import DOCS, cells, read_json, table
from safetensors import SafetensorError
from safetensors.torch import load_file

import mxdsurgery
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.errors import MxDError

KEPT = DOCS / "reliability"
CONVERT = {
    "layers": "0-2",
    "tokens": 24_576,
    "eval_tokens": 1_000,
    "n_experts": 64,
    "k": 4,
    "batch": 512,
    "shuffle": 4_000,
    "activation_buffer": 2_048,
    "checkpoint_every": 2,
    "device": "cpu",
}
HEAL = {"tokens": 12_288, "batch": 512, "checkpoint_every": 2}
# A run is killed at most so often; then it may finish.
MOST_KILLS = 5


def digest(folder: Path) -> str | None:
    """Digest of a result's weights and figures; None where there is no result."""
    if not folder.exists():
        return None
    found = hashlib.sha256((folder / "model.safetensors").read_bytes())
    found.update(json.dumps(read_json(folder / "evaluation.json")["all"]).encode())
    return found.hexdigest()


def checkpoints_of(out: Path) -> list[Path]:
    """The checkpoints of an unfinished run, from the oldest to the newest."""
    return sorted((out.with_name(out.name + ".run") / "checkpoints").glob("step-*"))


def run_convert(out: Path, _source: Path) -> None:
    """Converts, or resumes."""
    mxdsurgery.convert("demo-glu", out=str(out), resume=True, overwrite=True, **CONVERT)


def run_heal(out: Path, source: Path) -> None:
    """Heals a conversion, or resumes."""
    mxdsurgery.heal(source, out=out, resume=True, overwrite=True, **HEAL)


RUNS: dict[str, Callable[[Path, Path], None]] = {"convert": run_convert, "heal": run_heal}


def forked(work: Callable[[], None], log: Path) -> int:
    """Forks a process that does some work, as leader of its group. It exits with 0, with 2 after a named error, or with 1."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                work()
                code = 0
            except MxDError as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                code = 2
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
    finally:
        os._exit(code)


def ended(process: int, seconds: float | None = None) -> int | None:
    """The exit code of a forked process, or None if it is still at work after so many seconds; default: wait for it."""
    until = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill(process: int) -> None:
    """SIGKILL to a forked process and to its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)


def finished(work: Callable[[], None], log: Path) -> None:
    """Does some work in a forked process, to its end."""
    code = ended(forked(work, log))
    if code != 0:
        raise RuntimeError(f"a run ended with {code}: {log.read_text()[-2000:]}")


def killed_run(name: str, number: int, runs: Path, source: Path, wanted: str, seconds: float, most: int) -> dict[str, Any]:
    """One run, killed at random instants and resumed until it ends."""
    draw, out, log = random.Random(f"{name} {number}"), runs / f"{name}-{number}", runs / f"{name}-{number}.log"
    if number % 2:  # there is something to overwrite
        shutil.copytree(source, out)
    before, result = digest(out), {"run": name, "kills": 0, "torn": 0, "with_result_there": bool(number % 2)}
    stages = []
    while True:
        process = forked(lambda: RUNS[name](out, source), log)
        if result["kills"] < most:
            code = ended(process, draw.uniform(0.0, draw.choice((0.3, 0.9)) * seconds))
            if code is None:
                kill(process)
                result["kills"] += 1
                result["torn"] += digest(out) not in (before, wanted)
                checkpoints = checkpoints_of(out)
                stages.append(int(checkpoints[-1].name[5:]) if checkpoints else 0)
                continue
        else:
            code = ended(process)
        break
    left = sorted(path.name for path in runs.iterdir() if path.name.startswith((out.name + ".run", f".{out.name}.")))
    result |= {"exit": code, "same": digest(out) == wanted, "left_behind": left, "last_checkpoints": stages}
    shutil.rmtree(out, ignore_errors=True)
    return result


def measure_kills(count: int, runs: Path) -> dict[str, Any]:
    """Kills runs until there were so many kills."""
    source, rows, references = runs / "source", [], {}
    finished(lambda: run_convert(source, source), runs / "source.log")
    number = 0
    while (done := sum(row["kills"] for row in rows)) < count:
        name = list(RUNS)[number // 2 % len(RUNS)]
        if name not in references:
            start = time.monotonic()
            finished(lambda name=name: RUNS[name](runs / f"whole-{name}", source), runs / f"whole-{name}.log")
            references[name] = (digest(runs / f"whole-{name}"), time.monotonic() - start)
        rows.append(killed_run(name, number, runs, source, *references[name], most=min(MOST_KILLS, count - done)))
        click.echo(json.dumps(rows[-1]), err=True)
        number += 1
    return {"rows": rows, "seconds": {name: round(seconds, 1) for name, (_, seconds) in references.items()}}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The second checkpoint finds no space: half of a file is written, then the system reports an error."""
    module, calls = sys.modules["mxdsurgery.runs.resume"], []
    real = module.save_file

    def save(tensors: Any, path: Path) -> None:
        calls.append(path)
        real(tensors, path)
        if len(calls) == 2:
            os.truncate(path, path.stat().st_size // 2)
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    module.save_file = save
    try:
        yield
    finally:
        module.save_file = real


@contextlib.contextmanager
def short_files() -> Iterator[None]:
    """The system writes no file beyond half a MiB: a real short write, in whichever file is that long."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    yield


def stopped_run(out: Path, log: Path) -> None:
    """A conversion killed after its second checkpoint."""
    process = forked(lambda: run_convert(out, out), log)
    while len(checkpoints_of(out)) < 2:
        if ended(process, 0.01) is not None:
            raise RuntimeError(f"the run ended too soon: {log.read_text()[-2000:]}")
    kill(process)


def last_lines(log: Path) -> str:
    """The named error that a run ended with."""
    lines = log.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.split(":")[0].endswith("Error")]
    return " ".join(lines[starts[-1] :]) if starts else ""


def spoil(path: Path, how: str) -> None:
    """Cuts a file, alters one byte of it, or removes it."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def measure_faults(runs: Path) -> dict[str, Any]:
    """Each fault: what was said, and whether the run then goes on to the same result."""
    whole, rows = runs / "whole", []
    finished(lambda: run_convert(whole, whole), runs / "whole.log")
    wanted = digest(whole)

    def note(fault: str, out: Path, log: Path, code: int | None) -> None:
        said, gone = last_lines(log).replace(str(runs), "DIR"), digest(out) is None
        newest = checkpoints_of(out)
        if "is damaged" in said:
            shutil.rmtree(newest[-1])  # as the error says
        again = ended(forked(lambda: run_convert(out, out), log))
        rows.append({"fault": fault, "exit": code, "said": said, "nothing_half_written": gone})
        rows[-1] |= {"resumed": again == 0, "same": digest(out) == wanted}
        click.echo(json.dumps(rows[-1]), err=True)
        shutil.rmtree(out, ignore_errors=True)

    def under(fault: Any, out: Path) -> None:
        with fault():
            run_convert(out, out)

    for name, fault in (("the disk is full at the second checkpoint", full_disk), ("files end at 512 KiB", short_files)):
        out, log = runs / f"fault-{len(rows)}", runs / f"fault-{len(rows)}.log"
        note(name, out, log, ended(forked(lambda fault=fault, out=out: under(fault, out), log)))
    for file in ("training.safetensors", "state.json", "manifest.json"):
        for how in ("cut", "altered", "missing"):
            out, log = runs / f"fault-{len(rows)}", runs / f"fault-{len(rows)}.log"
            stopped_run(out, log)
            newest = checkpoints_of(out)[-1]
            spoil(newest / file, how)
            note(f"{file} of a checkpoint: {how}", out, log, ended(forked(lambda out=out: run_convert(out, out), log)))
    return {"rows": rows}


def several(count: int, arguments: list[str]) -> None:
    """A command of mxdsurgery in several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    made = subprocess.run(
        [*launch, "-m", "mxdsurgery", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(made.stdout + made.stderr)


def apart(first: Path, second: Path) -> dict[str, float]:
    """How far the new layers of two folders are from each other: the largest relative distance of a tensor, and KL's."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    distance = max(
        ((tensor.float() - other[name].float()).norm() / tensor.float().norm().clamp_min(1e-9)).item()
        for name, tensor in one.items()
    )
    kl = [read_json(folder / "evaluation.json")["all"]["kl"] for folder in (first, second)]
    same = all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return {"same_bits": same, "largest_distance": distance, "kl": kl}


def measure_processes(runs: Path) -> dict[str, Any]:
    """What one, two and three processes make, in each way."""
    options = CONVERT | {"activation_buffer": 0, "batch": 768, "precision": "fp32", "selection": "fp32"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    rows = []
    several(1, ["convert", "demo-glu", *flags, "--out", str(runs / "one")])
    several(1, ["heal", str(runs / "one"), "--tokens=6144", "--batch=768", "--out", str(runs / "healed")])
    for count in (2, 3):
        for way in ("layers", "data"):
            out = runs / f"{way}-{count}"
            several(count, ["convert", "demo-glu", *flags, f"--parallel={way}", "--out", str(out)])
            rows.append({"command": "convert", "parallel": way, "processes": count} | apart(runs / "one", out))
            click.echo(json.dumps(rows[-1]), err=True)
        out = runs / f"healed-{count}"
        several(count, ["heal", str(runs / "one"), "--tokens=6144", "--batch=768", "--out", str(out)])
        rows.append({"command": "heal", "parallel": "data", "processes": count} | apart(runs / "healed", out))
        click.echo(json.dumps(rows[-1]), err=True)
    return {"rows": rows}


def kills_section(found: dict[str, Any]) -> Iterator[str]:
    """How many kills there were, and what came of them."""
    rows = found["rows"]
    yield "## Killed runs\n"
    yield "`python scripts/measure/reliability.py kills --count 50 --runs DIR`\n"
    yield table(
        "run | runs | SIGKILLs | result torn | ended well | same weights and figures as uninterrupted | left behind",
        (_kills_row(name, [row for row in rows if row["run"] == name]) for name in RUNS),
    )
    every = [step for row in rows for step in row["last_checkpoints"]]
    yield (
        f"\nAt the moment of the kill there was no checkpoint {every.count(0)} times; otherwise the newest was of steps "
        f"{min(filter(None, every), default=0)} to {max(every)}. Half of the runs had an earlier result to replace.\n"
    )


def _kills_row(name: str, rows: list[dict[str, Any]]) -> str:
    sums = [sum(row[what] for row in rows) for what in ("kills", "torn")]
    sums += [sum(row["exit"] == 0 for row in rows), sum(row["same"] for row in rows)]
    return cells(name, len(rows), *sums, sum(len(row["left_behind"]) for row in rows))


def faults_section(found: dict[str, Any]) -> Iterator[str]:
    """Each fault and what came of it."""
    yield "## Faults\n"
    yield "`python scripts/measure/reliability.py faults --runs DIR`\n"
    rows = []
    for row in found["rows"]:
        half, same = ("no" if row["nothing_half_written"] else "**yes**"), ("yes" if row["same"] else "**no**")
        rows.append(cells(row["fault"], row["exit"], row["said"], half, same))
    yield table("fault | exit code | what was said | result half written | goes on to the same bits", rows)
    yield ""


def processes_section(found: dict[str, Any]) -> Iterator[str]:
    """How far results of several processes are from those of one."""
    yield "## Several processes\n"
    yield "`python scripts/measure/reliability.py processes --runs DIR`, in fp32, against one process:\n"
    rows = (
        f"{row['command']} | {row['parallel']} | {row['processes']} | {'yes' if row['same_bits'] else 'no'} "
        f"| {row['largest_distance']:.1e} | {row['kl'][0]:.5f} | {row['kl'][1]:.5f}"
        for row in found["rows"]
    )
    yield table(
        "command | parallel | processes | same bits | largest relative distance of a tensor | KL, one process | KL", rows
    )
    yield ""


@click.group()
def main() -> None:
    """Measures what runs survive."""


@main.command()
@click.option("--count", default=50, show_default=True, help="Kills.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="An empty folder to work in.")
def kills(count: int, runs: Path) -> None:
    """Kill runs at random instants."""
    runs.mkdir(parents=True)
    write_json(KEPT / "kills.json", measure_kills(count, runs))


@main.command()
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="An empty folder to work in.")
def faults(runs: Path) -> None:
    """Spoil checkpoints and fill the disk."""
    runs.mkdir(parents=True)
    write_json(KEPT / "faults.json", measure_faults(runs))


@main.command()
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="An empty folder to work in.")
def processes(runs: Path) -> None:
    """Compare several processes with one."""
    runs.mkdir(parents=True)
    write_json(KEPT / "processes.json", measure_processes(runs))


def cases_section(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What people ran into, and what was found of the same kinds; a test holds each row (tests/test_cases.py)."""
    given = sum(row["given"] for row in rows)
    others = len(rows) - given
    yield "## What people ran into\n"
    yield f"{given} inputs rebuilt from public reports of people who do this job, and {others} others of the same kinds.\n"
    for kind in dict.fromkeys(row["kind"] for row in rows):
        yield f"### {kind}\n"
        mine = [row for row in rows if row["kind"] == kind]
        tests = [f"`{row['test'].rpartition('/')[2]}`" for row in mine]
        found = [cells(row["tried"], row["before"], row["now"], test) for row, test in zip(mine, tests, strict=True)]
        yield table("tried | before | now | test", found) + "\n"


@main.command()
def page() -> None:
    """Print docs/reliability.md."""
    click.echo("\n".join(["# Reliability\n", __doc__.split("\n\n", 2)[2], *sections()]))


def sections() -> Iterator[str]:
    """The page's sections, as far as they are measured."""
    found = {"kills.json": kills_section, "faults.json": faults_section, "processes.json": processes_section}
    found |= {"cases.json": cases_section}
    for name, section in found.items():
        if (measured := read_json(KEPT / name)) is not None:
            yield from section(measured)
    for title, name, command in (
        ("Input from outside", "fuzz.md", "python scripts/measure/fuzz.py --minutes 5"),
        ("Other versions", "versions.md", "python scripts/measure/compatibility.py --venvs DIR --with-cuda"),
    ):
        if (KEPT / name).is_file():
            yield f"## {title}\n\n`{command} > docs/reliability/{name}`\n"
            text = (KEPT / name).read_text(encoding="utf-8")
            yield text if "|---" in text else f"```\n{text.strip()}\n```\n"


if __name__ == "__main__":
    main()
