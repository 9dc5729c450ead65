"""For tests and doctests alike: they need no network, and nothing of them looks for one."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
