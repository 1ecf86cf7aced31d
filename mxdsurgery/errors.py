"""The named errors of a user's mistake: what was found, what was expected, what to do next.

Every one of them ends a command with exit code 2 and these lines on stderr, never a traceback. Internal invariants are
``assert``s; anything else that is raised is a bug of ours.
"""

import re
import shlex
from collections.abc import Collection

# Settings that are on or off: their flags take no value.
SWITCHES = ("chat", "checkpointing", "overwrite", "redact", "resume", "trust-remote-code", "undo")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)(?: ([0-9a-z][\w.,-]*(?<=\w))(?=$|[,;:)]| \(| --))?")
# A whole other command, to be run first: its flags are its own.
_COMMAND = re.compile(r"mxdsurgery [a-z]+(?: (?:'[^']*'|\"[^\"]*\"|[^'\") ]+))*")


class MxDError(Exception):
    """A mistake or a circumstance that the user can mend.

    Args:
        found: what is wrong, naming the recipe key, layer path or file.
        expected: what would have been right.
        fix: what to do next; several ways are separated by ``, or ``. Only here are settings named as flags: the command line
            leaves a way out that its command has no flag for (`for_command`), and in Python they are keywords (``str()``).
        keys: the recipe keys whose values are at odds; who knows where the values came from says so (`resolve.saying_whose`).
        left: what the work that it ended leaves, and how to go on; flags are named here, too.
    """

    def __init__(
        self,
        found: str,
        *,
        expected: str | None = None,
        fix: str | None = None,
        keys: Collection[str] = (),
        left: str | None = None,
    ) -> None:
        self.found, self.expected, self.fix, self.keys, self.left = found, expected, fix, keys, left
        super().__init__(self._lines(_with_keywords(left or ""), _with_keywords(fix or "")))

    def for_command(self, flags: Collection[str]) -> str:
        """What a command says that has these flags."""
        return self._lines(self.left, self._ways(set(flags)))

    def in_python(self, names: Collection[str]) -> None:
        """Lets ``str()`` say what a function has said that has arguments of these names: other ways are left out."""
        ways = self._ways({f"--{name.replace('_', '-')}" for name in names})
        self.args = (self._lines(_with_keywords(self.left or ""), _with_keywords(ways)),)

    def _ways(self, flags: set[str]) -> str:
        return ", or ".join(way for way in (self.fix or "").split(", or ") if flags_in(way) <= flags)

    def _lines(self, left: str | None, fix: str | None) -> str:
        lines = [self.found]
        if left:
            lines.append(left)
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if fix:
            lines.append(f"to mend: {fix}")
        return "\n".join(lines)


def flags_in(text: str) -> set[str]:
    """The flags that a text names, but for those of another command in it (``mxdsurgery experts DIR --overwrite``)."""
    return {f"--{match[1]}" for match in _FLAG.finditer(_COMMAND.sub("", text))}


def _with_keywords(text: str) -> str:
    """A text with its flags as keywords of Python's functions: ``--batch 512`` is ``batch=512``."""
    pieces, end = [], 0
    for command in [*_COMMAND.finditer(text), None]:
        start = len(text) if command is None else command.start()
        pieces.append(_FLAG.sub(_keyword, text[end:start]))
        if command is not None:
            pieces.append(command[0])
            end = command.end()
    return "".join(pieces).replace("the same command", "the same call")


def _keyword(flag: re.Match) -> str:
    name, value = flag[1], flag[2]
    keyword = name.replace("-", "_") + "="
    if name in SWITCHES:
        return f"{keyword}True" + (f" {value}" if value else "")
    if value is None or re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return keyword + (value or "")
    return f"{keyword}{value!r}"


def as_typed(value: object) -> str:
    """A path or name as it is written in a command: quoted where it has to be."""
    return shlex.quote(str(value))


class MxDWarning(UserWarning):
    """Something that is allowed but probably not intended."""


class RecipeError(MxDError):
    """A recipe or flag with an unknown key, a wrong type or a value out of range."""


class LayerSelectionError(MxDError):
    """A ``layers`` value that cannot be read or names a layer that the model does not have."""


class ModelNotFoundError(MxDError):
    """No such folder, no such model on the hub, or the hub cannot be reached."""


class GatedModelError(MxDError):
    """The hub has the model, but not for this user."""


class NotCausalLMError(MxDError):
    """A model that does not predict next tokens."""


class UnknownFamilyError(MxDError):
    """An architecture that transformers does not know, that needs code of its own, or that was registered wrongly."""


class UnsupportedModelError(MxDError):
    """A model whose own code cannot be run as every command runs a model."""


class UnsupportedBlockError(MxDError):
    """An MLP block that was not found, or whose output could not be recomputed from the weights found in it."""


class WeightsError(MxDError):
    """Weights that are missing, incomplete, quantised, not finite or not safetensors."""


class DataError(MxDError):
    """Text that is missing, empty, too short or of a form that cannot be read."""


class NoFreshTextError(DataError):
    """Text all of which was trained on before, or is held out."""


class OutputError(MxDError):
    """An output folder that exists already or cannot be written."""


class RunInUseError(OutputError):
    """A run that another process works on, or has taken over."""


class PathError(MxDError):
    """A path that leads nowhere: its home folder is not known, or the working folder is gone."""


class NotConvertedError(MxDError):
    """A folder that does not hold a model converted by mxdsurgery."""


class BaseModelError(MxDError):
    """The base model that a converted one is compared with is missing or is another one."""


class EditError(MxDError):
    """An edit that names no expert of the model, has invalid numbers, or is meant for another model."""


class MetricsError(MxDError):
    """A run's metrics that are missing or cannot be read."""


class CatalogueError(MxDError):
    """What `experts` should have written is missing, of another model, or cannot be read."""


class JudgeError(MxDError):
    """The judge of texts cannot be reached, refused, or gave an answer that is no rating."""


class DivergedError(MxDError):
    """A layer's loss became NaN or grew without bound."""


class ExportError(MxDError):
    """The exported checkpoint, reloaded, did not do what the model in memory did."""


class MemoryBudgetError(MxDError):
    """A conversion that does not fit the memory budget, even one layer at a time."""


class CheckpointError(MxDError):
    """A checkpoint that is damaged, or that a run with other settings wrote."""


class CacheError(MxDError):
    """Kept activations that are damaged, or of another model, text or batch."""


class HealError(MxDError):
    """A folder that cannot be healed, or an unknown way of healing."""


class LoRAError(MxDError):
    """LoRA is not possible: peft is missing, or there is nothing to adapt."""


class HubError(MxDError):
    """The hub cannot be reached, or refused what was sent to it."""


class PushError(MxDError):
    """A push that is refused: a token or local path in it, files missing, or something else in its place."""


class DeviceError(MxDError):
    """A device or a way of launching that is not there or not supported."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in long work; ``str()`` says where it stood and what was kept, in Python's words.

    Attributes:
        said: the same in a command's words, with its flags.
    """

    def __init__(self, said: str) -> None:
        self.said = said
        super().__init__(_with_keywords(said))


# Where another library begins to advise: its advice is for who calls it, and mostly wrong for who called us.
_CLAUSE = re.compile(r"(?<=[.;!?:,])\s+|\s+(?=\()|\s+(?=[-–—] )")
_IMPERATIVE = re.compile(
    r"[(\W]*(?:(?:and|or|but|then|also) |to [^ ]+ (?:it|this|the|a)\b[^,]*, )*(?:please|try|use|set (?:the|it|this|`)|pass|"
    r"see|check (?!failed)|run (?!mxdsurgery)|call (?:the|it|`)|install|upgrade|downgrade|update|consider|specify|provide|"
    r"make sure|ensure|look|visit|refer|go to|do not|don't|did you|add|remove|pick|example|if|you|instead|otherwise|"
    r"either|alternatively|for (?:more|details)|open an issue)\b",
    re.IGNORECASE,
)
_FOREIGN = re.compile(
    r"\b(?:trust_remote_code|use_safetensors|device_map|low_cpu_mem_usage|ignore_mismatched_sizes|weights_only|allow_pickle|"
    r"force_download|resume_download|local_files_only|from_pretrained|load_dataset|save_pretrained|(?:pip3?|conda) install)\b|"
    r"\b\w+=(?:True|False|None)\b|\b(?:you|please|try) (?:can|could|may|might|should|must|need|have|want|set|use|try|\w+ing)\b"
    r"|`[\w.]+\([^`]*`|\b[A-Z]+_[A-Z_]+=",
)
_INSTALL = re.compile(r"(?:pip3?|conda) install (?:-\S+ )*[`'\"]*([A-Za-z][\w.-]*)")


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and in the second where the first ends with a colon, without its advice.

    What other libraries advise (``trust_remote_code=True``, ``pip install x``) is for who calls them. What is left out ends
    where the next sentence begins; of an error that says nothing else, its kind is given.
    """
    if isinstance(error, KeyError) and error.args:
        return f"there is no {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error)
    needed = _INSTALL.search(str(error)) if isinstance(error, ImportError) else None
    if needed:
        return f"a package is needed that is not installed here: {needed[1]}"
    lines = str(error).strip().splitlines() or [""]
    line = f"{lines[0].strip()} {lines[1].strip()}" if lines[0].rstrip().endswith(":") and len(lines) > 1 else lines[0]
    kept, advice, begins = [], False, True
    for clause in _CLAUSE.split(line):
        advice = (advice and not begins) or bool(_IMPERATIVE.match(clause) or _FOREIGN.search(clause))
        begins = clause.endswith((".", "!", "?"))
        if not advice:
            kept.append(clause)
        elif kept:
            kept[-1] = kept[-1].rstrip(" ,:;-–—(")
            kept[-1] += "." * (begins and not kept[-1].endswith("."))
    return " ".join(kept) or type(error).__name__
