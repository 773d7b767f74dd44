"""Loss functions, pure."""
