"""How good steering is: each figure by its definition, controls that differ in the expert only, and a judge that may fail."""

import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from rich.console import Console

from mxdsurgery import experts, load
from mxdsurgery.base.model import open_model
from mxdsurgery.catalogue.files import open_catalogue
from mxdsurgery.editing.edits import Edits
from mxdsurgery.editing.judge import Judge, judge_from_flags
from mxdsurgery.editing.sampling import Sampling, prompt_ids
from mxdsurgery.editing.steering import _BESIDE, _Concept, _Writer, steering, steering_table
from mxdsurgery.errors import CatalogueError, EditError, JudgeError, MxDWarning, RecipeError

SHORT = {"samples": 3, "max_new_tokens": 8, "controls": 2, "device": "cpu"}
KEY = "sk-test-0123456789abcdef"


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """The converted demo model with a catalogue."""
    out = tmp_path_factory.mktemp("steering") / "demo"
    shutil.copytree(converted.out, out)
    experts(out, data="stdlib:heldout", tokens=6_000, device="cpu")
    return out


@pytest.fixture(scope="module")
def expert(folder):
    """One of layer 1 that fired in many contexts, which are like each other."""
    converted, catalogue = load(folder), open_catalogue(folder)
    table = catalogue.table(1, ["fired", "top"]).to_pydict()
    usual = sorted(range(256), key=lambda n: (-len(table["top"][n]), table["fired"][n]))[:12]
    return max(usual, key=lambda n: _Concept(converted, catalogue, 1, n).own_contexts())


@pytest.fixture(scope="module")
def concept(folder, expert):
    return _Concept(load(folder), open_catalogue(folder), 1, expert)


def test_similarity_is_the_cosine_of_tf_idf_vectors(folder, expert, concept):
    catalogue = open_catalogue(folder)
    contexts = [set(ids.as_py()) for ids in catalogue.input_ids]

    def vector(tokens):
        idf = {t: math.log((1 + len(contexts)) / (1 + sum(t in context for context in contexts))) + 1 for t in set(tokens)}
        made = {token: tokens.count(token) * weight for token, weight in idf.items()}
        length = math.sqrt(sum(value**2 for value in made.values()))
        return {token: value / length for token, value in made.items()}

    near = []
    for place in catalogue.row(1, expert)["top"]:
        ids = catalogue.input_ids[place["context"]].as_py()
        near += ids[max(0, place["position"] - _BESIDE) : place["position"] + _BESIDE + 1]
    mine = vector(near)
    texts = [near[:9], catalogue.input_ids[0].as_py()[:20]]
    wanted = [sum(value * mine.get(token, 0) for token, value in vector(text).items()) for text in texts]
    assert concept.similarity(texts).tolist() == pytest.approx(wanted)
    assert concept.similarity([near]).item() == pytest.approx(1.0)


def test_experts_own_contexts_are_more_like_them_than_other_contexts(folder):
    converted, catalogue = load(folder), open_catalogue(folder)
    every = [ids.as_py()[20:44] for ids in catalogue.input_ids]
    places = catalogue.table(1, ["top"])["top"].to_pylist()
    concepts = [_Concept(converted, catalogue, 1, n) for n in [n for n in range(256) if len(places[n]) > 8][:12]]
    own = [concept.own_contexts() for concept in concepts]
    others = [concept.similarity(every).mean().item() for concept in concepts]
    assert sum(own) > 1.2 * sum(others) > 0


def test_passages_are_the_windows_with_the_strongest_token_marked(folder, concept):
    tokenizer = load(folder).tokenizer()
    shown = concept.passages(tokenizer.decode)
    for text, (ids, strengths, at) in zip(shown, concept.windows, strict=True):
        assert f"**{tokenizer.decode(ids[at])}**" in text and text.replace("**", "") == tokenizer.decode(ids).replace("**", "")
        assert max(strengths) == strengths[at]


def test_perplexity_is_the_original_models_and_leaves_the_prompt_out(folder, concept):
    converted, original = load(folder), open_model("demo-glu").load()
    tokenizer = converted.tokenizer()
    inputs = prompt_ids(tokenizer, "class Error:\n")
    sampling = Sampling(max_new_tokens=5, temperature=1.0, samples=10, seed=3)
    seen = []
    writer = _Writer(converted.model, original, tokenizer, concept, inputs, sampling)
    writer.concept.similarity, kept = lambda texts: seen.extend(texts) or torch.zeros(len(texts)), concept.similarity
    texts = writer.write()
    writer.concept.similarity = kept
    assert len(seen) == len(texts.texts) == 10 and texts.tokens.tolist() == [5.0] * 10
    for new, nll in zip(seen, texts.nll.tolist(), strict=True):
        ids = torch.tensor([inputs[0].tolist() + new])
        log = original(input_ids=ids).logits[0].float().log_softmax(-1)
        steps = range(inputs.shape[1], ids.shape[1])
        assert nll == pytest.approx(-sum(log[at - 1, ids[0, at]].item() for at in steps), rel=0.02)  # bf16: batches differ
    assert texts.figures()["perplexity"] == pytest.approx(math.exp(texts.nll.sum() / 50))


def test_steering_by_nothing_changes_nothing(folder, expert):
    found = steering(folder, edits=Edits(steer={1: {expert: 0.0}}), **SHORT)
    (row,) = found["steered"]
    assert row["texts"] == found["unsteered"]["texts"] and row["perplexity"] == found["unsteered"]["perplexity"]
    assert row["strength"] == 0 and row["strength_ci"] == [0, 0]
    assert [control["strength"] for control in row["controls"]] == [0, 0]
    assert found["tokens"] == 24 and json.dumps(found)


def test_controls_are_steered_as_strongly_in_units_of_their_own_maximum(folder, expert, monkeypatch):
    maximum = load(folder).model.mxd.maximum(1)
    amount = 3 * maximum[expert].item()
    seen, live = [], Edits.live
    monkeypatch.setattr(Edits, "live", lambda edits, model: seen.append(edits) or live(edits, model))
    found = steering(folder, edits=Edits(steer={1: {expert: amount}}), factors=(1.0, 2.0), **SHORT)
    for row, factor in zip(found["steered"], (1, 2), strict=True):
        assert row["in_maximum"] == pytest.approx(3 * factor) and row["amount"] == pytest.approx(amount * factor)
        for control in row["controls"]:
            assert control["amount"] == pytest.approx(3 * factor * maximum[control["expert"]].item())
            assert {"steer": {1: {control["expert"]: control["amount"]}}} in [{"steer": edits.steer} for edits in seen]
    others = [[control["expert"] for control in row["controls"]] for row in found["steered"]]
    assert others[0] == others[1] and len({expert, *others[0]}) == 3
    in_maximum = steering(folder, edits=Edits(steer={1: {expert: 3.0}}), unit="maximum", factors=(1.0, 2.0), **SHORT)
    assert [row["texts"] for row in in_maximum["steered"]] == [row["texts"] for row in found["steered"]]


def test_texts_of_the_concept_count_as_strong_and_others_do_not(folder, expert, concept, monkeypatch):
    """A model that says the expert's concept when it is steered, and something of its own when another one is."""

    def pretended(model, tokenizer, inputs, sampling, to_the_end):
        changes = model.mxd.in_force(1)
        steered = changes[0].experts.tolist() if changes else None
        if steered == [expert]:
            rows = [(ids[at - 3 : at + 4] * 2)[: sampling.max_new_tokens] for ids, _, at in concept.windows if at > 2]
        else:
            draw = torch.Generator().manual_seed(0 if steered is None else steered[0])
            rows = torch.randint(200, 4000, (sampling.samples, sampling.max_new_tokens), generator=draw).tolist()
        return torch.cat([inputs.expand(sampling.samples, -1), torch.tensor((rows * sampling.samples)[: sampling.samples])], 1)

    monkeypatch.setattr("mxdsurgery.editing.steering.sample", pretended)
    found = steering(folder, edits=Edits(clamp={1: {expert: 1.0}}), **SHORT | {"samples": 8})
    (row,) = found["steered"]
    assert found["kind"] == "clamp" and row["strength_ci"][0] > 0.1
    assert all(abs(control["strength"]) < row["strength"] / 4 for control in row["controls"])
    assert row["strength"] == pytest.approx(row["similarity"] - found["unsteered"]["similarity"])


def test_steering_takes_one_expert_that_is_known(folder, converted, expert, tmp_path):
    def refused(error, words, where=folder, **options):
        with pytest.raises(error, match=words):
            steering(where, **SHORT | options)

    one = Edits(steer={1: {expert: 1.0}})
    refused(EditError, "the edits are: none", edits=Edits())
    refused(EditError, "one expert alone", edits=Edits(steer={1: {expert: 1.0, 3: 1.0}}))
    refused(EditError, "layer 1: ablate 3", edits=Edits(ablate={1: [3]}))
    refused(EditError, "ablate 3; layer 1: steer", edits=Edits(steer={1: {expert: 1.0}}, ablate={1: [3]}))
    refused(EditError, "no expert 256", edits=Edits(steer={1: {256: 1.0}}))
    refused(RecipeError, "temperature 0", edits=one, temperature=0)
    refused(CatalogueError, "run mxdsurgery experts", converted.out, edits=one)
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "experts" / "experts.json"
    path.write_text(path.read_text().replace(open_catalogue(folder).fingerprint, "0" * 16))
    refused(CatalogueError, "of another model", tmp_path / "other", edits=one)


@pytest.fixture
def server(monkeypatch):
    """A judge's server on this machine: give it answers, (status, text) each; it keeps what it was asked."""
    answers, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            status, text, *headers = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    made.answers, made.requests = answers, requests
    made.judge = Judge(f"http://127.0.0.1:{made.server_port}/v1/", "small-judge", timeout=5, tries=3, pause=0.01)
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def said(content):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


GOOD = said('```json\n{"concept": 0.25, "fluency": 1}\n```')


def test_a_judge_is_asked_as_openai_is_and_its_ratings_are_read(server):
    server.answers.append(GOOD)
    assert server.judge.rate(["the **king** said", "a **queen**"], "Kings, they say") == {"concept": 0.25, "fluency": 1.0}
    ((path, authorization, request),) = server.requests
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}" and request["model"] == "small-judge"
    asked = json.loads(request["messages"][-1]["content"])
    assert asked == {"passages": ["the **king** said", "a **queen**"], "text": "Kings, they say"}


def test_a_judge_that_is_busy_is_asked_again(server):
    server.answers += [(429, "slow down", ("Retry-After", "0")), (503, "broken"), GOOD]
    assert server.judge.rate([], "text")["concept"] == 0.25 and len(server.requests) == 3


BAD = [
    (said("I would say it is quite fluent."), "no rating"),
    (said('{"concept": 0.5}'), "no rating"),
    (said('{"concept": 7, "fluency": 0.5}'), "cannot be"),
    (said('{"concept": true, "fluency": 0.5}'), "cannot be"),
    (said('{"concept": NaN, "fluency": 0.5}'), "cannot be"),
    (said('{"concept": "1", "fluency": 0.5}'), "cannot be"),
    ((200, "<html>a proxy</html>"), "no rating"),
    ((200, "[" * 100_000), "no rating"),
    ((200, json.dumps({"choices": []})), "no rating"),
    ((401, f"Incorrect API key provided: {KEY}"), "401 Incorrect API key"),
    ((429, f"too many requests with {KEY}"), "429 too many"),
    ((302, "", ("Location", "http://127.0.0.1:9/elsewhere")), "302"),
]


@pytest.mark.parametrize(("answer", "words"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_a_judge_answers_wrongly_is_an_error_by_name_without_the_key(server, answer, words):
    server.answers.append(answer)
    with pytest.raises(JudgeError, match=words) as caught:
        server.judge.rate(["x"], "text")
    assert KEY not in str(caught.value) and "small-judge" in str(caught.value)
    assert caught.value.__cause__ is None and len(server.requests) == (3 if answer[0] == 429 else 1)


def test_a_judge_that_is_not_there_is_an_error_by_name(server, monkeypatch):
    gone = Judge("http://127.0.0.1:9", "small-judge", tries=3, pause=30)
    with pytest.raises(JudgeError, match="did not answer: .*refused") as caught:
        gone.rate(["x"], "text")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY") as caught:
        server.judge.rate(["x"], "text")
    assert KEY not in str(caught.value) and not server.requests


def test_a_server_that_wants_no_key_gets_none(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.answers.append(GOOD)
    server.judge.rate([], "text")
    assert server.requests[0][1] is None


@pytest.mark.parametrize(
    "url",
    ["ftp://there/v1", "file:///etc/passwd", "there/v1", "http://", "http://me:secret@there", "http://a b", "http://there:x"],
)
def test_only_web_addresses_without_passwords_are_judges(url):
    with pytest.raises(JudgeError, match="no such address") as caught:
        Judge(url, "model")
    assert "secret" not in str(caught.value)


def test_a_judge_has_an_address_and_a_model():
    assert judge_from_flags(None, None) is None
    assert judge_from_flags("https://there/v1", "m") == Judge("https://there/v1", "m")
    for url, model in (("https://there/v1", None), (None, "m")):
        with pytest.raises(JudgeError, match="judge(_model)?="):
            judge_from_flags(url, model)


def test_a_judges_ratings_stand_beside_the_figures(server, folder, expert):
    server.answers += [GOOD] * 4 + [said('{"concept": 0.75, "fluency": 0.5}')] * 3
    edits = Edits(steer={1: {expert: 2.0}})
    found = steering(folder, edits=edits, unit="maximum", judge=server.judge, **SHORT)
    assert found["judge"] == "small-judge" and KEY not in json.dumps(found) and len(server.requests) == 7
    assert (found["unsteered"]["judged_concept"], found["steered"][0]["judged_concept"]) == (0.25, 0.75)
    assert found["steered"][0]["judged_fluency_ci"] == [0.5, 0.5]
    asked = [json.loads(request["messages"][-1]["content"])["text"] for _, _, request in server.requests]
    assert asked[1:] == found["unsteered"]["texts"] + found["steered"][0]["texts"]
    found["unsteered"]["texts"][0] = "[bold]not markup"
    console = Console(width=240)
    with console.capture() as capture:
        console.print(steering_table(found))
    shown = capture.get()
    assert f"expert {expert}: 3 texts of 8 tokens" in shown and "2 × maximum" in shown and "[bold]not markup" in shown
    assert "0.75" in shown and "concept, judged" in shown and "its own contexts" in shown
    assert found["judge_failed"] is None


def test_a_judge_that_fails_halfway_loses_neither_texts_nor_ratings(server, folder, expert):
    server.answers += [GOOD] * 5 + [(400, "no more")]
    with pytest.warns(MxDWarning, match="no more; 4 of 6 texts were rated"):
        found = steering(folder, edits=Edits(steer={1: {expert: 2.0}}), unit="maximum", judge=server.judge, **SHORT)
    steered = found["steered"][0]
    assert "no more; 4 of 6" in found["judge_failed"] and len(steered["texts"]) == 3 and steered["strength"] is not None
    assert found["unsteered"]["judged_concept"] == 0.25 and found["unsteered"]["judged_concept_ci"] == [0.25, 0.25]
    assert (steered["judged_concept"], steered["judged_concept_ci"]) == (None, None)
    console = Console(width=240)
    with console.capture() as capture:
        console.print(steering_table(found))
    assert "n/a" in capture.get()
