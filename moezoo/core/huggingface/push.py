"""Upload of an exported folder to a repository of the Hugging Face Hub, with the token of `hf auth login`."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from moezoo.core.errors import CheckpointError, MoezooError
from moezoo.core.extras import check_installed

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOGIN = "Run `hf auth login` with a token that may write"


def check_push(repository: str) -> None:
    """Check, before an export, that there are a token and a network.

    Raises CheckpointError: no token, one that the hub refuses, no network, or a name that is not ORG/NAME. Raises
    PackageError: huggingface_hub is not installed.
    """
    if _NAME.fullmatch(repository) is None:
        raise CheckpointError(f"--push is {repository!r:.80}; expected ORG/NAME, for instance my-name/owls.")
    check_installed("huggingface_hub", purpose="--push")
    import huggingface_hub

    with _readable_errors(repository):
        if huggingface_hub.get_token() is None:
            raise CheckpointError(f"--push {repository} needs a token of the hub, and there is none here. {_LOGIN}.")
        huggingface_hub.HfApi().whoami()


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder as one commit, and return the address of the repository, which is created if it is not there.

    A new repository is private, or public if asked for. An existing one keeps its other files.

    Raises what `check_push` raises; CheckpointError: the repository is public and `public` is False, or the hub refuses
    the upload. The folder stays as it is.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _readable_errors(repository, f" {folder} is complete: `hf upload {repository} {folder}` uploads it."):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise CheckpointError(
                f"--push {repository} is a public repository, and nothing was uploaded. Add --public, or use another "
                f"name. {folder} is complete."
            )
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by moezoo")
    return str(url)


@contextlib.contextmanager
def _readable_errors(repository: str, advice: str = "") -> Iterator[None]:
    """Convert any error of the hub or the network into a CheckpointError of one line, which ends with `advice`."""
    from huggingface_hub import constants, errors

    try:
        yield
        return
    except MoezooError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = f"the hub refuses the token (status {status}). {_LOGIN} to {repository}."
        else:
            reason = f"{' '.join(str(error).split())[:200]} (status {status})."
    except Exception as error:  # network errors have no documented class in huggingface_hub
        reason = f"the hub cannot be reached ({type(error).__name__}). Connect to a network."
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set. Unset it."
    raise CheckpointError(f"cannot push to {repository}: {reason}{advice}")
