"""Benchmarks: one script per question, results as JSON. ``python -m benchmarks.run --list``."""
