"""Files of the Hugging Face hub: where they are, and what they are at one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pylomin.errors import PassError, StoreReadError
from pylomin.remote.transport import ObjectState, Unavailable, error_of_status, without_secrets
from pylomin.remote.urls import Url

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file at one commit."""

    url: Url  # to ask for it by HTTP
    cached_as: Url  # the same for all commits
    state: ObjectState


class Hub:
    """Finds files by huggingface_hub: its configuration, and the token that is logged in with, hold here too.

    All files of a repository are those of the commit that the first one was found at.

    Args:
        options: ``token``, ``endpoint``; others as of ``huggingface_hub.HfFileSystem``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        from huggingface_hub import HfFileSystem
        from huggingface_hub.utils import build_hf_headers

        try:
            self._fs: Any = HfFileSystem(skip_instance_cache=True, **options)
        except TypeError as error:
            raise PassError(f"storage_options do not suit hf://: {error}.") from error
        self._commits: dict[tuple[str, str, str], str] = {}
        self.headers: dict[str, str] = build_hf_headers(token=options.get("token"))

    def find(self, url: Url) -> HubFile:
        """Raises NotThereError, StoreReadError."""
        return _asked(url, lambda: self._find(url))

    def names(self, url: Url) -> list[str]:
        """Of the files in a directory. Raises as :meth:`find`."""
        listed = _asked(url, lambda: self._fs.ls(url.text, detail=True))
        return [entry["name"].rpartition("/")[2] for entry in listed if entry["type"] == "file"]

    def _find(self, url: Url) -> HubFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        place = self._fs.resolve_path(url.text)
        if not hasattr(place, "repo_id"):
            raise StoreReadError(f"{url.shown!r} is no file of a repository; expected hf://OWNER/NAME/FILE.")
        path = place.path_in_repo
        repository = (place.repo_type, place.repo_id, place.revision)

        def address(revision: str) -> str:
            return str(
                hf_hub_url(
                    place.repo_id, path, repo_type=place.repo_type, revision=revision, endpoint=self._fs.endpoint
                )
            )

        asked = address(self._commits.get(repository, place.revision))
        found = get_hf_file_metadata(asked, token=self._fs.token, endpoint=self._fs.endpoint)
        if found.commit_hash is None or found.size is None or not found.etag:
            raise StoreReadError(f"the hub does not say what {url.shown!r} is: commit, size or ETag are missing.")
        commit = self._commits.setdefault(repository, found.commit_hash)
        return HubFile(
            Url(address(commit)),
            Url(f"hf://{place.repo_type}s/{place.repo_id}/{path}"),
            ObjectState(found.size, found.etag),
        )


def _asked(url: Url, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except StoreReadError:
        raise
    except Exception as error:  # of huggingface_hub, and of what it talks by
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", 404 if isinstance(error, FileNotFoundError) else None)
        said = without_secrets(error, url)
    # Outside of the handler: tracebacks and logs would show what the caught error holds.
    if status is None:
        raise StoreReadError(f"{url.shown!r} cannot be asked for: {said}.")
    meaning = error_of_status(status, url, said=said)
    if isinstance(meaning, Unavailable):
        raise StoreReadError(f"{url.shown!r} cannot be asked for now: {said}. Try again later.")
    raise meaning
