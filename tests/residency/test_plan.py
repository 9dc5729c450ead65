from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pylomin.errors import PlanError
from pylomin.residency.plan import Plan, PlannedGroup, weight_identity

WEIGHTS = {
    "emb.weight": "float32 [100, 8]",
    "a.weight": "float32 [8, 8]",
    "a.bias": "float32 [8]",
    "b.weight": "float32 [8, 8]",
}
PLAN = Plan(
    weights=WEIGHTS,
    groups=(
        PlannedGroup(("emb.weight",), 3200, False, 800),
        PlannedGroup(("a.weight", "a.bias"), 288, True),
        PlannedGroup(("b.weight",), 256, False),
    ),
    order=(0, 1, 2, 1),
    memory_budget=1400,
    window_bytes=1112,
    peak_bytes=1344,
    elapsed_s=0.25,
    choices={"reading": "mapped: it is cached."},
)


def saved(tmp_path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(PLAN.save(tmp_path / "plan.json").read_text())
    return document


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert PLAN.save(path) == path
    assert Plan.load(path) == PLAN
    assert Plan.load(str(path)).schedule == PLAN.schedule
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_what_it_says() -> None:
    assert PLAN.resident_bytes == 288
    assert PLAN.schedule.residents == {1}
    assert PLAN.schedule.window_bytes == 1112
    assert list(PLAN.uses())[:2] == [("emb.weight",), ("a.weight", "a.bias")]
    assert str(PLAN).splitlines() == [
        "budget          1.4 KiB  for 3.7 KiB of weights",
        "resident          288 B  1 of 3 groups",
        "window          1.1 KiB  for the others",
        "read            3.4 KiB  each cycle, 2 of 4 uses",
        "peak            1.3 KiB  predicted",
        "time             0.25 s  each cycle, predicted",
        "reading     mapped: it is cached.",
    ]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=8))
    groups = draw(
        st.lists(
            st.builds(
                PlannedGroup,
                st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=4).map(tuple),
                st.integers(0, 1 << 40),
                st.booleans(),
                st.none() | st.integers(0, 1 << 40),
            ),
            max_size=6,
        )
        if names
        else st.just([])
    )
    window = draw(st.integers(0, 1 << 40)) + sum(group.size_bytes for group in groups)
    resident = sum(group.size_bytes for group in groups if group.resident)
    return Plan(
        {name: draw(st.sampled_from(["float32 [2]", "int8 []"])) for name in names},
        tuple(groups),
        tuple(draw(st.lists(st.integers(0, len(groups) - 1), max_size=12)) if groups else ()),
        resident + window + draw(st.integers(0, 100)),
        window,
        draw(st.none() | st.integers(0, 1 << 62)),
        draw(st.none() | st.floats(0, allow_nan=False, allow_infinity=False)),
        draw(st.dictionaries(st.sampled_from(["reading", "tiles"]), st.text(st.characters(exclude_categories=["Cs"])))),
    )


@given(plans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plan_round_trips(tmp_path: Path, plan: Plan) -> None:
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert str(plan)


def test_a_plan_of_ten_thousand_groups_is_small(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 10}.block.{i % 10}.weight" for i in range(10_000)]
    plan = Plan(
        dict.fromkeys(names, "bfloat16 [4096, 4096]"),
        tuple(PlannedGroup((name,), 1 << 25, False) for name in names),
        tuple(range(10_000)),
        1 << 26,
        1 << 26,
    )
    path = plan.save(tmp_path / "plan.json")
    assert path.stat().st_size < 2 << 20
    assert Plan.load(path) == plan


def test_the_model_it_is_for() -> None:
    PLAN.check_model(dict(reversed(WEIGHTS.items())))
    with pytest.raises(PlanError) as caught:
        PLAN.check_model({**WEIGHTS, "a.weight": "float16 [8, 8]"})
    assert "another model: 'a.weight' is float16 [8, 8], but float32 [8, 8] in the plan." in str(caught.value)
    with pytest.raises(PlanError, match=r"'c' is float32 \[1\], but not there in the plan"):
        PLAN.check_model({**WEIGHTS, "c": "float32 [1]"})
    with pytest.raises(PlanError, match=r"'a.bias' is not there, but .* and 1 more"):
        PLAN.check_model({})


def test_weight_identity_takes_what_torch_gives() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.empty(2, 3, dtype=torch.bfloat16)
    assert weight_identity(weight.dtype, weight.shape) == "bfloat16 [2, 3]"
    assert weight_identity("int8", ()) == "int8 []"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"memory_budget": 1399}, "needs 288 bytes for what is resident and 1112 for its window.*1399"),
        ({"window_bytes": 799}, "needs 800 bytes; its window has 799"),
        ({"order": (0, 3)}, "beyond its 3 groups"),
        ({"order": (-1,)}, "beyond its 3 groups"),
        ({"weights": {"emb.weight": "", "b.weight": ""}}, "unknown: .*a.weight"),
        ({"groups": (PlannedGroup((), 1, True),), "order": ()}, "has weights"),
    ],
)
def test_parts_that_contradict_each_other(change: dict[str, Any], text: str) -> None:
    fields = {name: getattr(PLAN, name) for name in Plan.__slots__}
    with pytest.raises(PlanError, match=text):
        Plan(**{**fields, **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("format", ["pylomin plan"]),
        ("version", 2),
        ("version", True),
        ("version", 1.0),
        ("version", "1"),
        ("memory_budget", -1),
        ("memory_budget", 1.5),
        ("memory_budget", True),
        ("memory_budget", None),
        ("memory_budget", 10**30),
        ("window_bytes", "1"),
        ("window_bytes", 1 << 62),
        ("peak_bytes", -1),
        ("elapsed_s", -0.5),
        ("elapsed_s", float("nan")),
        ("elapsed_s", float("inf")),
        ("elapsed_s", False),
        ("elapsed_s", "1"),
        ("weights", []),
        ("weights", {"a": 1}),
        ("weights", {}),
        ("groups", {}),
        ("groups", [1]),
        ("groups", [{}]),
        ("groups", [{"weights": [0], "size_bytes": 1, "resident": True, "more": 1}]),
        ("groups", [{"weights": [9], "size_bytes": 1, "resident": True}]),
        ("groups", [{"weights": [-1], "size_bytes": 1, "resident": True}]),
        ("groups", [{"weights": [0, 0], "size_bytes": 1, "resident": True}]),
        ("groups", [{"weights": [], "size_bytes": 1, "resident": True}]),
        ("groups", [{"weights": [0], "size_bytes": 1, "resident": 1}]),
        ("groups", [{"weights": [0], "size_bytes": 1, "resident": True, "streamed_bytes": None}]),
        ("groups", []),
        ("order", "012"),
        ("order", [0.0]),
        ("order", [True]),
        ("order", [3]),
        ("more", 1),
    ],
)
def test_a_field_that_is_wrong(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**saved(tmp_path), field: value}))
    with pytest.raises(PlanError, match=r"plan\.json holds no plan that can be used: .*Save a plan"):
        Plan.load(path)


@pytest.mark.parametrize("field", json.loads('["format","version","memory_budget","weights","groups","order"]'))
def test_a_field_that_is_missing(tmp_path: Path, field: str) -> None:
    document = saved(tmp_path)
    del document[field]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"format": 1, "format": 1}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"format": "pylomin plan", "version": ' + b"9" * 100_000 + b"}",
        b'{"\\ud800": 1}',
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_no_plan_at_all(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.load(path)


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    good, path = tmp_path / "plan.json", tmp_path / "damaged.json"
    if not good.exists():
        PLAN.save(good)
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        plan = Plan.load(path)
    except PlanError:
        return
    assert plan.resident_bytes + plan.window_bytes <= plan.memory_budget


def test_truncated_files(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(PlanError):
            Plan.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    before = path.read_bytes()
    broken = Plan(WEIGHTS, (), (), 0, 0, elapsed_s=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
