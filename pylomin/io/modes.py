"""In which of three ways bytes of a file come into memory, and which of them suits."""

from __future__ import annotations

from typing import Literal, NamedTuple

Mode = Literal["mapped", "buffered", "direct"]

CACHED = 0.9  # of the file: less, and the disk decides the speed


class Choice(NamedTuple):
    """A reading mode."""

    mode: Mode
    drop_cache: bool  # after buffered reads, so that the page cache stays as it was
    why: str  # one sentence


def choose_mode(
    requested: Mode | None,
    *,
    cached_fraction: float | None,
    streamed_bytes: int,
    other_bytes: int = 0,
    available_bytes: int | None,
    limit_bytes: int | None,
    direct_refused: str | None,
    aligned: bool,
) -> Choice:
    """The reading mode for the weights of one file.

    Args:
        requested: what the user asked for; is done where it can be.
        cached_fraction: how much of the streamed bytes is in the page cache; None for unknown.
        streamed_bytes: what each pass reads of the file.
        other_bytes: what else will be needed beside that, such as residents and activations.
        available_bytes: memory that can still be had, the page cache's own included; None for unknown.
        limit_bytes: of the container; its page cache counts too. None for no limit.
        direct_refused: why the file system has no direct reads, or None.
        aligned: can the weights be used where they lie in the file?
    """
    room = _room(cached_fraction or 0.0, streamed_bytes, other_bytes, available_bytes, limit_bytes)
    if requested is not None:
        if requested == "direct" and direct_refused is not None:
            return Choice("buffered", True, f"direct was asked for, but {direct_refused}.")
        return Choice(requested, requested == "buffered" and not room, f"{requested} was asked for.")
    if not room:
        tight = "memory is too small to keep the file cached beside what else is needed"
        if direct_refused is None:
            return Choice("direct", False, f"{tight}.")
        return Choice("buffered", True, f"{tight}, and {direct_refused}.")
    if cached_fraction is None:
        return Choice(
            "buffered", False, "the system does not say whether the file is cached, and there is room for it."
        )
    if cached_fraction < CACHED:
        # A mapping brings it there in the largest pages that the system has, which are the quickest to map again.
        cold = f"only {cached_fraction:.0%} of the file is cached, and there is room for all of it: what is read stays."
        return Choice("mapped" if aligned else "buffered", False, cold)
    if aligned:
        return Choice("mapped", False, "the file is cached, and there is room for it to stay so.")
    return Choice("buffered", False, "the file is cached, but its weights are not aligned to be used in place.")


def _room(
    cached: float, streamed_bytes: int, other_bytes: int, available_bytes: int | None, limit_bytes: int | None
) -> bool:
    """Can the file's pages be in memory beside what else is needed? Those that are cached are there already."""
    new_bytes = round(streamed_bytes * (1 - cached)) + other_bytes
    return (available_bytes is None or new_bytes <= available_bytes) and (
        limit_bytes is None or streamed_bytes + other_bytes <= limit_bytes
    )
