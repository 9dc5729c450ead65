"""Offloaded tensors, and the modules that use them."""
