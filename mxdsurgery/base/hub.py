"""What the hub answers, as named errors: when something is read from it, and when something is sent to it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import GatedModelError, HubError, ModelNotFoundError, MxDError, first_line

MODEL_KINDS = "a hub id (org/name), a local folder with a config.json, or " + " or ".join(DEMO_MODELS)

LOG_IN = "run 'hf auth login' or set HF_TOKEN, with a token that may write"


class _Cause:
    """An exception and all that led to it."""

    def __init__(self, error: BaseException) -> None:
        self.chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in self.chain:
            self.chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        self.refusal = next((link for link in self.chain if isinstance(link, HfHubHTTPError)), None)

    def has(self, *kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in self.chain)

    def unreachable(self) -> bool:
        """Whether there was no answer at all."""
        return self.has(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) or any(
            "connect" in str(link).lower() for link in self.chain[:1]
        )


def reading_error(model: str, error: Exception) -> MxDError:
    """The named error for what huggingface_hub or transformers raised while a model was read."""
    cause = _Cause(error)
    if cause.has(GatedRepoError):
        return GatedModelError(
            f"{model!r} is gated: the hub did not let us read it",
            expected="a token of an account that was granted access",
            fix=f"ask for access at https://huggingface.co/{model}, then run 'hf auth login' or set HF_TOKEN",
        )
    if cause.has(RevisionNotFoundError):
        return ModelNotFoundError(f"{model!r} has no such revision", expected="a branch, tag or commit of it")
    if cause.has(RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub knows no model {model!r} (or it is private)",
            expected=MODEL_KINDS,
            fix="check the spelling; for a private model run 'hf auth login' or set HF_TOKEN",
        )
    if cause.has(HFValidationError):
        return ModelNotFoundError(f"{model!r} is neither a folder nor a hub id", expected=MODEL_KINDS)
    if cause.refusal is not None:
        return ModelNotFoundError(
            f"the hub would not give {model!r}: {first_line(cause.refusal)}",
            expected=MODEL_KINDS,
            fix="try again later; if it says 401 or 403, renew the token with 'hf auth login' or HF_TOKEN",
        )
    if cause.unreachable():
        return ModelNotFoundError(
            f"{model!r} is no local folder, and the hub cannot be reached (or we are offline)",
            expected=MODEL_KINDS,
            fix="check the spelling and the connection, or give the folder of a model that is on this machine",
        )
    return ModelNotFoundError(f"{model!r} cannot be read: {first_line(error)}", expected=MODEL_KINDS)


# What an HTTP status means when something is sent, and what to do about it.
_REFUSALS = {
    400: ("the hub does not accept what was sent", "mend what it names"),
    401: ("the hub does not know the token", LOG_IN),
    402: ("the account has no room or no plan for this", "free some storage there, or push under another account"),
    403: ("the token may not write there", "push under a name of yours, or " + LOG_IN),
    404: (
        "the hub knows no such user, organisation or branch, or the token may not see it",
        "check the spelling, or " + LOG_IN,
    ),
    409: ("something else was being written there", "look at what it holds, then push again"),
    412: ("something else was written there in the meantime", "look at what it holds, then push again"),
    413: ("it is larger than the hub accepts", "push under an account that has room for it"),
    429: ("the hub was asked too often", "wait some minutes and push again"),
}


def writing_error(repo: str, error: Exception) -> MxDError:
    """The named error for what huggingface_hub raised while something was sent to ``repo``."""
    cause = _Cause(error)
    in_xet = re.search(r"HTTP status \w+ error \((\d{3})", str(error))  # hf_xet gives the status in its message only
    if cause.refusal is not None or in_xet:
        status = cause.refusal.response.status_code if cause.refusal else int(in_xet[1])
        reason, fix = _REFUSALS.get(status, ("the hub has a fault of its own", "push again later"))
        words = (cause.refusal and cause.refusal.server_message) or first_line(cause.refusal or error)
        return HubError(f"{repo!r} was not pushed: {reason} ({status}: {' '.join(words.split())})", fix=fix)
    if cause.unreachable():
        return HubError(
            f"{repo!r} was not pushed: the hub cannot be reached (or we are offline)",
            fix="check the connection, HF_ENDPOINT and HF_HUB_OFFLINE; what was sent already is not sent again",
        )
    return HubError(f"{repo!r} was not pushed: {first_line(error)}", fix="push again: what was sent already is not sent again")


@contextmanager
def sending_to(repo: str) -> Iterator[None]:
    """Within it, what the hub's library raises becomes a `HubError`, and its progress bars are drawn on terminals only.

    Raises:
        HubError: no answer, or a refusal.
    """
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except MxDError:
        raise
    except Exception as error:  # huggingface_hub, httpx and hf_xet raise two dozen kinds here
        raise writing_error(repo, error) from None
    finally:
        if quiet:
            enable_progress_bars()
