"""The catalogue of experts agrees with what the model does, at any batch size, also after an interruption."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from running import ROOT
from safetensors.torch import load_file
from tiny import tiny_model

from mxdsurgery import coefficients, experts, search
from mxdsurgery.base.unembedding import Unembedding
from mxdsurgery.catalogue.experts import experts_table
from mxdsurgery.catalogue.files import SCHEMA, open_catalogue
from mxdsurgery.catalogue.search import search_table
from mxdsurgery.catalogue.statistics import AFTER, BEFORE, BINS, Tally
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.cli import main
from mxdsurgery.errors import (
    CatalogueError,
    CheckpointError,
    DataError,
    Interrupted,
    LayerSelectionError,
    MemoryBudgetError,
    OutputError,
)
from mxdsurgery.layers.layer import Coefficients


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two kinds of text."""
    path = tmp_path_factory.mktemp("text") / "kinds.jsonl"
    rows = [{"text": f"def function_{i}(self, value):\n    return self.value + {i}\n" * 6, "kind": "code"} for i in range(40)]
    rows += [
        {"text": f'"""The {i}th line of words that say something to a reader.\n"""\n' * 6, "kind": "words"} for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(converted, labelled, tmp_path_factory):
    """The converted demo model with a catalogue."""
    out = tmp_path_factory.mktemp("catalogue") / "demo"
    shutil.copytree(converted.recipe.out, out)
    experts(out, data=labelled, tokens=6_000)
    return out


@pytest.fixture(scope="module")
def dense(folder):
    """Layer 1 on the catalogue's contexts: all coefficients (S, T, N), ``D z`` (S, T, D), and the layer."""
    loaded, catalogue = load(folder, dtype="float32"), open_catalogue(folder)  # as the catalogue was computed
    ids = torch.from_numpy(np.stack(catalogue.input_ids.to_numpy())).long()
    layer, seen = loaded.layers[1], {}
    layer.gate.register_forward_hook(lambda _m, _a, a: seen.update(a=a))
    layer.decoder.register_forward_hook(lambda _m, _a, m: seen.update(m=m))
    with torch.no_grad():
        loaded.model.base_model(input_ids=ids, use_cache=False)
    a = Coefficients(seen["a"].values.float(), seen["a"].indices).dense(256)
    a[:, 0] = 0  # left out of all figures
    return a, seen["m"].float(), layer, loaded.model


def test_counts_and_means_are_the_models(folder, dense):
    a, *_ = dense
    catalogue = open_catalogue(folder)
    table = catalogue.table(1)
    assert table.schema == SCHEMA and catalogue.tokens == a[:, 1:, 0].numel()
    fired = (a > 0).sum((0, 1))
    assert table["expert"].to_pylist() == list(range(256))
    assert table["fired"].to_pylist() == fired.tolist() and fired.sum() > 10_000
    np.testing.assert_allclose(table["frequency"].to_numpy(), fired / catalogue.tokens)
    np.testing.assert_allclose(table["mean"].to_numpy(), a.sum((0, 1)) / fired.clamp_min(1), rtol=1e-4)
    np.testing.assert_array_equal(table["maximum"].to_numpy(), a.amax((0, 1)))
    expert = fired.argmax().item()
    counts = np.histogram(a[..., expert][a[..., expert] > 0], bins=[*BINS, np.inf])[0]
    assert table["histogram"][expert].as_py() == counts.tolist()
    maximum = load_file(folder / "experts" / "maximum.safetensors")
    assert torch.equal(maximum["layer1"], a.amax((0, 1))) and set(maximum) == {"layer1", "layer2"}


def test_places_are_where_it_fired_most_strongly_one_a_context(folder, dense):
    a, *_ = dense
    catalogue = open_catalogue(folder)
    filled = 0
    for row in catalogue.table(1, ["expert", "fired", "top", "sample"]).to_pylist():
        mine = a[..., row["expert"]]
        best = mine.amax(1).sort(descending=True).values
        assert [place["coefficient"] for place in row["top"]] == best[best > 0][:10].tolist()
        assert len(row["sample"]) == min(10, row["fired"])
        filled += len(row["sample"])
        for place in row["top"] + row["sample"]:
            assert mine[place["context"], place["position"]] == place["coefficient"]
            tokens, window, own = catalogue.window(place)
            start = max(0, place["position"] - BEFORE)
            there = mine[place["context"], start : place["position"] + AFTER + 1]
            np.testing.assert_allclose(window, there, rtol=1e-3)
            assert tokens == catalogue.input_ids[place["context"]].as_py()[start : start + len(there)]
            assert start + own == place["position"]
    assert filled > 1000


def test_the_sample_is_drawn_evenly_from_all_firings():
    tally = Tally.none(n_experts=1, d_model=2, classes=0, top=1, sample=50)
    draw = torch.Generator().manual_seed(0)
    for start in range(0, 400, 4):  # one expert that fires everywhere, ever more strongly
        values = torch.arange(start, start + 4.0)[:, None, None].expand(4, 9, 1) + 1
        tally.add(Coefficients(values, torch.zeros(4, 9, 1, dtype=torch.int64)), None, torch.zeros(4, 9), start, draw)
    contexts = tally.sample.context.float()
    assert tally.fired.item() == 3200 and tally.top.context.item() == 399
    assert 150 < contexts.mean() < 250 and contexts.std() > 90
    assert (
        len({(c, p) for c, p in zip(tally.sample.context[0].tolist(), tally.sample.position[0].tolist(), strict=True)}) == 50
    )


def test_classes_are_counted_by_token(folder, dense, labelled):
    a, *_ = dense
    catalogue = open_catalogue(folder)
    assert catalogue.classes == ["code", "words"]
    classes = np.stack(pq.read_table(folder / "experts" / "contexts.parquet")["classes"].to_numpy())
    assert catalogue.class_tokens == [(classes[:, 1:] == number).sum() for number in (0, 1)]
    assert sum(catalogue.class_tokens) == catalogue.tokens
    fired = np.asarray(catalogue.table(1)["class_fired"].to_pylist())
    for number in (0, 1):
        np.testing.assert_array_equal(fired[:, number], (a.numpy() > 0)[classes == number].sum(0))
    assert (fired[:, 0] > 20 * (fired[:, 1] + 1)).any()  # some expert prefers code


def test_promoted_tokens_are_those_of_the_mean_contribution(folder, dense):
    a, m, layer, model = dense
    row = max(open_catalogue(folder).table(1).to_pylist(), key=lambda row: row["fired"])
    mine = a[..., row["expert"]]
    contribution = (mine[..., None] * m)[mine > 0].mean(0) * layer.experts.weight[row["expert"]].float()
    logits = model.lm_head.weight.float() @ (contribution * model.model.norm.weight.float())
    logits = logits - logits.mean()
    best = logits.topk(8)
    assert [entry["token"] for entry in row["promotes"]] == best.indices.tolist()
    np.testing.assert_allclose([entry["value"] for entry in row["promotes"]], best.values, rtol=0.02)
    assert [e["token"] for e in row["demotes"]][0] == logits.argmin()
    c = layer.experts.weight.float()
    assert [entry["dimension"] for entry in row["scales_up"]] == c[row["expert"]].topk(8).indices.tolist()
    cosine = torch.nn.functional.cosine_similarity(c[row["expert"]][None], c)
    nearest = row["similar"][0]
    assert cosine[nearest["expert"]].item() == pytest.approx(nearest["cosine"], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "opt"])
def test_the_unembedding_is_the_models_own_last_step(family):
    model = tiny_model(family)
    unembedding = Unembedding.of(model)
    x, direction = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0)).unbind()
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.zeros(1, 2, dtype=torch.int64))
    norms = [m for n, m in model.base_model.named_modules() if "norm" in n.lower() and "layers." not in n or n == "ln_f"]
    norm = [m for m in norms if getattr(m, "weight", None) is not None][-1]
    # Far along a direction, the norm's output depends on that direction only: logits follow it, up to scale.
    far = head(norm(1e6 * direction) - norm(0 * x)).float()
    far = far - far.mean()
    mine = unembedding.logits(direction)
    assert torch.nn.functional.cosine_similarity(mine, far).item() > 0.9999


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(converted, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("mxdsurgery.catalogue.experts._BATCH", 512)
    options = {"data": labelled, "tokens": 4_000, "checkpoint_every": 2}
    experts(converted.recipe.out, out=tmp_path / "whole", **options)
    add, calls = Tally.add, []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 8:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(Tally, "add", interrupted)
    with pytest.raises(Interrupted, match="with resume=True goes on from there"):
        experts(converted.recipe.out, out=tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.run").is_dir()
    with pytest.raises(OutputError, match="holds an unfinished run"):
        experts(converted.recipe.out, out=tmp_path / "parts", **options)
    with pytest.raises(CheckpointError, match="depends on something else: source"):
        experts(converted.recipe.out, out=tmp_path / "parts", resume=True, **options | {"tokens": 3_000})
    before = len(calls)
    experts(converted.recipe.out, out=tmp_path / "parts", resume=True, **options)
    assert len(calls) - before < 2 * 8  # not all of it is computed again
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_a_full_disk_is_named_and_the_same_command_goes_on(converted, labelled, tmp_path, monkeypatch):
    options = {"data": labelled, "tokens": 2_000, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("mxdsurgery.catalogue.experts.write_tables", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OutputError, match="No space left on device(.|\n)*same call with resume=True goes on"):
            experts(converted.recipe.out, **options)
    assert not (tmp_path / "out").exists()
    experts(converted.recipe.out, resume=True, **options)
    before = open_catalogue(tmp_path / "out").tokens
    experts(converted.recipe.out, **options | {"tokens": 3_000}, overwrite=True)
    assert open_catalogue(tmp_path / "out").tokens > before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_it_cannot_do_is_named(converted, folder, labelled, tmp_path, monkeypatch):
    out = converted.recipe.out
    with pytest.raises(OutputError, match="exists already"):
        experts(folder, data=labelled)
    with pytest.raises(DataError, match="without the field 'language'"):
        experts(out, data=labelled, label_column="language", out=tmp_path / "a")
    with pytest.raises(LayerSelectionError, match="layers among 1, 2"):
        experts(out, data=labelled, layers="0-1", out=tmp_path / "b")
    monkeypatch.setattr("mxdsurgery.catalogue.experts.free_memory", lambda _device: 1000)
    with pytest.raises(MemoryBudgetError, match="what is kept of 512 experts takes"):
        experts(out, data=labelled, tokens=1000, out=tmp_path / "c")


def test_the_command_prints_a_table_and_json(folder, labelled, tmp_path):
    arguments = ["experts", str(folder), "--data", labelled, "--tokens", "2k", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Experts on 1,9" in result.output and "The catalogue is in" in result.output
    again = CliRunner().invoke(main, [*arguments, "--overwrite", "--json"])
    made = json.loads(again.stdout)
    assert made["layers"][0]["n_experts"] == 256 and made["classes"] == ["code", "words"] and experts_table(made)


def test_the_example_erases_a_kind_of_text(folder, labelled, forking):
    script = ROOT / "examples" / "erase_capability.py"
    flags = [
        "--kind",
        "code",
        "--data",
        labelled,
        "--experts",
        "4,120",
        "--tokens",
        "3000",
        "--random",
        "2",
        "--baseline",
        folder,
    ]
    ran = forking.script(script, folder, *flags)
    assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stdout.splitlines() if " of code" in line]
    assert len(rows) == 4 and rows[:2] == rows[2:]  # the baseline is the same model here
    code, words = (float(re.sub(r"[^-+.0-9]", "", cell)) for cell in rows[1].split("│")[3:5])
    assert code > abs(words)
    wrong = forking.script(script, folder, "--kind", "verse", *flags[2:])
    assert wrong.returncode == 1 and "knows no 'verse', only code, words" in wrong.stderr


def test_search_by_text_ranks_by_what_a_firing_tells(folder, dense):
    found = search(folder, "    return self.value + 7\n", by="text", layer=1)
    best = found["experts"][0]
    a, *_, model = dense
    ids = load(folder).tokenizer()("    return self.value + 7\n", return_tensors="pt")["input_ids"]
    seen = []
    handle = model.mxd.layers[1].gate.register_forward_hook(lambda _m, _a, a: seen.append(a))
    with torch.no_grad():
        model(ids)
    handle.remove()
    fires = (seen[0].values > 0) & (seen[0].indices == best["expert"])
    assert fires.any(-1).float().mean().item() == pytest.approx(best["share"])
    assert best["share"] > best["frequency"] and best["score"] == max(row["score"] for row in found["experts"])
    words = search(folder, "words that say something to a reader", by="text", layer=1)
    assert words["experts"][0]["expert"] != best["expert"]
    assert search_table(found)


def test_search_by_token_finds_experts_whose_firings_stand_on_it(folder):
    found = search(folder, "self")
    assert found["by"] == "token" and found["experts"]
    best = found["experts"][0]
    assert best["share"] > 0.5
    assert search(folder, "def function(self):")["by"] == "text"
    with pytest.raises(DataError, match="more than one token"):
        search(folder, "def function(self):", by="token")
    for by in ("text", "token", "auto"):
        with pytest.raises(DataError, match="the query is empty"):
            search(folder, "", by=by)
        with pytest.raises(LayerSelectionError, match="holds no experts in layer 9"):
            search(folder, "self", by=by, layer=9)
        assert search(folder, "self", by=by, layer=-3) == search(folder, "self", by=by, layer=1)


def test_search_by_class_is_a_search_by_all_that_the_class_says(folder):
    found = search(folder, "code", by="class", layer=1)
    catalogue = open_catalogue(folder)
    own = catalogue.classes.index("code")
    for row in found["experts"][:5]:
        kept = catalogue.row(1, row["expert"], ["class_fired", "frequency"])
        assert row["share"] == pytest.approx(kept["class_fired"][own] / catalogue.class_tokens[own])
        assert row["share"] > kept["frequency"]
    assert search(folder, "words", by="class", layer=1)["experts"][0]["expert"] != found["experts"][0]["expert"]
    with pytest.raises(DataError, match=r"no class 'verse'\nexpected: one of code, words"):
        search(folder, "verse", by="class")
    assert "By class: code" in str(search_table(found).title)


def test_without_a_query_each_token_has_the_expert_that_it_tells_most_about(folder):
    found = search(folder, top=15)
    assert found["by"] == "clearest" and len(found["experts"]) == 15
    tokens = [row["token"] for row in found["experts"]]
    assert len(set(tokens)) == len(tokens)
    assert [row["score"] for row in found["experts"]] == sorted((row["score"] for row in found["experts"]), reverse=True)
    catalogue, tokenizer = open_catalogue(folder), load(folder).tokenizer()
    for row in found["experts"]:
        kept = catalogue.row(row["layer"], row["expert"], ["sample", "fired"])
        fired_on = [catalogue.input_ids[place["context"]][place["position"]].as_py() for place in kept["sample"]]
        share = sum(tokenizer.decode([token]) == row["token"] for token in fired_on) / len(fired_on)
        assert share == pytest.approx(row["share"]) and kept["fired"] >= 50
    assert [column.header for column in search_table(found).columns][-2] == "token"


def test_a_search_that_finds_nothing_says_so(folder):
    for by, way in (("token", "--by text reads it"), ("text", "try another text")):
        table = search_table({"by": by, "query": "x", "tokens": ["x"], "experts": []})
        assert "No expert fires on it" in table.caption and way in table.caption
    assert search_table(search(folder, "self")).caption is None


def test_search_wants_the_models_own_catalogue(converted, folder, tmp_path):
    with pytest.raises(CatalogueError, match="run mxdsurgery experts"):
        search(converted.recipe.out, "self")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    settings = json.loads((other / "experts" / "experts.json").read_text())
    (other / "experts" / "experts.json").write_text(json.dumps(settings | {"fingerprint": "0" * 16}))
    with pytest.raises(CatalogueError, match="is of another model"):
        search(other, "self")
    (other / "experts" / "experts.json").write_text("{")
    with pytest.raises(CatalogueError, match="cannot be read"):
        search(other, "self")


@pytest.mark.parametrize("form", ["parquet", "safetensors"])
def test_coefficients_are_the_models_in_either_form(converted, tmp_path, form, monkeypatch):
    monkeypatch.setattr("mxdsurgery.catalogue.coefficients.PART", 1024)
    made = coefficients(converted.recipe.out, out=tmp_path / "out", form=form, tokens=3_000)
    if form == "parquet":
        tables = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pydict() for name in ("tokens", "layer2")}
        columns = {key: torch.tensor(values) for table in tables.values() for key, values in table.items()}
    else:
        parts = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(parts) > 4
        columns = {}
        for path in parts:
            if path.name.startswith(("tokens", "layer2")):
                for key, tensor in load_file(path).items():
                    columns[key] = torch.cat([columns[key], tensor]) if key in columns else tensor
    assert len(columns["token"]) == made["tokens"] == len(columns["experts"]) and columns["position"].min() == 0
    loaded = load(converted.recipe.out, dtype="float32")  # as they were computed
    context = columns["token"][columns["context"] == 3].long()
    seen = []
    loaded.layers[2].gate.register_forward_hook(lambda _m, _a, a: seen.append(a))
    with torch.no_grad():
        loaded.model(context[None])
    mine = Coefficients(columns["coefficients"], columns["experts"].long()).dense(256)[columns["context"] == 3]
    torch.testing.assert_close(mine, seen[0].dense(256)[0].float(), rtol=0.02, atol=0.02)
    with pytest.raises(OutputError, match="exists already"):
        coefficients(converted.recipe.out, out=tmp_path / "out")
