"""``apollo-tp push``: a checkpoint as a model on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from msgspec import to_builtins

from apollo_tp.cli import rendering
from apollo_tp.cli.answers import Checkpoint, Push, PushedFile, RefusedError, UnreachableError, read
from apollo_tp.cli.session import OK, Session
from apollo_tp.errors import CheckpointError, ConfigError

ARGUMENT = "NAME_OR_FOLDER"


def push(
    session: Session,
    checkpoint: Annotated[str, typer.Argument(metavar=ARGUMENT, help="A checkpoint; see `checkpoints`.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Refuse a repository that others can read.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, made if it is not there.", show_default="main")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="names the checkpoint")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; needs no network.")] = False,
) -> int:
    """Upload a checkpoint to the Hugging Face hub, without optimizer state.

    The token is that of `hf auth login`, or $HF_TOKEN.
    """
    from apollo_tp.checkpoint.publishing import public_files
    from apollo_tp.cli import hub  # huggingface_hub takes longer to import than a help text to show

    hub.check_repo_id(repo_id)
    folder = _folder(session, checkpoint)
    try:
        files = public_files(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    listed = [PushedFile(file.path, file.bytes) for file in files]
    answer = Push(str(folder), repo_id, revision or "main", listed, sum(file.bytes for file in files))
    if not dry_run:
        done = hub.upload(
            folder, files, repo_id, private=private, revision=revision, message=message or f"Upload {folder.name}"
        )
        answer.url, answer.removed = done.url, done.removed
    session.show(to_builtins(answer), Push, rendering.show_push)
    return OK


def _folder(session: Session, checkpoint: str) -> Path:
    """The folder of this path, or of the coordinator's checkpoint of this name. Links are followed now, since ``latest``
    moves on."""
    if (path := Path(checkpoint)).is_dir():
        return path.resolve()
    if "/" in checkpoint:
        raise ConfigError(f"{ARGUMENT}: got {checkpoint!r}, where no folder is, expected the folder of a checkpoint")
    try:
        found = read(session.client.call("GET", f"/checkpoint/{quote(checkpoint, safe='')}"), Checkpoint)
    except UnreachableError as error:
        raise UnreachableError(
            f"{ARGUMENT}: got {checkpoint!r}, which is no folder here; as for a checkpoint of that name, {error}, or give "
            "its folder"
        ) from None
    if found.state != "succeeded" or found.path is None:
        raise RefusedError(
            f"{ARGUMENT}: got {checkpoint!r}, which is {found.state} and has {'a' if found.path else 'no'} folder, expected "
            "a checkpoint that was written to disk; see `apollo-tp checkpoints`"
        )
    if not (path := Path(found.path)).is_dir():
        raise RefusedError(
            f"{ARGUMENT}: got {checkpoint!r}, whose folder {path} is not here, expected it on this machine; run this where "
            "it is, or push a newer one if it was removed"
        )
    return path.resolve()
