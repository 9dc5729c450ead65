"""URLs of remote files: what to ask for, and what may be shown of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from pylomin.errors import StoreFormatError

SCHEMES = ("s3", "https", "http", "hf")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
# Parameters of signed URLs: another signature is no other file.
_SIGNATURE = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|"
    r"sig|se|st|sp|sv|sr|spr|sip|skoid|sktid|skt|ske|sks|skv|token|access_token",
    re.IGNORECASE,
)


def is_url(source: object) -> bool:
    """Is this text with a scheme, and not the path of a file?"""
    return isinstance(source, str) and _URL.match(source) is not None


@dataclass(frozen=True, slots=True)
class Url:
    """A URL of one of :data:`SCHEMES`."""

    text: str = field(repr=False)  # as given: it may hold passwords and signatures, and goes to the server only

    @staticmethod
    def parse(text: str) -> Url:
        match = _URL.match(text)
        url = Url(text if match is None else f"{match[1].lower()}{text[match.end(1) :]}")
        if url.scheme not in SCHEMES:
            raise StoreFormatError(
                f"{url.shown!r} is of scheme {url.scheme!r}; expected one of {', '.join(SCHEMES)}. For a file on this "
                "machine give its path, for others mount or download it."
            )
        return url

    @property
    def scheme(self) -> str:
        return self.text.partition(":")[0]

    @property
    def shown(self) -> str:
        """Without what may be secret: user and password, query, fragment."""
        scheme, _, rest = self._plain.partition("://")
        host, slash, path = rest.partition("/")
        if scheme != "hf":  # where "@" is before a revision
            host = host.rpartition("@")[2]
        return f"{scheme}://{host}{slash}{path}"

    @property
    def identity(self) -> str:
        """What is the same for every URL of the same file; not to be shown."""
        query = urlsplit(self.text).query if self._has_query else ""
        kept = [
            (key, value) for key, value in parse_qsl(query, keep_blank_values=True) if not _SIGNATURE.fullmatch(key)
        ]
        return f"{self.shown}?{urlencode(kept)}" if kept else self.shown

    @property
    def name(self) -> str:
        """What is behind the last slash of the path."""
        return self._plain.partition("://")[2].partition("/")[2].rpartition("/")[2]

    def beside(self, name: str) -> Url:
        """The file ``name`` in the directory that this file is in; the query, which may hold a token, stays.

        ``name`` may lie in a directory below it (:func:`check_inside`).
        """
        return self._with_path(lambda path: path.rpartition("/")[0], name)

    def below(self, name: str) -> Url:
        """The file ``name`` in this directory."""
        return self._with_path(lambda path: path.rstrip("/"), name)

    def _with_path(self, directory_of: Callable[[str], str], name: str) -> Url:
        if not self._has_query:
            return Url(f"{directory_of(self.text)}/{name}")
        parts = urlsplit(self.text)
        return Url(urlunsplit(parts._replace(path=f"{directory_of(parts.path)}/{quote(name)}")))

    @property
    def _has_query(self) -> bool:
        return self.scheme in ("http", "https")  # in keys of S3 and names of the hub, "?" is a letter

    @property
    def _plain(self) -> str:
        return re.split(r"[?#]", self.text, maxsplit=1)[0] if self._has_query else self.text


def check_inside(name: str, source: str) -> None:
    """Raise StoreFormatError unless ``name`` is of a file in the directory of ``source``, which begins the message."""
    parts = name.split("/")
    if not name or name != name.strip() or {"", ".", ".."} & set(parts) or re.search(r"[\\?#:@\x00-\x1f]", name):
        raise StoreFormatError(
            f"{source} points to {name[:1000]!r}: expected the name of a file in its directory, or below it."
        )
