from __future__ import annotations

from pathlib import Path

import pytest

from tests.io.common import CONTENT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    return path
