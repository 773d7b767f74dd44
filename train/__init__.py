"""Learning: everything that touches a data set."""
