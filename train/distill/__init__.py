"""Teachers and students: compressing a network, and what the small one learns from the large."""
