"""Diffusion mathematics; imports torch alone."""
