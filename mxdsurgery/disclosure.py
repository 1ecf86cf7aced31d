"""What a text gives away that it should not: secrets, and paths of the machine that it was written on."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

# All patterns here run on texts of any length and of anyone's making: what one start has read in vain is not read again from
# the next. So whether a value holds digits is not asked by a lookahead, but of a match, which goes on as far as the value.

# Patterns that match nothing but secrets.
_SECRETS = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{20,}",
    "an OpenAI key": r"(?<![A-Za-z0-9])(?P<value>sk-[A-Za-z0-9_-]{20,})(?P<rest>)",
    "an AWS access key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",
    "a GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a Google key": r"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"(?<![A-Za-z0-9])xox[abeprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Names that say that a secret follows; it has at least 12 characters, letters and digits, with what stands right after it.
_VALUE = r"(?P<value>[A-Za-z0-9_\-./+=]{12,})(?=(?P<rest>[^\s\"']{0,100}))"
_ASSIGNMENTS = {
    "a secret by its name": (
        r"(?i)(?<![A-Za-z0-9_-])(?:[\w-]{0,30}(?:api[_-]?key|secret|passw(?:or)?d|(?:access|auth|hf|hub)[_-]?token)[\w-]{0,30}|token)"
        r"[\"']?\s*[:=]\s*[\"']?" + _VALUE
    ),
    "a bearer token": r"(?i)\bbearer\s+" + _VALUE,
    "a password in a URL": r"://[^/\s:@\"']*:(?P<value>[^/\s@\"']+)@",
    "a key in a URL": (
        r"(?i)[?&](?:(?:api|access|auth)?[_-]?(?:key|token)|secret|password|sig(?:nature)?)=(?P<value>[^&#\s\"']+)"
    ),
}
_FORMS = [(what, re.compile(form)) for what, form in _SECRETS.items()]
_NAMED = [(what, re.compile(form)) for what, form in _ASSIGNMENTS.items()]

# Environment variables whose values are searched for literally: those that the libraries used here read.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")

# A path is a whole value of YAML (up to the end of its line) or a whole string, which may hold spaces; or it stands in a text.
_PATHS = re.compile(
    r"""
      ^[ ]*(?:-[ ]|[\w-]+:[ ])(?P<line>(?:/(?!/)|[A-Za-z]:[\\/])(?:(?![ ]/)[^"'\n])*)$
    | "(?P<double>/(?!/)(?:(?![ ]/)[^"\\:\n])*)"
    | '(?P<single>/(?!/)(?:(?![ ]/)[^'\\:\n])*)'
    | (?P<url>file:/{1,3}[^\s"'`<>]+)
    | (?<![A-Za-z0-9])(?P<drive>[A-Za-z]:(?:\\\\|\\(?![nrtabfvux0"'\\])|/(?!/))\w[\w .$~-]+[^\s"'`<>|,;]*)
    | (?:(?<![\w./~<>-])|(?<=\\[nrt]))(?P<bare>/(?!/)[^\s"'`<>|,;:()\[\]{}\\*?]+)
    """,
    re.VERBOSE | re.MULTILINE,
)
# Where people's own files are, on machines of any kind.
_OWN = {"home", "Users", "root", "tmp", "private", "mnt", "media", "Volumes", "scratch", "workspace", "content", "kaggle"}
# Folders that every machine has: they give nothing away.
_EVERYWHERE = {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "sys"}
_EVERYWHERE_IN_USR = {"bin", "include", "lib", "lib32", "lib64", "libexec", "sbin", "share"}
_TOP = _OWN | _EVERYWHERE | {"opt", "srv", "usr", "var"}


@dataclass(frozen=True)
class Finding:
    """Something that a text gives away.

    Attributes:
        line: where, counted from 1.
        what: in words, with its article.
        shown: the path, or the beginning of the secret.
        secret: whether it is a secret; else it is a path.
    """

    line: int
    what: str
    shown: str
    secret: bool


def secrets_here(token: str | None) -> set[str]:
    """The token in use, and those in the environment, to be searched for literally."""
    values = [token, *(os.environ.get(name) for name in _VARIABLES)]
    return {value.strip() for value in values if value and len(value.strip()) >= 8}


def disclosures(text: str, known: Iterable[str] = (), vocabulary: bool = False) -> list[Finding]:
    """All that a text gives away, in its order.

    Args:
        text: of a whole file.
        known: secrets to search for literally.
        vocabulary: the text lists a tokenizer's pieces, or is what a model was shown: find only what is surely a secret.
    """
    found = [(start, end, what, True) for start, end, what in _secrets(text, known, vocabulary)]
    if not vocabulary:
        found += [(start, end, "a local path", False) for start, end in _local_paths(text)]
    findings, reached, line, counted = [], 0, 1, 0
    for start, end, what, secret in sorted(found, key=lambda one: one[0]):  # of two at one place, the more exact stays first
        if start >= reached:  # drops overlaps: a token may also follow the word "token"
            length = end - start
            shown = f"{text[start : start + length // 8][:4]}... ({length} characters)" if secret else text[start:end]
            line, counted = line + text.count("\n", counted, start), start
            findings.append(Finding(line, what, shown, secret))
            reached = end
    return findings


def redacted(text: str) -> str:
    """The text with each local path cut down to its last component; secrets stay, to be refused."""
    pieces, reached = [], 0
    for start, end in _local_paths(text):
        pieces += [text[reached:start], re.split(r"[\\/]+", text[start:end].rstrip("\\/ "))[-1]]
        reached = end
    return "".join([*pieces, text[reached:]])


def masked(text: str, known: Iterable[str] = ()) -> str:
    """The text with each secret replaced by its kind; local paths stay.

    Args:
        text: of a log or a message.
        known: secrets to search for literally.
    """
    pieces, reached = [], 0
    for start, end, what in sorted(_secrets(text, known, False), key=lambda one: one[0]):
        if start >= reached:
            pieces += [text[reached:start], f"[{what}]"]
        reached = max(reached, end)  # so that the end of a longer, overlapping match does not stay
    return "".join([*pieces, text[reached:]])


def secret_in(text: str) -> str | None:
    """The kind of a secret that a text holds, those of the environment included; None where there is none."""
    return next((what for _, _, what in _secrets(text, secrets_here(None), False)), None)


def _secrets(text: str, known: Iterable[str], vocabulary: bool) -> Iterator[tuple[int, int, str]]:
    for value in known:
        for match in re.finditer(re.escape(value), text):
            yield *match.span(), "a token in use here"
    for what, form in _FORMS if vocabulary else _FORMS + _NAMED:
        for match in form.finditer(text):
            if "rest" not in form.groupindex or _mixed(text[match.start("value") : match.end("rest")]):
                yield *match.span("value" if "value" in form.groupindex else 0), what


def _mixed(value: str) -> bool:
    return re.search("[0-9]", value) is not None and re.search("[A-Za-z]", value) is not None


def _local_paths(text: str) -> Iterator[tuple[int, int]]:
    for match in _PATHS.finditer(text):
        kind = match.lastgroup
        assert kind is not None
        if not match[kind].startswith("/") or _is_local(match[kind]):
            yield match.span(kind)


def _is_local(path: str) -> bool:
    """Whether an absolute path is a local one, of this machine or another; it need not exist any more."""
    first, *rest = PurePosixPath(path).parts[1:] or ("",)
    if not rest:
        return first not in {"", *_TOP} and os.path.exists(path)
    if first in _EVERYWHERE or (first == "usr" and rest[0] in _EVERYWHERE_IN_USR):
        return False
    return first in _OWN or os.path.isdir(f"/{first}")
