"""What other libraries say when they fail: the fact is handed on, their advice is not."""

import ast
import shutil

import pytest
from running import ROOT
from safetensors import SafetensorError

from mxdsurgery.base.config import load_config
from mxdsurgery.base.foreign import code_error
from mxdsurgery.base.hub import sending_to
from mxdsurgery.base.model import open_model
from mxdsurgery.catalogue.report import _tokenizer
from mxdsurgery.checkpoint.converted import load, read_config
from mxdsurgery.errors import DataError, ModelNotFoundError, MxDError, first_line
from mxdsurgery.measuring.frontier_table import load_layer
from mxdsurgery.outside import FileFault, stored_shapes
from mxdsurgery.runs.parallel import _together as together
from mxdsurgery.text.fields import text_in
from mxdsurgery.text.sources import documents

FOLDER = ROOT / "tests/fixtures/format_3"
TOKENIZER = "transformers.AutoTokenizer.from_pretrained"
TEMPLATE = "transformers.PreTrainedTokenizerBase.apply_chat_template"

# What libraries say, and what is left of it.
WORDS = {
    "Loading x requires you to execute the configuration file in that repo. Make sure you have read the code there, then set "
    "the option `trust_remote_code=True` to remove this error.": "Loading x requires you to execute the configuration file in "
    "that repo.",
    "Loading a GPTQ model requires optimum (`pip install optimum`)": "Loading a GPTQ model requires optimum",
    "CUDA out of memory. Tried to allocate 2 GiB. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid it.": "CUDA out of memory. Tried to allocate 2 GiB.",
    "Cannot read x, please set use_safetensors=False, and try again. It is broken.": "Cannot read x. It is broken.",
    "Target modules {'x'} not found. Please check the target modules and try again.": "Target modules {'x'} not found.",
    "Config name is missing.\nPlease pick one among: ['a']": "Config name is missing.",
    "403 Forbidden: Please enable access to gated repositories in your token settings": "403 Forbidden",
    "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the report!": "ValueError",
    "Using a `device_map` requires Accelerate: `pip install 'accelerate>=0.26.0'`": "ValueError",
    "mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)": None,
    "Expecting ',' delimiter: line 1 column 3 (char 2)": None,
    "Conversation roles must alternate user/assistant/user/assistant/...": None,
    "Read timed out. (read timeout=10)": None,
    "x is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'": None,
}


@pytest.mark.parametrize(("words", "left"), WORDS.items())
def test_the_fact_is_left_and_the_advice_is_not(words, left):
    assert first_line(ValueError(words)) == (words if left is None else left)


def test_what_is_no_advice_is_left_as_it_is():
    assert first_line(OSError(28, "No space left", "/a, please use b")) == "[Errno 28] No space left: '/a, please use b'"
    assert first_line(KeyError("layers")) == "there is no 'layers'"
    needed = ImportError("X requires protobuf but it was not found. You can install it with pip: `pip install -U protobuf`")
    assert first_line(needed) == "a package is needed that is not installed here: protobuf"


def test_what_is_advice_is_told_from_our_own_words():
    own = {"ValueError", "FileFault", "InterventionError"}
    found = []
    for path in sorted((ROOT / "mxdsurgery").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in own and node.args:
                parts = getattr(node.args[0], "values", [node.args[0]])
                found.append("".join(part.value if isinstance(part, ast.Constant) else "7" for part in parts))
    assert len(found) > 60
    assert [text for text in found if first_line(ValueError(text)) != text] == []


# Where an exception's text goes into ours


# A log keeps what ended a run, whole; in errors.py is `first_line`.
_WHOLE = {"journal.py", "errors.py"}
# What reads an exception, and what of one is no text of a library: facts, a server's answer, and what our own errors hold.
_READERS = ("first_line", "raised", "type", "fix_of", "isinstance", "_in_one_line")
_FACTS = ("strerror", "filename", "errno", "code", "problem", "read", "found", "expected", "fix", "for_command")


def handed_on(scope, name):
    """Where a text of ours holds an exception's own, or a name that was set to it, and not what `first_line` makes of it."""
    raw = {name}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in (f"str({name})", f"repr({name})", f"{name}.args[0]"):
            raw |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    said = [node for node in ast.walk(scope) if isinstance(node, ast.FormattedValue)]
    said += [
        argument
        for node in ast.walk(scope)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
        for argument in node.args
    ]
    return [ast.unparse(node) for node in said if holds(node, raw)]


def holds(node, names):
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _READERS:
        return False
    if isinstance(node, ast.Attribute) and node.attr in _FACTS:
        return False
    if isinstance(node, ast.Name):
        return node.id in names
    return any(holds(child, names) for child in ast.iter_child_nodes(node))


def test_no_exceptions_text_is_handed_on_unread():
    places, found = 0, []
    for path in sorted((ROOT / "mxdsurgery").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scopes = [(node, node.name) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name]
        scopes = [(node, name) for node, name in scopes if ast.unparse(node.type) != "KeyboardInterrupt"]
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for argument in function.args.args:
                if argument.annotation and ast.unparse(argument.annotation).endswith(("Exception", "Error")):
                    scopes.append((function, argument.arg))
        places += len(scopes)
        if path.name not in _WHOLE:
            found += [f"{path.name}:{scope.lineno} {text}" for scope, name in scopes for text in handed_on(scope, name)]
    assert places > 90
    assert found == []


@pytest.mark.parametrize("text", ["f'x: {e!r}'", "DataError(str(e))", "f'{str(e)}'", "f'{words}'", "f'{e.args[0]}'"])
def test_a_text_that_is_handed_on_is_seen(text):
    scope = ast.parse(f"def f(e):\n    words = str(e)\n    raise {text}")
    assert handed_on(scope, "e") and not handed_on(ast.parse(f"f'{{first_line(e)}} {text[0]}'"), "e")


ADVICE = "it broke here. Please pass `trust_remote_code=True`, use_safetensors=False or device_map='auto', or pip install x."


def broken(kind=RuntimeError):
    def raising(*_, **__):
        raise kind(ADVICE)

    return raising


def _with_template():
    tokenizer = open_model("demo-glu").tokenizer()
    tokenizer.chat_template = "x"
    return tokenizer


def _together():
    with together():
        broken()()


def _sending():
    with sending_to("me/model"):
        broken()()


def _own_code():
    raise code_error("its code", RuntimeError(ADVICE))


CHAT = {"c": [{"role": "user", "content": "a"}]}
# What is broken, and what then is done.
PLACES = {
    "a config": ("transformers.AutoConfig.from_pretrained", lambda: load_config("demo-glu")),
    "a skeleton": ("transformers.AutoModelForCausalLM.from_config", lambda: open_model("demo-glu").skeleton),
    "weights": ("transformers.AutoModelForCausalLM.from_pretrained", lambda: open_model("demo-glu").load()),
    "a tokenizer": (TOKENIZER, lambda: open_model("demo-glu").tokenizer()),
    "a converted model": ("transformers.PreTrainedModel.from_pretrained", lambda: load(FOLDER)),
    "its config": ("transformers.PreTrainedConfig.from_pretrained", lambda: load(FOLDER)),
    "its tokenizer": (TOKENIZER, lambda: load(FOLDER).tokenizer()),
    "a report's tokenizer": (
        "transformers.AutoTokenizer.from_pretrained",
        lambda: _tokenizer(FOLDER, read_config(FOLDER), False),
    ),
    "a data set": ("datasets.load_dataset", lambda: next(documents("user/set"))),
    "a chat": (
        "transformers.PreTrainedTokenizerBase.apply_chat_template",
        lambda: text_in(CHAT, "c", "here", _with_template()),
    ),
    "what the hub is sent": ("torch.zeros", _sending),
    "processes": ("torch.zeros", _together),
    "own code": ("torch.zeros", _own_code),
    "headers of weights": ("mxdsurgery.outside.safe_open", lambda: stored_shapes(FOLDER)),
    "a frontier's layer": ("mxdsurgery.measuring.frontier_table.safe_open", lambda: load_layer(FOLDER / "model.safetensors")),
}


@pytest.mark.parametrize("place", PLACES)
def test_bad_advice_reaches_nobody(monkeypatch, place):
    target, run = PLACES[place]
    monkeypatch.setattr(target, broken(SafetensorError if place == "headers of weights" else RuntimeError))
    with pytest.raises((MxDError, FileFault)) as raised:
        run()
    shown = str(raised.value)
    assert "it broke here." in shown
    for word in ("please", "use_safetensors", "device_map", "pip install x", "trust_remote_code=True`"):
        assert word not in shown.lower(), shown


# What is known of a cause is said in our words


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample of usage:\n"
         "\t`load_dataset('user/set', 'en')`"), "it has several configurations", "user/set:CONFIG"),
        (ValueError("BuilderConfig 'e' not found. Available: ['en', 'de']"), "one of them: ['en', 'de']", "user/set:CONFIG"),
        (ValueError("Bad split: e. Available splits: ['train', 'test']"), "it has no such split", "user/set:CONFIG:SPLIT"),
        (OSError("Dataset 'user/set' is a gated dataset on the Hub. You must be authenticated."), "it is gated", "HF_TOKEN"),
        (OSError("Dataset 'user/set' doesn't exist on the Hub or cannot be accessed."), "knows no such data set", "spelling"),
        (OSError("Revision 'refs/convert/parquet' doesn't exist for dataset 'user/set'."), "it comes as a script", "to files"),
        (ConnectionError("Couldn't reach 'user/set' on the Hub (OfflineModeIsEnabled)"), "Couldn't reach", "the connection"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_data_set_is_said_as_we_name_it(monkeypatch, error, said, fix):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as raised:
        next(documents("user/set"))
    assert said in str(raised.value) and fix in raised.value.fix and "load_dataset" not in str(raised.value)


def test_a_converted_models_tokenizer_is_looked_at_as_a_base_models(tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    for run in (load(folder).tokenizer, lambda: _tokenizer(folder, read_config(folder), False)):
        with pytest.raises(ModelNotFoundError, match="the folder holds no tokenizer"):
            run()
