"""Codecs for compact weights: pure functions from tensors to tensors. Nothing here opens a file."""
