"""Weights on disk: our files and the rename tables of the published ones."""
