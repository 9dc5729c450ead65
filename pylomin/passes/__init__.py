"""Passes rewrite a model; one file each."""
