"""Command lines whose errors are one line that names what was meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NoReturn

from cascade.config import nearest
from cascade.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised.

    Subparsers are of the same class.
    """

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see --help")


def parse_all(parser: Parser, argv: Sequence[str], *, stray: str = "") -> argparse.Namespace:
    """Parse a command line that holds nothing else.

    Args:
        parser: The parser.
        argv: The arguments.
        stray: What to do about a word that belongs to no option.

    Raises:
        UserError: For what the parser does not know, naming the nearest option.
    """
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=", 1)[0]
        is_option = name.startswith("-")
        guess = nearest(name, _flags(parser)) if is_option else None
        hint = f"did you mean {guess}? " if guess else "" if is_option else stray
        raise UserError(f"unknown argument {name!r}: {hint}see --help")
    return options


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _flags(command)
