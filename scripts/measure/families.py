"""Every family that transformers maps to a causal language model: converted end to end at a tiny size, or refused by name.

    python scripts/measure/families.py measure --jobs 2     # all of them, into docs/families/figures.json, in half an hour
    python scripts/measure/families.py measure gpt2 phi3    # some, into the same file
    python scripts/measure/families.py check gpt2 phi3      # the same, printed as JSON
    python scripts/measure/families.py page > docs/families.md

For each, a tiny random model is built offline and saved; its blocks are found and recomputed, one layer is converted for a few
steps, evaluated, exported and reloaded in a fresh process; generation with the cache is compared with generation without; one
expert is ablated, saved and reloaded again, and compared with the same ablation live.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import torch
import transformers
from pages import DOCS, ROOT, cells, read_json, table
from tiny_models import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mxdsurgery
from mxdsurgery.base.families import family_of
from mxdsurgery.base.model import open_model
from mxdsurgery.base.proof import prove_block
from mxdsurgery.errors import NotCausalLMError, UnknownFamilyError, UnsupportedBlockError

FIGURES = DOCS / "families" / "figures.json"
INTRODUCTION = DOCS / "families" / "introduction.md"
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

HANDFUL = 8  # families in one process
SECONDS = 180  # that one family may take
REFUSALS = (NotCausalLMError, UnknownFamilyError, UnsupportedBlockError)  # other errors are not about the family
SETTINGS = {
    "tokens": 2048,
    "eval_tokens": 512,
    "context": 64,
    "batch": 256,
    "n_experts": 16,
    "k": 4,
    "device": "cpu",
}


class Wrong(Exception):
    """A family that is neither converted as it should be nor refused by name."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and three special ones."""
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2]
    )


def check(family: str, folder: Path) -> dict[str, Any]:
    """A family from its config to an edited checkpoint.

    Returns:
        A row of docs/families/figures.json: ``verdict`` is ``converted``, ``refused`` (with ``reason``, the named error) or
        ``wrong``.
    """
    row: dict[str, Any] = {"family": family}
    started = time.perf_counter()
    try:
        row |= _refused_or_converted(family, folder)
    except Exception as error:  # any failure is a finding here
        print(traceback.format_exc(), file=sys.stderr)
        row |= {"verdict": "wrong", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _refused_or_converted(family: str, folder: Path) -> dict[str, Any]:
    source = folder / "original"
    if family_of(family).refused is not None:
        return {"verdict": "refused", "reason": family_of(family).refused}
    row: dict[str, Any] = {}
    try:
        model = tiny_model(family)
        model.save_pretrained(source)
        row["class"] = type(model).__name__
        del model
    except Exception:  # transformers itself cannot build it: see how we refuse it
        tiny_config(family).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    try:
        found = mxdsurgery.analyze(str(source))
        able = [finding for finding in found.layers if finding.block is not None]
        row["able"], row["layers"] = len(able), len(found.layers)
        chosen = str(able[-1].layer) if able else "all"
        base = open_model(str(source)).load()
        row["error"] = max((prove_block(base, finding.block) for finding in able), default=None)
        settings = SETTINGS | {"data": text(folder, "CHANGELOG.md"), "eval_data": text(folder, "CONTRIBUTING.md")}
        converted = mxdsurgery.convert(str(source), layers=chosen, out=str(folder / "converted"), **settings)
    except REFUSALS as error:
        return row | {"verdict": "refused", "reason": error.found.replace(repr(str(source)), family)}
    block = converted.plan.blocks[0]
    row |= {"kind": block.kind, "activation": block.activation, "block": block.path}
    row["left"] = sorted({finding.reason for finding in found.layers if finding.reason})
    row["delta_ce"] = converted.evaluation["all"]["delta_ce"]
    _check_generation(converted.out, base)
    _check_edit(converted.out, folder / "edited", block.layer)
    return row | {"verdict": "converted"}


def text(folder: Path, name: str) -> str:
    """One of the project's pages as a text to train on."""
    path = folder / f"{name}.txt"
    path.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return str(path)


def _check_generation(out: Path, base: PreTrainedModel) -> None:
    """Raises Wrong unless greedy text is the same with the cache and without, as far as the original's is the same."""
    ids = torch.arange(10, 22).view(1, -1)

    def texts(model: PreTrainedModel) -> list[torch.Tensor]:
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
        return [model.generate(ids, use_cache=cached, **settings) for cached in (True, False)]

    with_cache, without = texts(mxdsurgery.load(out).model)
    if not torch.equal(with_cache, without) and torch.equal(*texts(base)):
        raise Wrong("generation with the cache differs from generation without")


@torch.no_grad()
def _check_edit(out: Path, edited: Path, layer: int) -> None:
    """Raises Wrong unless an ablated expert, saved and reloaded, is what the same ablation does live, and does something."""
    converted = mxdsurgery.load(out)
    ids = torch.arange(10, 22).view(1, -1)
    chosen: list[torch.Tensor] = []
    handle = converted.layers[layer].gate.register_forward_hook(lambda _m, _x, a: chosen.append(a.indices[a.values > 0]))
    before = converted.model(input_ids=ids, use_cache=False).logits
    handle.remove()
    expert = int(chosen[0].mode().values)
    with converted.model.mxd.ablate({layer: [expert]}):
        live = converted.model(input_ids=ids, use_cache=False).logits
    mxdsurgery.edit(out, edits=mxdsurgery.edits_from_flags(ablate=[f"{layer}:{expert}"]), out=edited)
    saved = mxdsurgery.load(edited).model(input_ids=ids, use_cache=False).logits
    if torch.equal(before, live):
        raise Wrong("an ablated expert that was active changes nothing")
    if not torch.allclose(saved, live, rtol=1e-4, atol=1e-5):
        raise Wrong(f"an ablation saved differs from the same live by {(saved - live).abs().max():.1e}")


def check_all(families: list[str]) -> Iterator[dict[str, Any]]:
    """`check` of families one after the other, each in a folder of its own and within `SECONDS`."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(SECONDS)
            try:
                yield check(family, Path(folder))
            finally:
                signal.alarm(0)


def measure(families: list[str], jobs: int = 1) -> None:
    """Checks families, a handful in each process, and puts the results into docs/families/figures.json."""
    figures = read_json(FIGURES, {"rows": {}})
    figures |= {"transformers": transformers.__version__, "torch": torch.__version__}
    handfuls = [families[start : start + HANDFUL] for start in range(0, len(families), HANDFUL)]
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(_in_a_process, handfuls):
            figures["rows"] = dict(sorted((figures["rows"] | rows).items()))
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            for row in rows.values():
                print(json.dumps(row), flush=True)


def _in_a_process(families: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of some families, by family, from a process of their own; if it dies, those without a row are ``wrong``."""
    process = subprocess.run([sys.executable, __file__, "check", *families], capture_output=True, text=True, check=False)
    rows = {row["family"]: row for row in map(json.loads, process.stdout.splitlines())}
    died = {"verdict": "wrong", "reason": f"the process ended with {process.returncode}"}
    return {family: rows.get(family, {"family": family} | died) for family in families}


def page() -> Iterator[str]:
    """docs/families.md."""
    figures = read_json(FIGURES)
    rows = list(figures["rows"].values())
    done = [row for row in rows if row["verdict"] == "converted"]
    refused = [row for row in rows if row["verdict"] == "refused"]
    wrong = [row for row in rows if row["verdict"] == "wrong"]
    yield INTRODUCTION.read_text(encoding="utf-8").rstrip()
    yield ""
    yield "    python scripts/measure/families.py page"
    yield ""
    yield f"transformers {figures['transformers']}, torch {figures['torch']}: of {len(rows)} families {len(done)} are"
    yield f"converted end to end, {len(refused)} refused by name, {len(wrong)} neither. The largest relative error of a"
    yield f"recomputed block is {max((row['error'] for row in done), default=0):.1e}."
    yield ""
    yield "## Converted"
    yield ""
    names = "family | class | kind | activation | layers | block | error | left as it is"
    yield from table(names, map(_converted, done), right=("layers", "error")).splitlines()
    for title, some in (("Refused", refused), ("Neither", wrong)):
        if some:
            yield ""
            yield f"## {title}"
            yield ""
            rows = (cells(row["family"], row.get("class", "-"), row["reason"]) for row in some)
            yield from table("family | class | reason", rows).splitlines()


def _converted(row: dict[str, Any]) -> str:
    start = (row["family"], row["class"], row["kind"], row["activation"], f"{row['able']} of {row['layers']}")
    return cells(*start, f"`{row['block']}`", f"{row['error']:.0e}", "; ".join(row["left"]) or "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "check", "page"))
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    given = parser.parse_args()
    unknown = sorted(set(given.families) - set(FAMILIES))
    if unknown:
        parser.error(f"transformers {transformers.__version__} maps no {', '.join(unknown)} to a causal language model")
    families = given.families or FAMILIES
    if given.what == "page":
        print("\n".join(page()))
    elif given.what == "measure":
        measure(families, given.jobs)
    else:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        for row in check_all(families):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
