"""Policy folders on the hub: fetching one by its repository's name, and uploading one with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dspa.errors import DspaError, InvalidInputError
from dspa.util.files import TensorFolder, write_atomically


def local_folder(source: str | Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or a snapshot of the hub repository of that name: its files that match the patterns.

    Raises:
        InvalidInputError: if there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidInputError(f"no policy at {source}: no such folder, and the hub says: {_reason(error)}") from error


def upload_folder(
    kind: TensorFolder[Any],
    save: Callable[[Path], object],
    card: str,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Uploads what `save` writes into an empty folder, with a card, to a repository that is created if missing. The
    tensors of earlier uploads leave it in the same commit.

    Args:
        kind: of the folder.
        save: writes the policy into the folder it is called with.
        card: Markdown for the repository's README.md.
        repo_id: `user/name`.
        private: whether a new repository is private; None leaves it to the account.
        token: a hub token; None takes the one of `hf auth login`.
        commit_message: of the upload.

    Returns:
        The address of the commit.

    Raises:
        DspaError: if a file cannot be written, or the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with TemporaryDirectory() as folder:
        save(Path(folder))
        write_atomically(Path(folder) / "README.md", card.encode())
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                delete_patterns=kind.patterns,
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise DspaError(f"the policy cannot be uploaded to {repo_id}: {_reason(error)}") from error
    return commit.commit_url


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its name where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
