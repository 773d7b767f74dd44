"""Lightning callbacks shared by all runs."""
