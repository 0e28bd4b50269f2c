"""The exception for users' mistakes, the "did you mean" of its message, what a command makes of it, a requested end;
numbers with their nouns.

`UserError` is what a wrong key, path, checkpoint or file raises: a command prints its text alone (what, where, what to
type), as it does of a file that cannot be read or written, and exits with status 1. Everything else that escapes is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake the user can mend; the message says what is wrong, where, and what to type."""


class NoSuchSplit(UserError):
    """The folder or the list of a split is not there."""


class Stopped(Exception):
    """The training has been stopped by a signal; its checkpoint is written.

    Attributes:
        status: exit status of a process that ended so: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}; the same command goes on from there")
        self.status = 128 + signum


def exit_status(run: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command. A user's mistake, or a file that cannot be read or written, is one line on stderr and status 1,
    Ctrl-C status 130; with `debug` they are raised.
    """
    try:
        run()
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def counted(number: int, noun: str, plural: str = "") -> str:
    """`"1 epoch"`, `"2 epochs"`; `plural` for a noun that takes no s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def suggest(name: str, options: Iterable[str], *, num: int = 3) -> str:
    """`" Did you mean A or B?"` with the options nearest to `name`, or "" if none is near."""
    options = list(options)
    by_lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), by_lower, n=num, cutoff=0.6)
    if not near:  # a key typed without its section: compare the last parts
        last_parts = {option.lower().rsplit(".", 1)[-1]: option for option in options}
        near = difflib.get_close_matches(name.lower().rsplit(".", 1)[-1], last_parts, n=num, cutoff=0.75)
        by_lower = last_parts
    return f" Did you mean {' or '.join(by_lower[n] for n in near)}?" if near else ""
