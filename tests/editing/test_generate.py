"""Text from an edited model beside the unedited one, with the same random numbers; they differ in the edits only."""

import math
import shutil

import pytest
import torch
from rich.console import Console
from running import ROOT
from safetensors.torch import save_file
from tiny import tiny_model

import mxdsurgery
from mxdsurgery.editing.edits import Edits
from mxdsurgery.editing.generate import in_coefficients, side_by_side
from mxdsurgery.editing.sampling import Sampling, sample
from mxdsurgery.errors import CatalogueError, DeviceError, EditError, NotConvertedError, RecipeError

EXAMPLES = ROOT / "examples"
PROMPT = {"prompt": "def read(path):\n", "max_new_tokens": 12, "device": "cpu"}


@pytest.fixture(scope="module")
def with_maxima(converted, tmp_path_factory):
    """The converted model, and made-up largest coefficients of layer 1; expert 5 never fired."""
    folder = tmp_path_factory.mktemp("maxima") / "demo"
    shutil.copytree(converted.out, folder)
    maximum = torch.arange(256, dtype=torch.float32) / 10 + 1
    maximum[5] = 0
    (folder / "experts").mkdir()
    save_file({"layer1": maximum}, folder / "experts" / "maximum.safetensors")
    return folder


def test_edited_and_unedited_texts_differ_by_the_edits_only(converted):
    plain = mxdsurgery.generate(converted.out, samples=3, seed=7, **PROMPT)
    nothing = Edits(steer={1: {3: 0.0}}, scale={2: {9: 1.0}})
    made = mxdsurgery.generate(converted.out, edits=nothing, samples=3, seed=7, **PROMPT)
    assert made["unedited"] == made["edited"] == plain and len(set(plain)) > 1
    assert made["prompt"] == PROMPT["prompt"] and made["seed"] == 7 and made["temperature"] == 1.0 and made["top_k"] is None
    strong = mxdsurgery.generate(converted.out, edits=Edits(steer={1: {3: 300.0}}), samples=3, seed=7, **PROMPT)
    assert strong["unedited"] == plain and strong["edited"] != plain
    assert strong["edits"] == ["layer 1: steer 3 by 300"]


def test_edited_texts_are_what_the_edited_model_says(converted):
    made = mxdsurgery.generate(converted.out, edits=Edits(steer={1: {3: 300.0}}), temperature=0, **PROMPT)
    loaded = mxdsurgery.load(converted.out, dtype="float32")  # as the texts were made
    tokenizer = loaded.tokenizer()
    ids = tokenizer(PROMPT["prompt"], return_tensors="pt")["input_ids"]
    for _ in range(PROMPT["max_new_tokens"]):
        with loaded.model.mxd.steer({1: {3: 300.0}}):
            following = loaded.model(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], 1)
    assert made["edited"] == tokenizer.batch_decode(ids, skip_special_tokens=True) != made["unedited"]


def test_without_edits_there_are_only_texts(converted):
    assert mxdsurgery.generate(converted.out, edits=Edits(), **PROMPT) == mxdsurgery.generate(converted.out, **PROMPT)
    assert isinstance(mxdsurgery.generate(converted.out, prompt="", max_new_tokens=2)[0], str)


def test_a_chat_is_written_as_the_models_template_has_it(converted, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(converted.out, folder)
    template = "# {{ messages[0].role }}: {{ messages[0].content }}\n{% if add_generation_prompt %}# answer:{% endif %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    options = {"max_new_tokens": 12, "device": "cpu", "temperature": 0}
    written = "# user: read a file\n# answer:"
    plain = mxdsurgery.generate(converted.out, prompt=written, **options)[0]
    assert mxdsurgery.generate(folder, prompt="read a file", chat=True, **options) == [plain.removeprefix(written)]
    made = mxdsurgery.generate(folder, prompt="read a file", chat=True, edits=Edits(steer={1: {3: 300.0}}), **options)
    assert made["unedited"] == [plain.removeprefix(written)] != made["edited"] and made["chat"] is True
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}", encoding="utf-8")
    with pytest.raises(RecipeError, match="refuses a user's message: no users here"):
        mxdsurgery.generate(folder, prompt="hello", chat=True, **options)
    with pytest.raises(RecipeError, match="no chat template"):
        mxdsurgery.generate(converted.out, prompt="hello", chat=True, **options)


def test_numbers_in_units_of_the_maximum_are_coefficients_times_it(with_maxima):
    in_maxima = Edits(steer={1: {30: 50.0}}, clamp={1: {10: 2.0}}, scale={1: {7: 0.5}}, ablate={2: [5]})
    found = in_coefficients(in_maxima, mxdsurgery.load(with_maxima), "maximum")
    assert found.steer == {1: {30: pytest.approx(200.0)}} and found.clamp == {1: {10: pytest.approx(4.0)}}
    assert found.scale == in_maxima.scale and found.ablate == in_maxima.ablate
    by_maximum = mxdsurgery.generate(with_maxima, edits=Edits(steer={1: {30: 50.0}}), unit="maximum", **PROMPT)
    assert by_maximum == mxdsurgery.generate(with_maxima, edits=Edits(steer={1: {30: 200.0}}), **PROMPT)


def test_what_cannot_be_is_refused_by_name(converted, with_maxima, tmp_path):
    def refused(error, words, folder=converted.out, **options):
        with pytest.raises(error, match=words):
            mxdsurgery.generate(folder, **PROMPT | options)

    steer = Edits(steer={1: {30: 2.0}})
    refused(EditError, "unit is 'volts'", edits=steer, unit="volts")
    refused(EditError, "no expert 999", edits=Edits(ablate={1: [999]}))
    refused(EditError, "no experts; layers that have: 1, 2", edits=Edits(ablate={0: [1]}))
    refused(EditError, "fingerprint", edits=Edits(ablate={1: [1]}, model="0" * 16))
    refused(CatalogueError, "run mxdsurgery experts", edits=steer, unit="maximum")
    refused(EditError, "never fired", with_maxima, edits=Edits(steer={1: {5: 2.0}}), unit="maximum")
    refused(CatalogueError, "layer 2", with_maxima, edits=Edits(clamp={2: {5: 2.0}}), unit="maximum")
    refused(NotConvertedError, "config.json", tmp_path)
    refused(RecipeError, "more than the 256", max_new_tokens=256)
    refused(RecipeError, "temperature 0", temperature=0, samples=2)
    if not torch.cuda.is_available():
        refused(DeviceError, "'cuda'", device="cuda")


class _NoText:
    pad_token_id = eos_token_id = 0


def test_a_text_ends_where_the_model_ends_it_unless_it_must_not():
    model = tiny_model("gpt2", seed=1)
    final = model.transformer.ln_f
    final.bias.copy_(50 * model.lm_head.weight[0] / model.lm_head.weight[0].norm())  # the end-of-text token is almost certain
    sampling = Sampling(max_new_tokens=6, temperature=1.0, samples=2)
    ids = torch.tensor([[5, 6, 7]])
    assert sample(model, _NoText(), ids, sampling)[:, 3].tolist() == [0, 0]
    forced = sample(model, _NoText(), ids, sampling, to_the_end=True)
    assert forced.shape == (2, 9) and (forced[:, 3:] != 0).all()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_predicts_no_numbers_is_an_error_by_name(temperature):
    model = tiny_model("gpt2")
    model.transformer.ln_f.bias[3] = math.nan
    sampling = Sampling(max_new_tokens=2, temperature=temperature)
    with pytest.raises(EditError, match="no numbers any more"):
        sample(model, _NoText(), torch.tensor([[5, 6, 7]]), sampling)


def test_the_table_shows_both_texts_as_they_are():
    result = {
        "edits": ["layer 1: ablate 3"],
        "unedited": ["once [bold]upon[/bold] a time"],
        "edited": ["once [bold]there was"],
    }
    console = Console(width=120)
    with console.capture() as capture:
        console.print(side_by_side(result))
    shown = capture.get()
    assert "layer 1: ablate 3" in shown
    assert "once [bold]upon[/bold] a" in shown and "once [bold]there was" in shown


def test_the_example_with_hooks_agrees_with_the_models_own_interventions(converted, forking):
    done = forking.script(EXAMPLES / "hooks.py", converted.out, "--layer", 1)
    assert done.returncode == 0, done.stderr
    assert "The strongest experts of layer 1" in done.stdout and "model.mxd they differ by 0e+00" in done.stdout


def test_the_example_with_nnsight_agrees_with_the_models_own_interventions(converted, forking):
    pytest.importorskip("nnsight", reason="nnsight is not installed")
    done = forking.script(EXAMPLES / "nnsight_experts.py", converted.out)
    assert done.returncode == 0, done.stderr
    assert "The strongest expert of layer 2" in done.stdout and "model.mxd.ablate by 0e+00" in done.stdout


def test_the_example_with_nnsight_says_what_it_needs(forking):
    done = forking.script(EXAMPLES / "nnsight_experts.py", lacks=["nnsight"])
    assert done.returncode == 2 and done.stderr.startswith("this example needs nnsight") and "Traceback" not in done.stderr


def test_every_token_may_be_drawn_and_only_as_many_as_asked():
    model, ids = tiny_model("gpt2", vocabulary=512), torch.tensor([[5, 6, 7]])
    drawn = {
        options: sample(model, _NoText(), ids, Sampling(1, 50.0, 2_000, *options), to_the_end=True)[:, 3].unique().tolist()
        for options in ((), (7,), (None, 0.01))
    }
    assert len(drawn[()]) > 400  # transformers samples from 50 unless told not to
    likeliest = model(ids).logits[0, -1].index_fill(0, torch.tensor([0]), -math.inf).topk(7).indices.sort().values.tolist()
    assert drawn[(7,)] == likeliest
    assert 4 <= len(drawn[(None, 0.01)]) <= 8 and set(drawn[(None, 0.01)]) <= set(drawn[()])


def test_tokens_are_drawn_as_often_as_they_are_predicted():
    model, ids = tiny_model("gpt2", vocabulary=16), torch.tensor([[5, 6, 7]])
    made = sample(model, _NoText(), ids, Sampling(1, 0.5, 20_000))[:, 3]
    shares, wanted = made.bincount(minlength=16) / len(made), (model(ids).logits[0, -1] / 0.5).softmax(-1)
    assert (shares - wanted).abs().max() < 0.02 and wanted.max() > 2 / 16  # some five standard errors


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_generation_config_of_the_base_model_has_no_say(temperature):
    model, ids = tiny_model("gpt2"), torch.tensor([[5, 6, 7]])
    sampling = Sampling(12, temperature, 1 if temperature == 0 else 3, seed=4)
    plain = sample(model, _NoText(), ids, sampling)
    config = model.generation_config
    config.update(do_sample=True, temperature=0.1, top_k=2, top_p=0.3, min_p=0.5, typical_p=0.2, repetition_penalty=9.0)
    config.update(num_beams=3, no_repeat_ngram_size=1, forced_eos_token_id=9, suppress_tokens=[7, 8, 20])
    config.update(max_length=5, min_new_tokens=1, bad_words_ids=[[41]], begin_suppress_tokens=[42], max_time=1e-9)
    before = config.to_dict()
    assert torch.equal(sample(model, _NoText(), ids, sampling), plain)
    assert model.generation_config is config and config.to_dict() == before


def test_where_the_base_model_says_that_texts_end_they_end():
    model, ids = tiny_model("gpt2"), torch.tensor([[5, 6, 7]])
    first = sample(model, _NoText(), ids, Sampling(6, 0))[0, 3].item()
    model.generation_config.eos_token_id = [first, 63]
    assert sample(model, _NoText(), ids, Sampling(6, 0)).tolist() == [[5, 6, 7, first]]


def test_sampling_leaves_the_process_s_random_numbers_alone():
    model, ids, before = tiny_model("gpt2"), torch.tensor([[5, 6, 7]]), torch.get_rng_state()
    first = sample(model, _NoText(), ids, Sampling(6, seed=1))
    torch.rand(5)
    assert torch.equal(sample(model, _NoText(), ids, Sampling(6, seed=1)), first)
    torch.set_rng_state(before)
    sample(model, _NoText(), ids, Sampling(6, seed=2))
    assert torch.equal(torch.get_rng_state(), before)
