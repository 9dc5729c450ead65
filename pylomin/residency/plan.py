"""What was decided for one model, to look at and to save: a later run need not learn the order of uses."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylomin.errors import PlanError, StoreFormatError
from pylomin.io.sizes import format_bytes
from pylomin.residency.schedule import Schedule
from pylomin.residency.simulation import Group
from pylomin.store.strict_json import parse_object, shorten

FORMAT = "pylomin plan"
VERSION = 1
DIFFERENCES_SHOWN = 3
_FIELDS = {
    "format",
    "version",
    "memory_budget",
    "window_bytes",
    "peak_bytes",
    "elapsed_s",
    "choices",
    "weights",
    "groups",
    "order",
}
_GROUP_FIELDS = {"weights", "size_bytes", "resident"}
_AGAIN = "Save a plan of this model again."


def weight_identity(dtype: object, shape: Iterable[int]) -> str:
    """What a plan remembers of a weight beside its name.

    >>> weight_identity("torch.float32", (768, 3072))
    'float32 [768, 3072]'
    """
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """Weights that are loaded together.

    Args:
        weights: their fully qualified names.
        size_bytes: memory when resident.
        resident: whether they stay in memory; others stream through the window.
        streamed_bytes: memory when streamed, where they are computed tile by tile; default: all.
    """

    weights: tuple[str, ...]
    size_bytes: int
    resident: bool
    streamed_bytes: int | None = None

    @property
    def sizes(self) -> Group:
        """What a schedule is made from."""
        return Group(self.size_bytes, self.streamed_bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which groups of a model's weights stay in memory, which stream, and in which order all are used.

    Args:
        weights: name and :func:`weight_identity` of each weight of the model, by which it is known again.
        groups: what is loaded together.
        order: one cycle of uses, as indices into ``groups``.
        memory_budget: bytes, for residents and window together.
        window_bytes: the part of it that streamed groups pass through.
        peak_bytes: the most that is predicted to be in memory, if it was predicted.
        elapsed_s: predicted time of one cycle, if it was predicted.
        choices: what else was chosen, and why, in words.

    Raises:
        PlanError: the parts contradict each other.
    """

    weights: Mapping[str, str]
    groups: tuple[PlannedGroup, ...]
    order: tuple[int, ...]
    memory_budget: int
    window_bytes: int
    peak_bytes: int | None = None
    elapsed_s: float | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            unknown = [name for name in group.weights if name not in self.weights]
            if unknown or not group.weights:
                raise PlanError(
                    f"A group of the plan has weights {shorten(group.weights)}, unknown: {shorten(unknown)}."
                )
        if any(not 0 <= index < len(self.groups) for index in self.order):
            raise PlanError(f"The order of the plan names a group beyond its {len(self.groups)} groups.")
        if self.resident_bytes + self.window_bytes > self.memory_budget:
            raise PlanError(
                f"The plan needs {self.resident_bytes} bytes for what is resident and {self.window_bytes} for its "
                f"window, but its memory_budget is {self.memory_budget}."
            )
        largest = max((group.sizes.need_bytes for group in self.groups if not group.resident), default=0)
        if largest > self.window_bytes:
            raise PlanError(f"The plan streams a group that needs {largest} bytes; its window has {self.window_bytes}.")

    @property
    def resident_bytes(self) -> int:
        """Memory of all that stays."""
        return sum(group.size_bytes for group in self.groups if group.resident)

    @property
    def schedule(self) -> Schedule:
        """The decisions alone, by indices of groups."""
        residents = frozenset(index for index, group in enumerate(self.groups) if group.resident)
        return Schedule(residents, self.window_bytes, self.elapsed_s)

    def uses(self) -> Iterator[tuple[str, ...]]:
        """The weights of each use of one cycle."""
        return (self.groups[index].weights for index in self.order)

    def check_model(self, weights: Mapping[str, str]) -> None:
        """Is this plan for the model with these weights?

        Args:
            weights: name and :func:`weight_identity` of each.

        Raises:
            PlanError: it is not, naming the first differences.
        """
        if self.weights == weights:
            return
        differences = [
            f"{name!r} is {weights.get(name, 'not there')}, but {self.weights.get(name, 'not there')} in the plan"
            for name in sorted(self.weights.keys() | weights.keys())
            if self.weights.get(name) != weights.get(name)
        ]
        more = len(differences) - DIFFERENCES_SHOWN
        raise PlanError(
            f"The plan was made for another model: {'; '.join(differences[:DIFFERENCES_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. {_AGAIN}"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, beside the target, which is then replaced. Returns the path."""
        place = {name: index for index, name in enumerate(self.weights)}
        groups = []
        for group in self.groups:
            entry: dict[str, Any] = {
                "weights": [place[name] for name in group.weights],
                "size_bytes": group.size_bytes,
                "resident": group.resident,
            }
            if group.streamed_bytes is not None:
                entry["streamed_bytes"] = group.streamed_bytes
            groups.append(entry)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "memory_budget": self.memory_budget,
            "window_bytes": self.window_bytes,
            "peak_bytes": self.peak_bytes,
            "elapsed_s": self.elapsed_s,
            "choices": dict(self.choices),
            "weights": dict(self.weights),
            "groups": groups,
            "order": self.order,
        }
        target = Path(path)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with beside.open("x", encoding="utf-8") as file:
                json.dump(document, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: the file holds something else.
            OSError: it cannot be read.
        """
        raw = Path(path).read_bytes()
        try:
            return _parse(parse_object(raw, "it"))
        except (PlanError, StoreFormatError) as error:
            raise PlanError(f"{os.fspath(path)} holds no plan that can be used: {error} {_AGAIN}") from error

    def __str__(self) -> str:
        resident = sum(group.resident for group in self.groups)
        uses = sum(not self.groups[index].resident for index in self.order)
        read_bytes = sum(self.groups[index].size_bytes for index in self.order if not self.groups[index].resident)
        total_bytes = sum(group.size_bytes for group in self.groups)
        rows = [
            ("budget", format_bytes(self.memory_budget), f"for {format_bytes(total_bytes)} of weights"),
            ("resident", format_bytes(self.resident_bytes), f"{resident} of {len(self.groups)} groups"),
            ("window", format_bytes(self.window_bytes), "for the others"),
            ("read", format_bytes(read_bytes), f"each cycle, {uses} of {len(self.order)} uses"),
        ]
        if self.peak_bytes is not None:
            rows.append(("peak", format_bytes(self.peak_bytes), "predicted"))
        if self.elapsed_s is not None:
            rows.append(("time", f"{self.elapsed_s:.3g} s", "each cycle, predicted"))
        lines = [f"{name:<12}{amount:>11}  {what}" for name, amount, what in rows]
        return "\n".join([*lines, *(f"{name:<12}{choice}" for name, choice in self.choices.items())])


def _parse(document: dict[str, Any]) -> Plan:
    if document.get("format") != FORMAT:
        raise PlanError(f"'format' is {shorten(document.get('format'))}, not {FORMAT!r}.")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise PlanError(f"'version' is {shorten(document.get('version'))}; this pylomin reads version {VERSION}.")
    if document.keys() != _FIELDS:
        raise PlanError(f"its fields are {shorten(sorted(document))}, expected {sorted(_FIELDS)}.")
    weights = document["weights"]
    if not isinstance(weights, dict) or not all(isinstance(identity, str) for identity in weights.values()):
        raise PlanError(f"'weights' is {shorten(weights)}, expected an object from names to dtype and shape.")
    names = list(weights)
    choices = document["choices"]
    if not isinstance(choices, dict) or not all(isinstance(choice, str) for choice in choices.values()):
        raise PlanError(f"'choices' is {shorten(choices)}, expected an object of strings.")
    elapsed_s = document["elapsed_s"]
    if elapsed_s is not None and not (
        isinstance(elapsed_s, (int, float))
        and not isinstance(elapsed_s, bool)
        and math.isfinite(elapsed_s)
        and elapsed_s >= 0
    ):
        raise PlanError(f"'elapsed_s' is {shorten(elapsed_s)}, expected seconds or null.")
    return Plan(
        weights=weights,
        groups=tuple(_parse_group(entry, names) for entry in _list(document["groups"], "groups")),
        order=tuple(_count(index, "order") for index in _list(document["order"], "order")),
        memory_budget=_count(document["memory_budget"], "memory_budget"),
        window_bytes=_count(document["window_bytes"], "window_bytes"),
        peak_bytes=None if document["peak_bytes"] is None else _count(document["peak_bytes"], "peak_bytes"),
        elapsed_s=elapsed_s,
        choices=choices,
    )


def _parse_group(entry: object, names: list[str]) -> PlannedGroup:
    if not isinstance(entry, dict) or entry.keys() - {"streamed_bytes"} != _GROUP_FIELDS:
        raise PlanError(f"a group is {shorten(entry)}, expected an object with {sorted(_GROUP_FIELDS)}.")
    places = [_count(place, "weights") for place in _list(entry["weights"], "weights")]
    if any(place >= len(names) for place in places) or len(set(places)) < len(places):
        raise PlanError(f"a group has weights {shorten(places)}, expected distinct places among {len(names)} weights.")
    if not isinstance(entry["resident"], bool):
        raise PlanError(f"'resident' is {shorten(entry['resident'])}, expected true or false.")
    return PlannedGroup(
        tuple(names[place] for place in places),
        _count(entry["size_bytes"], "size_bytes"),
        entry["resident"],
        _count(entry["streamed_bytes"], "streamed_bytes") if "streamed_bytes" in entry else None,
    )


def _list(value: object, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{field!r} is {shorten(value)}, expected a list.")
    return value


def _count(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{field!r} has {shorten(value)}, expected an integer that is not negative.")
    return value
