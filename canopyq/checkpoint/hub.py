"""The folder of a model by its name: one on the disk, or the hub's, in the cache that transformers uses too."""

from __future__ import annotations

import re
from pathlib import Path

from canopyq.checkpoint.files import PICKLES, as_path
from canopyq.errors import CanopyError, one_line, shown

ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# What a model in safetensors consists of. Never code, never pickles, nor the same weights once more in another format.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*"]
OTHERS = ["*/*", "consolidated*"]


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model.

    A folder of that name goes first. Else an id such as ``"HuggingFaceTB/SmolLM2-135M"`` is looked up on the Hugging
    Face hub, and what the cache lacks of it is fetched. Where the hub does not answer, the cache alone is read.

    Args:
        revision: of a model on the hub: a branch, a tag or a commit; None takes ``main``.

    Raises:
        CanopyError: for a name that is neither, a revision of a folder, a model or revision that the hub does not
            have or show, and a hub that cannot be reached while the cache does not have the model.
    """
    folder = as_path(name)
    if folder.exists() or not isinstance(name, str) or not ID.fullmatch(name):
        if revision is not None:
            raise CanopyError(
                f"revision {shown(revision)} is one of a model on the hub, and {shown(str(name))} is none"
            )
        if not folder.exists() and folder.suffix not in PICKLES:  # who opens one says why it is never read
            raise CanopyError(f"{shown(str(name))} is no folder; name one, or a model of the hub such as owner/name")
        return folder
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what = shown(name) if revision is None else f"{shown(name)} at revision {shown(revision)}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=OTHERS))
    except LocalEntryNotFoundError:  # it asked the hub first, once
        raise CanopyError(
            f"{what} is no folder and not in the cache, and the Hugging Face hub cannot be reached; name a folder, or "
            "go online once to fetch it"
        ) from None
    except HfHubHTTPError as error:  # an answer: no such model, or no right to see it
        raise CanopyError(f"the Hugging Face hub does not give {what} ({one_line(error)}); check the name") from None
    except Exception as error:  # whatever else comes between
        raise CanopyError(f"{what} cannot be fetched from the Hugging Face hub ({one_line(error)})") from None
