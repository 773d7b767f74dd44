"""Measurement: pictures in, numbers out."""
