"""Prompt to picture."""
