"""Measurements against other programs, each one command; see the README."""
