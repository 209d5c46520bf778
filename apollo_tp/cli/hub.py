"""Uploads to the Hugging Face hub, by huggingface_hub's own API, with its failures as sentences."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apollo_tp.checkpoint.publishing import OWN, PublicFile, replaced
from apollo_tp.cli.answers import RefusedError
from apollo_tp.errors import ConfigError


@dataclass(frozen=True)
class Upload:
    """A commit, and the weight files of earlier uploads that it removed."""

    url: str
    removed: list[str]


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError unless ``repo_id`` is OWNER/NAME, which needs no network to see."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID: got {repo_id!r} ({error}), expected OWNER/NAME") from None
    if "/" not in repo_id:
        raise ConfigError(f"REPO_ID: got {repo_id!r}, expected OWNER/NAME, the owner being you or an organization")


def upload(
    folder: Path, files: list[PublicFile], repo_id: str, *, private: bool, revision: str | None, message: str
) -> Upload:
    """Make the repository, unless it is there, and upload ``files`` of ``folder``. Raises RefusedError."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise RefusedError(
            "token: got none, expected one that may write to the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi(token=token, library_name="apollo_tp")
    with _failures(folder, api.endpoint, repo_id, revision):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise RefusedError(
                f"--private: got {repo_id}, which is there and public, expected a private repository or a new name; change "
                "its visibility in its settings, or leave the option out"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        old = replaced(api.list_repo_files(repo_id, revision=revision), files)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(OWN),
            delete_patterns=[glob.escape(name) for name in old] or None,
        )
    return Upload(commit.commit_url, old)


@contextmanager
def _failures(folder: Path, endpoint: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise RefusedError for what the hub, the way to it and the transfer of the files may answer."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise RefusedError(f"--revision: got {revision!r}, which {repo_id} does not have, expected a branch") from None
    except errors.HfHubHTTPError as error:
        raise RefusedError(_explained(error, endpoint, repo_id)) from None
    except errors.OfflineModeIsEnabled:
        raise RefusedError("HF_HUB_OFFLINE: got a value that forbids the network, expected none; unset it") from None
    # ValueError: a model card that the hub refuses; RuntimeError: a transfer that broke
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        if not folder.is_dir():
            raise RefusedError(
                f"{folder}: got a checkpoint that was removed, expected it to stay during its upload; push a newer "
                "one, or raise checkpoint.keep"
            ) from None
        if isinstance(error, (httpx.HTTPError, OSError)):
            raise RefusedError(
                f"{endpoint}: got no answer ({type(error).__name__}: {error}), expected the hub; check the network and "
                "HF_ENDPOINT, then push again: what is there already is not sent again"
            ) from None
        raise RefusedError(
            f"{repo_id}: got {error}, expected an upload that the hub takes; mend that, or push again"
        ) from None


def _explained(error: Exception, endpoint: str, repo_id: str) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None) or f"HTTP status {status}"
    if status == 401:
        return (
            f"token: got one that {endpoint} does not know ({said}), expected a valid one; `hf auth login` makes it so"
        )
    if status == 403:
        return (
            f"{repo_id}: got a refusal ({said}), expected a token that may write there; make one with write access, or "
            "name a repository of your own"
        )
    if status == 404:
        return f"{repo_id}: got no such repository or owner ({said}), expected one that you may write to; see its name"
    return (
        f"{endpoint}: got {status} for {repo_id} ({said}), expected an upload that it takes; mend that, or push again"
    )
