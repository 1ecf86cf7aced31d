"""``push``: what arrives on the hub is the folder, and neither a token nor a local path ever leaves."""

import hashlib
import json
import shutil

import huggingface_hub
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from hub_stub import TOKEN, Hub, Repository
from huggingface_hub import constants, snapshot_download
from rich.console import Console
from running import Said, without_reloads
from safetensors.torch import load_file, save_file
from tiny import IDS, export_tiny, tiny_model
from transformers import AutoModelForCausalLM

from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.checkpoint.adapter import ADAPTER_FILE
from mxdsurgery.checkpoint.apply import apply, make_adapter
from mxdsurgery.disclosure import disclosures, redacted
from mxdsurgery.errors import HubError, NotConvertedError, PushError, WeightsError
from mxdsurgery.sharing.push import push, push_table

SECRET = "hf_" + "a1B2c3D4e5" * 3 + "f6G7"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny converted llama without local paths, and an adapter of it."""
    place = tmp_path_factory.mktemp("push")
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        model, *_ = export_tiny("llama", place / "whole", layers=(1,))
    model.save_pretrained(place / "base")
    make_adapter(place / "whole", base=str(place / "base"), out=place / "adapter")
    return place


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made / "whole", tmp_path / "model")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stub, as the only hub there is, with its token in the environment; large files go over plain HTTP."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    hub.close()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrived(hub, name="someone/model", revision="main"):
    return {file: data for file, data in hub.repositories[name].files(revision).items() if file != ".gitattributes"}


# What arrives


def test_every_byte_of_the_folder_arrives_in_one_commit(hub, made):
    result = push(made / "whole", "someone/model")
    assert arrived(hub) == contents(made / "whole")
    repository = hub.repositories["someone/model"]
    assert not repository.private and repository.messages == ["Upload with mxdsurgery"]
    assert result["commit"] == repository.head() and result["url"] == f"{hub.url}/someone/model"
    assert result["bytes"] == sum(len(data) for data in contents(made / "whole").values())
    assert [file["name"] for file in result["files"]] == sorted(contents(made / "whole"))
    assert not result["private"] and not result["redacted"] and not result["left_out"] and result["license"] is None
    json.dumps(result)
    assert any(method == "PUT" and path.startswith("/stored/") for method, path in hub.requests)


def test_what_was_pushed_is_what_from_pretrained_loads(hub, made, tmp_path, monkeypatch):
    push(made / "whole", "someone/model")
    fetched = snapshot_download("someone/model", cache_dir=tmp_path / "cache", endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there = AutoModelForCausalLM.from_pretrained(fetched, trust_remote_code=True)
    here = AutoModelForCausalLM.from_pretrained(made / "whole", trust_remote_code=True)
    assert there.mxd.layers.keys() == {1}
    with torch.no_grad():
        assert torch.equal(there(IDS).logits, here(IDS).logits)


def test_a_private_repository_is_private_from_the_start(hub, made):
    assert push(made / "whole", "someone/model", private=True)["private"]
    assert hub.repositories["someone/model"].private


def test_private_does_not_publish_into_a_repository_that_everyone_sees(hub, made):
    hub.repositories["someone/model"] = Repository(private=False)
    with pytest.raises(PushError, match="everyone sees it"):
        push(made / "whole", "someone/model", private=True)
    assert arrived(hub) == {} and not hub.repositories["someone/model"].messages


def test_a_second_push_takes_out_what_is_no_longer_part_of_the_model(hub, folder):
    push(folder, "someone/model")
    repository = hub.repositories["someone/model"]
    repository.branches["main"][-1] |= {
        "model-00001-of-00002.safetensors": b"stale",
        "notes.txt": b"theirs",
        "LICENSE": b"MIT",
    }
    (folder / "README.md").write_text((folder / "README.md").read_text() + "More.\n")
    result = push(folder, "someone/model", message="Say more")
    assert result["removed"] == ["model-00001-of-00002.safetensors"]
    assert arrived(hub) == contents(folder) | {"notes.txt": b"theirs", "LICENSE": b"MIT"}
    assert repository.messages == ["Upload with mxdsurgery", "Say more"]


def test_pushing_the_same_again_changes_nothing(hub, made):
    first = push(made / "whole", "someone/model")
    assert push(made / "whole", "someone/model")["commit"] == first["commit"]
    assert len(hub.repositories["someone/model"].messages) == 1


def test_a_repository_that_holds_another_model_is_left_alone(hub, made):
    hub.repositories["someone/model"] = Repository(private=False)
    hub.repositories["someone/model"].branches["main"][-1]["pytorch_model.bin"] = b"theirs"
    with pytest.raises(PushError, match=r"mxdsurgery did not push: pytorch_model\.bin"):
        push(made / "whole", "someone/model")
    assert arrived(hub) == {"pytorch_model.bin": b"theirs"}


def test_a_branch_is_made_and_main_stays_as_it_is(hub, made):
    assert push(made / "whole", "someone/model", revision="k16")["url"].endswith("/tree/k16")
    assert arrived(hub, revision="k16") == contents(made / "whole") and arrived(hub) == {}


def test_weights_go_through_xet_where_it_is_there(hub, made, tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.cas = f"local://{tmp_path / 'cas'}"
    push(made / "whole", "someone/model")
    wanted = contents(made / "whole")
    digest = hashlib.sha256(wanted["model.safetensors"]).hexdigest()
    assert arrived(hub) == wanted | {"model.safetensors": b"in xet: " + digest.encode()}
    assert not hub.stored and any((tmp_path / "cas").rglob("*.mdb"))


def test_what_xet_is_refused_is_named_too(hub, made, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.refuse["xet-write-token"] = 403, {}
    with pytest.raises(HubError, match=r"may not write there \(403"):
        push(made / "whole", "someone/model")
    assert arrived(hub) == {}


def test_an_adapter_arrives_without_the_base_and_applies(hub, made, tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    push(made / "adapter", "someone/model")
    assert arrived(hub) == contents(made / "adapter") and "model.safetensors" not in arrived(hub)
    fetched = snapshot_download("someone/model", cache_dir=tmp_path / "cache", endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    apply(fetched, base=str(made / "base"), out=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made / "whole")


def test_a_redacted_adapter_still_applies(hub, made, folder, tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("eval_data: null", "eval_data: /home/me/held.txt"))
    (folder / "notes.txt").write_text("mine")
    make_adapter(folder, base=str(made / "base"), out=tmp_path / "adapter")
    assert "notes.txt" in json.loads((tmp_path / "adapter" / ADAPTER_FILE).read_text())["files"]
    result = push(tmp_path / "adapter", "someone/model", redact=True)
    assert result["redacted"] == ["recipe.yaml"] and result["left_out"] == ["notes.txt"]
    fetched = snapshot_download("someone/model", cache_dir=tmp_path / "cache", endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert apply(fetched, base=str(made / "base"), out=tmp_path / "again")["differs"] == []
    assert contents(tmp_path / "again") == contents(made / "whole") | {
        "recipe.yaml": recipe.replace("eval_data: null", "eval_data: held.txt").encode()
    }


def test_what_does_not_belong_to_the_model_stays_here_and_is_named(hub, folder):
    wanted = contents(folder)
    for name in ("notes.txt", ".env", "train.py", "report.html", "optimizer.pt", "probing/probe.json", "effects/sweep.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"token = {SECRET}, /home/me/models")
    said = Said()
    result = push(folder, "someone/model", reporter=said)
    assert arrived(hub) == wanted
    assert result["left_out"] == [".env", "effects/", "notes.txt", "optimizer.pt", "probing/", "report.html", "train.py"]
    assert any("notes.txt" in line for line in said.lines)


def test_the_catalogue_goes_along_when_asked_and_its_text_is_looked_through(hub, folder):
    (folder / "experts").mkdir()
    (folder / "experts" / "experts.json").write_text("{}")
    write_contexts(folder, "def f(path='/usr/lib'): pass  # token: abc123abc123abc123")
    push(folder, "someone/model")
    assert not any(name.startswith("experts/") for name in arrived(hub))
    push(folder, "someone/model", include_experts=True)
    assert arrived(hub) == contents(folder)
    write_contexts(folder, f"the token is {SECRET} in here")
    with pytest.raises(PushError, match=r"experts/contexts\.parquet \(context 0\), line 1: a Hugging Face token: hf_"):
        push(folder, "someone/model", include_experts=True)


def write_contexts(folder, text):
    ids = load_tokenizer(str(folder))(text)["input_ids"]
    parquet.write_table(pyarrow.table({"input_ids": [ids]}), folder / "experts" / "contexts.parquet")


def test_a_catalogue_that_is_not_there_is_asked_for(hub, made):
    with pytest.raises(PushError, match="no catalogue"):
        push(made / "whole", "someone/model", include_experts=True)
    assert hub.requests == []


# The licence


def with_base(folder, base="org/base"):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", f"---\nbase_model: {base}\n", 1))


def test_the_base_models_licence_goes_into_the_card_that_is_sent(hub, folder):
    with_base(folder)
    given = (folder / "README.md").read_text()
    hub.repositories["org/base"] = Repository(
        False, card={"license": "other", "license_name": "base-licence", "license_link": "LICENSE"}
    )
    assert push(folder, "someone/model")["license"] == "other"
    card = arrived(hub)["README.md"].decode()
    header, body = card.split("---\n")[1:3]
    assert "license: other\nlicense_name: base-licence\n" in header and "base_model: org/base\n" in header
    assert f"license_link: {hub.url}/org/base/blob/main/LICENSE\n" in header
    assert body == given.split("---\n")[2] and (folder / "README.md").read_text() == given


def test_no_licence_is_made_up(hub, folder):
    with_base(folder)
    assert push(folder, "someone/model")["license"] is None  # the hub does not know the base model
    hub.repositories["org/base"] = Repository(False)
    assert push(folder, "someone/model")["license"] is None  # its card names none
    assert arrived(hub) == contents(folder)


def test_a_licence_in_the_card_is_not_replaced(hub, folder):
    with_base(folder, "org/base\nlicense: mit")
    hub.repositories["org/base"] = Repository(False, card={"license": "apache-2.0"})
    assert push(folder, "someone/model")["license"] is None
    assert arrived(hub) == contents(folder)


# What must not be published


@pytest.mark.parametrize(
    ("name", "line", "what"),
    [
        ("README.md", f"use_auth_token={SECRET}", "a Hugging Face token: hf_a... (37 characters)"),
        ("evaluation.json", 'OPENAI_API_KEY="sk-proj-abcdefghij1234567890XYZ"', "an OpenAI key"),
        ("recipe.yaml", "# AKIAIOSFODNN7EXAMPLE", "an AWS access key: AK... (20 characters)"),
        ("layer.py", "# token: 9f8e7d6c5b4a39281706", "a secret by its name"),
        ("config.json", "Authorization: Bearer abcdef0123456789abcdef", "a bearer token"),
        ("plan.json", "https://me:pass-word@example.org/x", "a password in a URL: p... (9 characters)"),
        ("tokenizer.json", SECRET, "a Hugging Face token"),
        ("README.md", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("README.md", "see /home/me/models/x.", "a local path: /home/me/models/x"),
        ("config.json", "/Users/me/My Models/x", "a local path: /Users/me/My Models/x"),
        ("recipe.yaml", "data: C:\\Users\\me\\text.jsonl", "a local path: C:\\Users\\me\\text.jsonl"),
        ("generation_config.json", '"C:\\\\Users\\\\me"', "a local path: C:\\\\Users\\\\me"),
        ("tokenizer_config.json", "file:///srv/tokenizer", "a local path: file:///srv/tokenizer"),
        ("layer.py", "# /tmp/scratch/layer.py", "a local path: /tmp/scratch/layer.py"),
    ],
)
def test_secrets_and_local_paths_are_refused_before_anything_is_sent(hub, folder, name, line, what):
    path = folder / name
    number = path.read_text().count("\n") + 1
    if name in ("config.json", "plan.json"):  # read before: they stay JSON
        values = json.loads(path.read_text()) | {"zz": line}
        path.write_text(json.dumps(values))
        number = 1
    else:
        path.write_text(path.read_text() + line)
    with pytest.raises(PushError) as refused:
        push(folder, "someone/model")
    assert f"{name}, line {number}: {what}" in str(refused.value)
    for secret in (SECRET, "sk-proj-abcdefghij", "AKIAIOSF", "9f8e7d6c", "abcdef0123456789", "pass-word"):
        assert secret not in str(refused.value)
    assert hub.requests == []


def test_the_token_in_use_is_found_whatever_it_looks_like_and_wherever_it_is(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain words here")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " plain words here")
    with pytest.raises(PushError, match="a token in use here"):
        push(folder, "someone/model")
    weights = load_file(folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "by": "plain words here"})
    with pytest.raises(PushError, match=r"model\.safetensors \(header\), line \d: a token in use here"):
        push(folder, "someone/model")
    assert hub.requests == []


def test_what_a_conversion_with_local_files_writes_is_refused_and_redacted_on_request(hub, folder, tmp_path):
    text, base = tmp_path / "my text.jsonl", tmp_path / "base model"
    text.write_text("x")
    recipe = (folder / "recipe.yaml").read_text().replace("eval_data: null", f"eval_data: {text}")
    (folder / "recipe.yaml").write_text(recipe)
    for name, key, value in (("plan.json", "model", base), ("evaluation.json", "data", text)):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {key: str(value)}, indent=2, ensure_ascii=False) + "\n")
    with_base(folder, str(base))
    with pytest.raises(PushError, match="redact=True sends copies") as refused:
        push(folder, "someone/model")
    for name in ("recipe.yaml", "plan.json", "evaluation.json", "README.md"):
        assert f"{name}, line " in str(refused.value)
    assert hub.requests == []
    before = contents(folder)
    result = push(folder, "someone/model", redact=True)
    assert result["redacted"] == ["README.md", "evaluation.json", "plan.json", "recipe.yaml"] and contents(folder) == before
    there = arrived(hub)
    assert there["recipe.yaml"].decode() == recipe.replace(str(text), "my text.jsonl")
    assert json.loads(there["plan.json"]) == json.loads(before["plan.json"]) | {"model": "base model"}
    assert json.loads(there["evaluation.json"])["data"] == "my text.jsonl"
    assert there["README.md"].decode() == before["README.md"].decode().replace(f"base_model: {base}\n", "", 1)
    assert not any(str(tmp_path).encode() in data for data in there.values())
    assert {name for name in there if there[name] != before[name]} == set(result["redacted"])


def test_secrets_are_never_redacted_and_code_is_not_rewritten(hub, folder):
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + f"# {SECRET} /home/me/x\n")
    with pytest.raises(PushError) as refused:
        push(folder, "someone/model", redact=True)
    assert "take the secrets out" in str(refused.value) and "/home/me" not in str(refused.value)
    shutil.copy(folder / "plan.json", folder / "recipe.yaml")
    (folder / "layer.py").write_text((folder / "layer.py").read_text() + "# /home/me/x\n")
    with pytest.raises(PushError, match="take the paths out by hand"):
        push(folder, "someone/model", redact=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    "harmless",
    [
        "https://huggingface.co/home/me/x and ](/docs-of-no-one/x) and nats/token",
        "#!/usr/bin/env python, /dev/null, /etc/hosts, </home/x>",
        '"Q:\\nThe answer", "A:\\n"',
        "tokens: 2000000\nbos_token: <|endoftext|>\ntokenizer: x",
        '"token": ",", "share": 0.0722278738',
        "token = tokenizer.bos_token_id",
        "risk-adjusted-something-12345678901234567890",
        "and/or /tmp, / and //",
    ],
)
def test_what_only_looks_like_a_secret_or_path_passes(harmless):
    assert disclosures(harmless) == [] and redacted(harmless) == harmless


def test_redaction_leaves_nothing_to_find():
    text = 'a: /home/me/x y\nb: "/opt/data set/z.txt", c: [\'/root/q\', file:///home/m/w]\nd D:\\\\work\\\\v "\\n/tmp/u/t"'
    assert disclosures(redacted(text)) == []
    assert redacted(text) == 'a: x y\nb: "z.txt", c: [\'q\', w]\nd v "\\nt"'


# What is not whole, and what the hub refuses


@pytest.mark.parametrize("name", ["README.md", "plan.json", "recipe.yaml", "evaluation.json", "modeling_mxd.py", "sparse.py"])
def test_a_folder_that_lacks_a_file_is_refused(hub, folder, name):
    (folder / name).unlink()
    with pytest.raises(PushError, match=f"there is no {name}"):
        push(folder, "someone/model")
    assert hub.requests == []


def test_weights_that_are_missing_or_cut_off_are_refused(hub, folder, made, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        push(folder, "someone/model")
    weights.rename(folder / "other")
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        push(folder, "someone/model")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, folder / "model-1.safetensors")
    with pytest.raises(WeightsError, match=r"holds no model-2\.safetensors"):
        push(folder, "someone/model")
    save_file({"c": torch.ones(1)}, folder / "model-2.safetensors")
    with pytest.raises(WeightsError, match="holds no b"):
        push(folder, "someone/model")
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    lost, *others = sorted(kept := load_file(adapter / "adapter.safetensors"))
    save_file({name: kept[name] for name in others}, adapter / "adapter.safetensors")
    with pytest.raises(WeightsError, match=f"holds no {lost}"):
        push(adapter, "someone/model")
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no adapter\.safetensors"):
        push(adapter, "someone/model")
    assert hub.requests == []


def test_what_is_no_folder_of_ours_is_refused(hub, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "ordinary")
    for folder in ("ordinary", "nowhere"):
        with pytest.raises(NotConvertedError):
            push(tmp_path / folder, "someone/model")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model", "someone/my model", "a/b/c", "someone/.x", "someone/x..y", ""])
def test_what_is_no_name_of_a_repository_is_refused(hub, made, name):
    with pytest.raises(PushError, match="user/name"):
        push(made / "whole", name)
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(hub, made, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token.*\n.*hf auth login"):
        push(made / "whole", "someone/model")
    assert hub.requests == []
    push(made / "whole", "someone/model", token=TOKEN)


def test_a_token_that_the_hub_does_not_know(hub, made):
    with pytest.raises(HubError, match=r"does not know the token \(401: Invalid credentials"):
        push(made / "whole", "someone/model", token="hf_" + "x" * 30)
    assert hub.repositories == {}


def test_a_name_that_is_anothers(hub, made):
    with pytest.raises(HubError, match="may not write there.*You don't have the rights"):
        push(made / "whole", "another/model")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/repos/create", 404, "no such user"),
        ("/commit/", 403, "may not write there"),
        ("/commit/", 409, "something else was being written"),
        ("/commit/", 412, "in the meantime"),
        ("/objects/batch", 413, "larger than the hub accepts"),
        ("/objects/batch", 402, "no room"),
        ("/preupload/", 429, "too often"),
        ("/commit/", 500, "fault of its own"),
        ("/commit/", 400, "does not accept"),
    ],
)
def test_what_the_hub_refuses_is_named_and_no_file_is_there(hub, made, path, status, words, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda *_: None)  # the library asks again after some faults
    hub.refuse[path] = status, {"X-Error-Message": "so it says"}
    with pytest.raises(HubError, match=f"{words}.*{status}: .*so it says"):
        push(made / "whole", "someone/model")
    assert not any(arrived(hub, name) for name in hub.repositories)


def test_offline_or_unreachable_is_named(hub, made, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be reached"):
        push(made / "whole", "someone/model")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        push(made / "whole", "someone/model")


def test_the_table_says_what_was_sent(hub, made):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(push_table(push(made / "whole", "someone/model")))
    assert "someone/model, public" in captured.get() and "model.safetensors" in captured.get()
