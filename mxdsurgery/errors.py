"""The named errors of a user's mistake: what was found, what was expected, what to do next.

Every one of them ends a command with exit code 2 and these lines on stderr, never a traceback. Internal invariants are
``assert``s; anything else that is raised is a bug of ours.
"""


class MxDError(Exception):
    """A mistake or a circumstance that the user can mend.

    Args:
        found: what is wrong, naming the recipe key, layer path or file.
        expected: what would have been right.
        fix: what to do next.
    """

    def __init__(self, found: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        lines = [found]
        if expected:
            lines.append(f"expected: {expected}")
        if fix:
            lines.append(f"to mend: {fix}")
        super().__init__("\n".join(lines))


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


class UnsupportedBlockError(MxDError):
    """An MLP block that was not found, or whose output could not be recomputed from the weights found in it."""


class WeightsError(MxDError):
    """Weights that are missing, incomplete, quantised, not finite or not safetensors."""


class DataError(MxDError):
    """Text that is missing, empty, too short or of a form that cannot be read."""


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
    """Ctrl-C in long work; ``str()`` says where it stood and what was kept."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and in the second where the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].strip()} {lines[1].strip()}" if lines[0].rstrip().endswith(":") and len(lines) > 1 else lines[0]
