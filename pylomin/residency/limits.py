"""Sizes in bytes, where most of the package looks for them; the layers below this one need them too."""

from pylomin.io.sizes import format_bytes, parse_bytes

__all__ = ["format_bytes", "parse_bytes"]
