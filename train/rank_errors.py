"""What one rank alone meets, told to all: the others must not wait for it in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cascade.errors import UserError, describe_os_error


class RankErrors:
    """Keeps an error of work that one rank does for all, until all ranks can end together.

    Raised at once, it would end the first rank while the others wait in a collective operation
    for as long as the process group's time limit.
    """

    def __init__(self) -> None:
        """Begin without an error, and alone."""
        self.world = 1
        self.message: str | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run work of one rank: alone, its errors are raised; among several, they are kept."""
        try:
            yield
        except (UserError, OSError) as error:
            if self.world == 1:
                raise
            described = describe_os_error(error) if isinstance(error, OSError) else None
            self.message = described or str(error)

    def raise_for_all(self) -> None:
        """End this rank because some rank has an error.

        Raises:
            UserError: Always: its own error, or that another has one.
        """
        raise UserError(self.message or "another rank had an error and has told it")
