"""Loads exported folders under other versions of transformers and torch, and prints the table of docs/reliability.md.

    python scripts/measure/compatibility.py --venvs ../venvs  # makes what environments are not there; the tests' fixtures
    python scripts/measure/compatibility.py --venvs ../venvs DIR ...  # other exported folders

A folder is loaded by plain transformers in a fresh process that cannot import mxdsurgery, and its logits are compared with
those that were stored when it was written: in DIR.logits.safetensors beside it, or else computed in this environment first.
Versions that cannot be installed are a row that says why. A torch that wants CUDA's packages, which are gigabytes, is not
installed unless --with-cuda is given; --torch-index names an index with wheels for the CPU.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from pages import ROOT
from safetensors.torch import load_file, save_file

FIXTURES = ROOT / "tests" / "fixtures"
NEWEST = "newest"
# The oldest that pyproject.toml allows, what constraints.txt pins, and the newest.
TRANSFORMERS, TORCH = ("5.17.0", NEWEST), ("2.9.1", "2.13.0", NEWEST)
# What the plain loading of a checkpoint needs beside them.
BESIDE = ("accelerate", "numpy")

# Runs in another environment's interpreter: logits of the folder, as plain transformers computes them.
_LOGITS = """
import sys
sys.modules["mxdsurgery"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, given, result = sys.argv[1:]
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    save_file({"logits": model(load_file(given)["input_ids"]).logits.float().contiguous()}, result)
"""
_VERSIONS = "import json, torch, transformers as t; print(json.dumps([t.__version__, torch.__version__]))"


def logits_file(folder: Path) -> Path:
    """The file beside a folder that keeps its input ids and logits."""
    return folder.with_name(folder.name + ".logits.safetensors")


def computed(python: Path | str, folder: Path, given: Path, result: Path) -> str | None:
    """Has another interpreter write a folder's logits on given ids; returns why it could not, or None."""
    with tempfile.TemporaryDirectory() as modules:
        kept = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "TQDM_DISABLE": "1"}
        command = [str(python), "-I", "-c", _LOGITS, str(folder), str(given), str(result)]
        done = subprocess.run(command, env=kept, capture_output=True, text=True, cwd=modules, check=False)
    return None if done.returncode == 0 else last_line(done.stderr)


def last_line(text: str) -> str:
    """What an error says at the end."""
    return (text.strip().splitlines() or ["no message"])[-1].strip()


def stored_logits(folder: Path, scratch: Path) -> Path:
    """The logits that a folder was written with; if none are kept beside it, they are computed in a process of their own."""
    if logits_file(folder).is_file():
        return logits_file(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    given, result = scratch / "given.safetensors", scratch / f"{folder.name}.safetensors"
    save_file({"input_ids": ids}, given)
    refused = computed(sys.executable, folder, given, result)
    if refused:
        raise click.ClickException(f"{folder} cannot be loaded in this environment: {refused}")
    save_file(load_file(result) | {"input_ids": ids}, result)
    return result


def environments(venvs: Path, wanted: list[tuple[str, str]], index: str | None, with_cuda: bool) -> Iterator[tuple]:
    """This environment and those wanted, made if missing: versions asked for, interpreter, and why there is none."""
    yield None, None, Path(sys.executable), None
    for transformers, pytorch in wanted:
        folder = venvs / f"transformers-{transformers}-torch-{pytorch}"
        python, stamp = folder / "bin" / "python", folder / "complete.txt"
        reason = None if stamp.is_file() else built(folder, transformers, pytorch, index, with_cuda)
        if reason is None:
            stamp.touch()
        else:
            shutil.rmtree(folder, ignore_errors=True)
        yield transformers, pytorch, python, reason


def built(folder: Path, transformers: str, pytorch: str, index: str | None, with_cuda: bool) -> str | None:
    """Makes a virtual environment with the given versions of two packages; returns why it could not, or None."""
    click.echo(f"-- {folder.name}", err=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--only-binary=:all:", "--quiet"]
    exact = {
        name: name if version == NEWEST else f"{name}=={version}"
        for name, version in (("transformers", transformers), ("torch", pytorch))
    }
    index_flags = [] if index is None else ["--index-url", index]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        dry = [*pip, *index_flags, "--dry-run", "--report", str(report), exact["torch"]]
        done = subprocess.run(dry, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return last_line(done.stderr)
        found = {entry["metadata"]["name"].lower(): entry for entry in json.loads(report.read_text())["install"]}
    cuda = sorted(name for name in found if name.startswith(("nvidia", "cuda")))
    if cuda and not with_cuda:
        wheel = found["torch"]["download_info"]["url"].rsplit("/", 1)[-1]
        return f"only {wheel} can be had, which wants {len(cuda)} packages of CUDA"
    pinned = f"torch=={found['torch']['metadata']['version']}"
    for words in ([*index_flags, pinned], [exact["transformers"], pinned, *BESIDE]):
        done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return last_line(done.stderr)
    return None


def rows(
    folders: list[Path], wanted: list[tuple[str, str]], venvs: Path, torch_index: str | None, with_cuda: bool
) -> Iterator[dict]:
    """A row for each environment and folder; where one cannot be installed, one row."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        references = {folder: stored_logits(folder, scratch) for folder in folders}
        for transformers, pytorch, python, reason in environments(venvs, wanted, torch_index, with_cuda):
            if reason is not None:
                yield {"transformers": transformers, "torch": pytorch, "reason": f"could not be installed here: {reason}"}
                continue
            done = subprocess.run([str(python), "-I", "-c", _VERSIONS], capture_output=True, text=True, check=True)
            transformers, pytorch = json.loads(done.stdout.splitlines()[-1])
            for folder, reference in references.items():
                mxd = json.loads((folder / "config.json").read_text())["mxd"]
                row = {"transformers": transformers, "torch": pytorch, "folder": folder.name, "format": mxd["format_version"]}
                result = scratch / "result.safetensors"
                refused = computed(python, folder, reference, result)
                if refused is None:
                    stored, found = load_file(reference)["logits"], load_file(result)["logits"]
                    row |= {"difference": (found - stored).abs().max().item(), "largest": stored.abs().max().item()}
                yield row | {"reason": refused}


def table(made: list[dict]) -> Iterator[str]:
    """Markdown."""
    yield "| transformers | torch | checkpoint | format | loads | largest difference of logits | largest logit |"
    yield "|---|---|---|---|---|---|---|"
    for row in made:
        versions = f"| {row['transformers']} | {row['torch']} |"
        if "folder" not in row:
            yield f"{versions} | | {row['reason']} | | |"
        elif row["reason"] is not None:
            yield f"{versions} {row['folder']} | {row['format']} | no: {row['reason']} | | |"
        else:
            yield f"{versions} {row['folder']} | {row['format']} | yes | {row['difference']:.2g} | {row['largest']:.3g} |"


@click.command()
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--venvs", type=click.Path(path_type=Path), required=True, help="Where the environments are kept.")
@click.option("--transformers", default=",".join(TRANSFORMERS), show_default=True, help="Versions between commas.")
@click.option("--torch", default=",".join(TORCH), show_default=True, help="Versions between commas.")
@click.option("--torch-index", help="A package index to install torch from, such as PyTorch's own of CPU wheels.")
@click.option("--with-cuda", is_flag=True, help="Install a torch that wants CUDA's packages, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(folders: tuple[Path, ...], venvs: Path, transformers: str, torch: str, as_json: bool, **options: object) -> None:
    """Print under which versions exported folders (default: the tests' fixtures) load, and how far their logits are off."""
    wanted = list(itertools.product(transformers.split(","), torch.split(","))) if transformers and torch else []
    fixtures = sorted(path for path in FIXTURES.glob("format_*") if path.is_dir())
    made = list(rows([folder.resolve() for folder in folders] or fixtures, wanted, venvs.resolve(), **options))
    for line in [json.dumps(made)] if as_json else table(made):
        click.echo(line)


if __name__ == "__main__":
    main()
