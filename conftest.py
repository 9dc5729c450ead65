"""For tests and doctests alike."""

from __future__ import annotations

import gc

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests on a GPU are collected everywhere, and run where there is one."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _models_from_before_do_not_count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is that of all models in the process; a model that another test left alive is none of this one's."""
    if request.node.path.name not in ("measure.py", "test_measure.py"):
        return
    from pylomin import measure

    gc.collect()
    count = measure.resident_bytes_of_all
    before = count()
    monkeypatch.setattr(measure, "resident_bytes_of_all", lambda: count() - before)
