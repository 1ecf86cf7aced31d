"""Activations that are kept on disk: the same bits, no pass of the base model, and nothing of something else."""

import dataclasses
import itertools
import json
import shutil
import signal

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import tiny_model

import mxdsurgery
from mxdsurgery import processes
from mxdsurgery.aside import MARKER
from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.cli import main
from mxdsurgery.errors import CacheError, Interrupted, OutputError
from mxdsurgery.measuring.frontier_table import layer_file
from mxdsurgery.recipe import Recipe
from mxdsurgery.training import distill
from mxdsurgery.training.activation_cache import CACHE_FILE, ActivationCache, kept_bytes
from mxdsurgery.training.inputs import OriginalInputs

RECIPE = Recipe(k=4, n_experts=64, data="stdlib", batch=64, context=16, tokens=320)
CPU = torch.device("cpu")


@dataclasses.dataclass
class Random:
    """As a `TextStream` of random ids, by a seed."""

    seed: int = 0
    passes: int = 1

    def batches(self, size):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield torch.randint(1, 64, (size, 16), generator=generator)


def fed(model, folder, count=6, layers=(0, 1), skip=0, text=None, recipe=RECIPE):
    """What layers are fed, by a source that keeps activations in a folder or nowhere, and in how many passes of the model.

    Returns:
        The tensors: statistics, then ``count`` batches from number ``skip`` on. And the passes.
    """
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        blocks = [finding.block for finding in find_blocks(model) if finding.block.layer in layers]
        kept = None if folder is None else ActivationCache(folder, model, recipe)
        with OriginalInputs(model, text or Random(), recipe, CPU, kept).feed(blocks, skip) as feed:
            tensors = [part for layer in layers for part in feed.statistics[layer]]
            for batch in itertools.islice(feed.batches, count):
                assert list(batch) == list(layers)
                tensors += [part for pair in batch.values() for part in pair]
    finally:
        hook.remove()
    return tensors, len(passes)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def kept(model, tmp_path):
    """A folder with six batches of both layers."""
    fed(model, tmp_path / "kept")
    return tmp_path / "kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_kept_gives_the_same_bits_and_one_pass_proves_it(model, tmp_path, dtype):
    model.to(dtype)
    wanted, passes = fed(model, None)
    assert passes == 4 + 6  # for statistics, and to train on
    first, passes = fed(model, tmp_path / "kept")
    assert_same(first, wanted)
    assert passes == 4 + 6
    again, passes = fed(model, tmp_path / "kept")
    assert_same(again, wanted)
    assert passes == 1
    assert sorted(files(tmp_path / "kept")) == [CACHE_FILE, *(f"layer_{n}/00000000-00000006.safetensors" for n in (0, 1))]
    tensors = load_file(tmp_path / "kept" / "layer_1" / "00000000-00000006.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "ids": ((6, 4, 16), torch.int64),
        "x": ((6, 64, 32), dtype),
        "y": ((6, 64, 32), dtype),
    }


def test_some_of_the_layers_are_read_alone_and_others_join_them(model, kept, tmp_path):
    before = files(kept)
    wanted, _ = fed(model, None, layers=(1,))
    found, passes = fed(model, kept, layers=(1,))
    assert_same(found, wanted)
    assert passes == 1 and files(kept) == before
    other = tmp_path / "other"
    fed(model, other, layers=(0,))
    both, passes = fed(model, other)
    assert_same(both, fed(model, None)[0])
    assert passes == 4 + 6 + 1  # layer 1 is computed; and the proof of layer 0
    assert fed(model, other)[1] == 1


def test_more_batches_than_are_kept_are_computed_and_added(model, kept):
    before, (wanted, _) = files(kept), fed(model, None, count=9)
    found, passes = fed(model, kept, count=9)
    assert_same(found, wanted)
    assert passes == 1 + 3
    added = {f"layer_{n}/00000006-00000009.safetensors" for n in (0, 1)}
    assert files(kept).items() >= before.items() and files(kept).keys() == before.keys() | added
    found, passes = fed(model, kept, count=9)
    assert_same(found, wanted)
    assert passes == 1


def test_what_a_resumed_run_left_out_is_filled_in_later(model, tmp_path):
    fed(model, tmp_path / "kept", count=2, skip=4)
    found, passes = fed(model, tmp_path / "kept")
    assert_same(found, fed(model, None)[0])
    assert passes == 4 + 4 + 1
    assert fed(model, tmp_path / "kept")[1] == 1


def test_a_file_holds_as_many_batches_as_it_may(model, tmp_path, monkeypatch):
    a_batch = 64 * (8 + 2 * 32 * 4)
    monkeypatch.setattr("mxdsurgery.training.activation_cache._SHARD_BYTES", 2 * a_batch + 1)
    wanted, _ = fed(model, tmp_path / "kept", count=5)
    names = [f"layer_{n}/0000000{first}-0000000{end}.safetensors" for n in (0, 1) for first, end in ((0, 2), (2, 4), (4, 5))]
    assert sorted(files(tmp_path / "kept")) == [CACHE_FILE, *names]
    found, passes = fed(model, tmp_path / "kept", count=5)
    assert_same(found, wanted)
    assert passes == 1


def test_another_text_is_refused_and_its_keys_are_named(model, kept):
    before = files(kept)
    with pytest.raises(CacheError, match="batch 0 of the training text is not .* holds(.|\n)*seed 0, now 7"):
        fed(model, kept, text=Random(7), recipe=dataclasses.replace(RECIPE, seed=7))
    with pytest.raises(CacheError, match="the keys are the same, the text itself has changed"):
        fed(model, kept, text=Random(7))
    with pytest.raises(CacheError, match="seed 0, now 7"):  # also where nothing of the layer is kept
        shutil.rmtree(kept / "layer_1")
        fed(model, kept, layers=(1,), text=Random(7), recipe=dataclasses.replace(RECIPE, seed=7))
    assert not (kept / "layer_1").exists() and files(kept).items() <= before.items()


def test_a_text_that_changes_later_is_refused_where_it_does(model, kept):
    class Changed(Random):
        def batches(self, size):
            for number, batch in enumerate(super().batches(size)):
                yield batch if number < 5 else batch + 1

    shutil.rmtree(kept / "layer_1")
    before = files(kept)
    with pytest.raises(CacheError, match="batch 5 of the training text"):
        fed(model, kept, text=Changed())
    added = files(kept).keys() - before.keys()
    assert added == {"layer_1/00000000-00000005.safetensors"}  # of the text as it was


@pytest.mark.parametrize(
    ("changed", "keys", "named"),
    [
        (lambda: tiny_model("llama", seed=1), {}, "weights .*, now (.|\n)*give another folder"),
        (lambda: tiny_model("llama").bfloat16(), {}, "weights .*compute float32, now bfloat16"),
        (lambda: tiny_model("llama"), {"batch": 128}, "batch 64, now 128(.|\n)*batch=64"),
        (lambda: tiny_model("llama"), {"context": 32}, "context 16, now 32"),
    ],
)
def test_another_model_dtype_or_batch_is_refused(kept, changed, keys, named):
    before = files(kept)
    with pytest.raises(CacheError, match=f"holds activations of something else: (.|\n)*{named}"):
        fed(changed(), kept, recipe=dataclasses.replace(RECIPE, **keys))
    assert files(kept) == before


def test_the_same_weights_that_compute_something_else_are_refused(model, kept):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon *= 2  # as another config, or another version of the code, may have it
    with pytest.raises(CacheError, match="layer 0 .* are not what the model computes here: on batch 0 .* of their size off"):
        fed(model, kept)


def test_a_damaged_file_is_named_and_computed_again_once_it_is_gone(model, kept):
    wanted, _ = fed(model, None)
    path = kept / "layer_1" / "00000000-00000006.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CacheError, match="00000006.safetensors' are damaged(.|\n)*delete that file"):
        fed(model, kept)
    tensors = load_file(kept / "layer_0" / path.name)
    save_file(tensors, path, metadata={"identity": "another"})
    with pytest.raises(CacheError, match="is not of the model that .*cache.json' says"):
        fed(model, kept)
    path.unlink()
    found, passes = fed(model, kept)
    assert_same(found, wanted)
    assert passes == 4 + 6 + 1 and path.read_bytes() == whole
    (kept / CACHE_FILE).write_text('{"format_version": 2}')
    with pytest.raises(CacheError, match="cache.json' cannot be read: its format_version is 2"):
        fed(model, kept)


def test_a_disk_that_is_full_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    folder = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr("mxdsurgery.training.activation_cache.save_file", full)
        with pytest.raises(OutputError, match="activations cannot be kept in .*No space left(.|\n)*cache_activations"):
            fed(model, folder)
    assert list(files(folder)) == [CACHE_FILE]
    assert_same(fed(model, folder)[0], fed(model, None)[0])


def test_what_a_killed_run_was_writing_is_not_read_and_goes_with_the_next_file(model, kept):
    left = kept / "layer_0" / ".batches.abcdefgh.aside"
    left.mkdir()
    gone = {"machine": processes.machine(), "process": 2**22, "process_started": "1"}
    owner = json.dumps(dataclasses.asdict(processes.this_process()) | gone | {"name": "batches"})
    (left / MARKER).write_text(owner)
    (left / "00000006-00000009.safetensors").write_bytes(b"half")
    found, passes = fed(model, kept, count=9)
    assert_same(found, fed(model, None, count=9)[0])
    assert passes == 1 + 3 and not left.exists()


def test_two_runs_may_keep_activations_in_one_folder(model, tmp_path):
    blocks = [finding.block for finding in find_blocks(model)]
    sources = [OriginalInputs(model, Random(), RECIPE, CPU, ActivationCache(tmp_path, model, RECIPE)) for _ in range(2)]
    with sources[0].feed(blocks) as one, sources[1].feed(blocks) as other:
        for _ in range(6):
            pairs, others = next(one.batches), next(other.batches)
            assert all(torch.equal(pairs[layer].y, others[layer].y) for layer in pairs)
    found, passes = fed(model, tmp_path)
    assert_same(found, fed(model, None)[0])
    assert passes == 1


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(OutputError, match="not a folder|a folder of something else"):
            fed(model, place)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


SMALL = {"tokens": 6_144, "eval_tokens": 300, "n_experts": 64, "batch": 256, "shuffle": 4_000, "device": "cpu"}


def test_a_frontier_of_other_recipes_learns_the_same_from_what_was_kept(tmp_path, monkeypatch):
    passes, kept = [], str(tmp_path / "kept")

    def counted(model, blocks, input_ids):
        passes.append(1)
        return record_activations(model, blocks, input_ids)

    other = {"layer": 2, "k": (8,), "kinds": ("mxd", "transcoder")} | SMALL | {"lr": 2e-3, "expert_share": 0.3}
    plain = mxdsurgery.frontier("demo-glu", out=str(tmp_path / "plain"), **other)
    mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=("mxd",), out=str(tmp_path / "a"), cache_activations=kept, **SMALL)
    monkeypatch.setattr("mxdsurgery.base.activations.record_activations", counted)
    read = mxdsurgery.frontier("demo-glu", out=str(tmp_path / "b"), cache_activations=kept, **other)
    assert len(passes) == 1
    assert read.rows == plain.rows
    for kind in other["kinds"]:
        paths = (layer_file(tmp_path / out, 2, kind, 8) for out in ("plain", "b"))
        one, another = map(load_file, paths)
        assert one.keys() == another.keys() and all(torch.equal(one[name], another[name]) for name in one)
    # A plan says how large that is, to the byte, but for the files' headers; and what is there.
    made, _ = mxdsurgery.plan("demo-glu", layers="2", cache_activations=kept, **SMALL)
    assert 0 < kept_bytes(tmp_path / "kept", [2]) - made.cache_bytes < 1000
    words = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    words = ["plan", "demo-glu", "--layers=2", "--no-measure", f"--cache-activations={kept}", *words]
    said = " ".join(CliRunner().invoke(main, words).output.split())
    assert f"{made.cache_bytes // SMALL['tokens']:,} bytes of a token, in" in said and "are there already" in said


def test_a_conversion_that_was_stopped_goes_on_from_what_it_kept(tmp_path, monkeypatch):
    kept = str(tmp_path / "kept")
    options = {"layers": "0,2", "k": 4} | SMALL
    mxdsurgery.convert("demo-glu", out=str(tmp_path / "plain"), **options)
    step, taken = distill.train_step, itertools.count(1)

    def stopping(*args, **given):
        if next(taken) == 21:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **given)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="A checkpoint of step 11"):
            patch.setattr("mxdsurgery.training.distill.train_step", stopping)
            mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), cache_activations=kept, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {path.name for path in (tmp_path / "kept").rglob("*.safetensors")} == {"00000000-00000011.safetensors"}
    mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), cache_activations=kept, resume=True, **options)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert kept not in (tmp_path / "out" / "recipe.yaml").read_text()  # it goes with the model, to others


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("out", OutputError, "where cache_activations keeps activations"),
        ("out/kept", OutputError, "where cache_activations keeps activations"),
        ("out.run/kept", OutputError, "where cache_activations keeps activations"),
        ("file", OutputError, "is not a folder"),
        ("others", CacheError, "batch 1152, now 256"),
        ("full", OutputError, "takes 9.* of disk(.|\n)*cache_activations"),
    ],
)
def test_what_cannot_be_kept_is_said_before_anything_is_loaded(where, error, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "others").mkdir()
    content = {"format_version": 1, "context": 128, "batch": 1152, "text": {}, "circumstances": {"threads": 1}}
    (tmp_path / "others" / CACHE_FILE).write_text(json.dumps(content))
    before = files(tmp_path)
    monkeypatch.setattr("mxdsurgery.base.model.BaseModel.load_examined", lambda *_, **__: pytest.fail("it was loaded"))
    if where == "full":
        room = shutil._ntuple_diskusage(2**30, 2**30, 2**20)
        monkeypatch.setattr("mxdsurgery.checkpoint.writing.shutil.disk_usage", lambda _: room)
    options = {"out": str(tmp_path / "out"), "cache_activations": str(tmp_path / where)} | SMALL
    with pytest.raises(error, match=message):
        mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=("mxd",), **options)
    assert files(tmp_path) == before
