"""Learning: everything that touches a data set."""

import time

BEGAN_S = time.monotonic()
"""When this process began to import what trains: a run's ledger begins there."""
