"""Bytes of files, and the memory they are read into."""
