"""Where offloaded weights live: one file per kind of store, and ``open_store`` in ``open.py``."""
