from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.remote.transport import parse_content_range, without_secrets
from pylomin.remote.urls import Url, check_inside, is_url


@pytest.mark.parametrize(
    ("text", "shown", "name"),
    [
        ("https://host/a/b.safetensors", "https://host/a/b.safetensors", "b.safetensors"),
        ("HTTPS://u:p@host:8/a?q=1#f", "https://host:8/a", "a"),
        ("https://u@host", "https://host", ""),
        ("s3://bucket/key with ?/x#1", "s3://bucket/key with ?/x#1", "x#1"),
        ("s3://key:secret@bucket/x", "s3://bucket/x", "x"),
        ("hf://owner/name@main/x.gguf", "hf://owner/name@main/x.gguf", "x.gguf"),
    ],
)
def test_what_is_shown(text, shown, name):
    url = Url.parse(text)
    assert (url.shown, url.name) == (shown, name)
    assert "secret" not in repr(url)
    assert ":p@" not in repr(url)


def test_what_is_a_url():
    assert is_url("https://x")
    assert is_url("S3://x/y")
    for other in ("/a/b", "a.safetensors", "c:\\x", "", None, 3, "https:/x"):
        assert not is_url(other)


def test_files_beside_and_below():
    index = Url.parse("https://u:p@host/a/index.json?token=1")
    assert index.beside("b c/d.safetensors").text == "https://u:p@host/a/b%20c/d.safetensors?token=1"
    assert Url.parse("s3://b/k/index.json").beside("x/y.st").text == "s3://b/k/x/y.st"
    assert Url.parse("s3://b/k").below("y.st").text == "s3://b/k/y.st"
    assert Url.parse("hf://o/n").below("y.st").text == "hf://o/n/y.st"
    assert Url.parse("https://h/d/?t=1").below("y.st").text == "https://h/d/y.st?t=1"


def test_identity():
    def identity(query: str) -> str:
        return Url.parse(f"https://u:p@host/a{query}").identity

    assert identity("?X-Amz-Signature=1&X-Amz-Date=2") == identity("") == "https://host/a"
    assert identity("?file=1&sig=x") == identity("?file=1&sig=y") != identity("?file=2&sig=x")


@given(st.text(max_size=30))
def test_names_that_are_let_pass_stay_inside(name):
    try:
        check_inside(name, "index")
    except StoreFormatError:
        return
    beside = Url.parse("https://host/a/b/index.json").beside(name)
    assert beside.shown.startswith("https://host/a/b/")
    assert "/../" not in f"{beside.shown}/"


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_content_ranges(start, length, more):
    url = Url.parse("https://host/a")
    stop, size = start + length, start + length + more
    assert parse_content_range(f"bytes {start}-{stop - 1}/{size}", url) == (start, stop, size)


@given(st.text(max_size=20))
def test_other_content_ranges_are_errors(text):
    with pytest.raises(StoreReadError, match="Content-Range"):
        parse_content_range(f"x{text}", Url.parse("https://host/a"))


def test_errors_of_libraries_lose_their_urls():
    url = Url.parse("https://u:hunter2@host/a?t=s3cr3t")
    error = OSError("cannot reach https://u:hunter2@host:443/a?t=s3cr3t now")
    assert without_secrets(error, url) == "OSError: cannot reach <https://host/a> now"
    assert without_secrets(ValueError(), url) == "ValueError"
