"""Lightning systems: one a file, wiring and no maths."""
