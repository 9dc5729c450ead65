"""Offloaded tensors, and the modules that use them."""

from pylomin.lazy import partial as _partial  # noqa: F401  # registers the operators that need only some rows
