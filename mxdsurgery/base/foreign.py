"""Code that came with a model: whether a class is such code, and what it means that it does not run."""

import re
import traceback

from transformers import AutoModelForCausalLM, PreTrainedConfig

from mxdsurgery.errors import UnknownFamilyError, first_line

# Where transformers copies such code to, as a package.
_PACKAGE = "transformers_modules"


def came_with_the_model(made: type) -> bool:
    """Whether a class, or one that it is made from, is code that came with its model, and was trusted."""
    return any(base.__module__.split(".")[0] == _PACKAGE for base in made.__mro__)


def forget_code_of(config: PreTrainedConfig) -> None:
    """Makes transformers look for a model's code beside the model, not in what it remembers.

    It remembers one model class for each config class, and folders of one name with the same code of the config share that
    class: without this, the second of them would be run by the first one's model code.
    """
    if came_with_the_model(type(config)):
        AutoModelForCausalLM._model_mapping._extra_content.pop(type(config), None)


def raised(error: BaseException) -> str:
    """What an exception says, with its kind, and the file and line of a model's own code that it came from."""
    words = f"{type(error).__name__}: {first_line(error)}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in frame.filename]
    return f"{words} ({frames[-1].filename.rsplit('/', 1)[-1]}, line {frames[-1].lineno})" if frames else words


def code_error(what: str, error: Exception) -> UnknownFamilyError:
    """The named error for what was raised while code that came with a model was loaded, or built the model.

    Args:
        what: the code, in words, at the beginning of a sentence.
        error: whatever was raised.
    """
    words = str(error)
    listed = re.search(r"packages that were not found in your environment: ([^.]*)\. Run", words)
    missing = listed[1].split(", ") if listed else []
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = [error.name.split(".")[0]]
    if missing:
        return UnknownFamilyError(
            f"{what} needs a package that is not installed here: {', '.join(missing)}",
            expected="all packages that this code imports",
            fix=f"pip install {' '.join(missing)}, if that is the package of this name that its authors mean",
        )
    absent = re.search(r"/([^/']*)\.py'?$", words) if isinstance(error, FileNotFoundError) else None
    if absent:
        return UnknownFamilyError(
            f"{what} imports '.{absent[1]}', and there is no file {absent[1]}.py beside it",
            expected="code in single files beside the config.json: transformers follows no import into a folder",
            fix="fetch the missing file; or, in a copy of the model, move what is in the folder beside the other code",
        )
    return UnknownFamilyError(
        f"{what} raised {raised(error)}",
        expected="code that runs with this transformers",
        fix="see which version of transformers its card asks for, or mend that line in a copy of the model",
    )
