"""``push``: puts a converted model or an adapter on the hub, after searching it for what should not be published.

Only files that are known to belong to the model are sent, in one commit: the repository gets all of them or none.
"""

import warnings
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.table import Table

from mxdsurgery.base.hub import LOG_IN, sending_to
from mxdsurgery.checkpoint.converted import PLAN_FILE
from mxdsurgery.checkpoint.readme import CARD
from mxdsurgery.disclosure import secrets_here
from mxdsurgery.errors import HubError, PushError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.sharing.contents import Upload, belongs, check_disclosures, pack, written_by_people
from mxdsurgery.terminal.console import Reporter, size


@guarded
def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    redact: bool = False,
    include_experts: bool = False,
    token: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Uploads a converted model or an adapter with its card; nothing is made on the hub before all of it was searched.

    The repository then holds the model as it is in the folder: the same commit removes files of an earlier push that are no
    longer part of it. If the card has no licence and the hub knows the base model's, that goes into the card that is sent.

    Args:
        folder: what ``convert``, ``edit`` or ``heal`` wrote, a checkpoint or an adapter; it is left as it is.
        repo: ``user/name``; made if it does not exist.
        private: only you may see it; an existing repository that others can see is then refused.
        revision: branch to write to, made if it is not there; default: ``main``.
        message: of the commit.
        redact: send copies in which local paths are cut down to their last component. Secrets are refused all the same.
        include_experts: send the catalogue of ``experts`` too; it holds the text that the experts were observed on.
        token: for the hub; default: the one of ``hf auth login`` or HF_TOKEN.
        reporter: where progress is reported; default: nowhere.

    Returns:
        ``repo``, ``url``, ``commit`` (its hash), ``private``, ``files`` (name and ``bytes`` of each), ``bytes`` in all,
        ``redacted``, ``left_out`` and ``removed`` (names), and ``license`` (None where none was passed on).

    Raises:
        NotConvertedError: the folder is not one of ours.
        WeightsError: its weights are incomplete or cannot be read.
        PushError: other files are missing, something in them should not be published, or the repository is another model's.
        HubError: there is no token, the hub cannot be reached or it refuses.
    """
    reporter = reporter or Reporter()
    _check_name(repo)
    upload = pack(folder, redact=redact, include_experts=include_experts)
    with sending_to(repo):
        token = token or get_token()
    check_disclosures(upload, secrets_here(token), redact)
    reporter.say(f"checked    {len(upload.contents)} files: no secret, no local path")
    if upload.left_out:
        reporter.say(f"left out   {', '.join(upload.left_out)}")
    if token is None:
        raise HubError("there is no token to push with", fix=LOG_IN)
    api = HfApi(token=token)
    with sending_to(repo):
        passed_on = _pass_license_on(api, upload)
        is_private, removed = _prepare(api, repo, private, revision, upload)
        additions = [CommitOperationAdd(name, content) for name, content in upload.contents.items()]
        files = [{"name": addition.path_in_repo, "bytes": addition.upload_info.size} for addition in additions]
        total = sum(file["bytes"] for file in files)
        reporter.say(f"sending    {size(total)} to {repo}, {'private' if is_private else 'public'}")
        with warnings.catch_warnings():  # the hub's client warns that Parquet belongs in data sets
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            commit = api.create_commit(
                repo,
                [*additions, *(CommitOperationDelete(name) for name in removed)],
                commit_message=message or "Upload with mxdsurgery",
                revision=revision,
            )
    return {
        "repo": repo,
        "url": f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""),
        "commit": commit.oid,
        "private": is_private,
        "files": files,
        "bytes": total,
        "redacted": upload.redacted,
        "left_out": upload.left_out,
        "removed": removed,
        "license": passed_on,
    }


def push_table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    table = Table("file", "", title=f"{result['repo']}, {'private' if result['private'] else 'public'}")
    table.add_column("size", justify="right")
    for file in result["files"]:
        table.add_row(file["name"], "paths cut" if file["name"] in result["redacted"] else "", size(file["bytes"]))
    for name in result["removed"]:
        table.add_row(name, "taken out")
    table.add_section()
    table.add_row(f"{len(result['files'])} files", "", size(result["bytes"]))
    return table


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no name of a repository: {first_line(error)}", expected="user/name") from None
    if repo.count("/") != 1:
        raise PushError(f"{repo!r} does not say whose repository it is", expected="user/name")


def _pass_license_on(api: HfApi, upload: Upload) -> str | None:
    """Puts the base model's licence into the card that is sent, if the card names none and the hub knows it."""
    given = upload.contents[CARD]
    assert isinstance(given, bytes)
    try:
        card = ModelCard(given.decode("utf-8"), ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise PushError(f"the header of {CARD} cannot be read: {first_line(error)}", fix="mend it by hand") from None
    base = card.data.base_model
    if not isinstance(base, str) or card.data.license:
        return None
    try:
        terms = api.model_info(base).card_data
    except (RepositoryNotFoundError, HFValidationError):  # no longer there, or not a name on the hub
        return None
    if terms is None or not isinstance(terms.license, str):
        return None
    link = terms.license_link
    card.data.license, card.data.license_name = terms.license, terms.license_name
    card.data.license_link = f"{api.endpoint}/{base}/blob/main/{link}" if link and "://" not in link else link
    upload.contents[CARD] = str(card).encode("utf-8")
    return terms.license


def _prepare(api: HfApi, repo: str, private: bool, revision: str | None, upload: Upload) -> tuple[bool, list[str]]:
    """Makes the repository and the branch, if necessary.

    Returns:
        Whether it is private, and the files of an earlier push that are no longer part of the model.
    """
    api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the organisation has it
    is_private = bool(api.model_info(repo).private)
    if private and not is_private:
        raise PushError(
            f"{repo!r} is there already, and everyone sees it",
            expected="a private repository, or a new one",
            fix="make it private in its settings, or push under another name",
        )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    there = [name for name in api.list_repo_files(repo, revision=revision) if not written_by_people(name)]
    if there and PLAN_FILE not in there:
        raise PushError(
            f"{repo!r} holds something that mxdsurgery did not push: {', '.join(there[:3])}",
            expected="a new repository, or one that was pushed before",
            fix="push under another name",
        )
    return is_private, [name for name in there if name not in upload.contents and belongs(name)]
