"""Prompts to tokens to embeddings."""
