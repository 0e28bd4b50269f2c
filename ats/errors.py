"""Errors, and how a command reports them.

`UserError` means that the user can fix the problem: a wrong key, path, checkpoint or file. A command prints its message
(what is wrong, where, and what to type) and exits with status 1; it treats an `OSError` the same way. Any other
exception that escapes is our bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

logger = logging.getLogger(__name__)

# Control characters, line and paragraph separators, marks that reverse the direction of text, and surrogates, which
# stand for bytes that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# Signals by which schedulers and terminals stop a run: SLURM, submitit and SGE may send SIGUSR1 or SIGUSR2, LSF and CPU
# time limits SIGXCPU, a closed terminal SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class UserError(ValueError):
    """A mistake that the user can fix. The message says what is wrong, where, and what to type."""


class NoSuchSplit(UserError):
    """The folder or list of a split does not exist."""


class Stopped(BaseException):
    """A signal stopped the training after it saved a checkpoint.

    A BaseException like KeyboardInterrupt: it can be raised anywhere, and handlers of bad files must not catch it.

    Attributes:
        status: the process's exit status, 128 + the signal: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}; run the same command to resume")
        self.status = 128 + signum


def exit_status(
    run: Callable[[], object], *, debug: bool = False, prefix: str = "", interrupted: str = "interrupted"
) -> int:
    """Run a command and return its exit status.

    A `UserError` or `OSError` prints one line to stderr and gives 1; Ctrl-C prints `interrupted` and gives 130. With
    `debug` they are raised. `Stopped` gives its own status. If nobody reads stdout any more (`| head`), it quietly
    gives 141, like a process killed by SIGPIPE.

    Args:
        prefix: put before the error; names the process if there are several.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, e.g. by `2>&-`; progress bars and logs would still write to it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stays open as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):  # like stderr: file names may have characters it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run()
        flush_stdout()
    except BrokenPipeError as error:
        logger.debug("error: %s", error)
        _give_up_broken_stdout()
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        _give_up_broken_stdout()
        if debug:
            raise
        logger.debug("error: %s", error)  # for log.txt
        print(f"{prefix}error: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print(interrupted, file=sys.stderr)
        return 130
    except Stopped as stop:
        logger.info("%s", stop)
        return stop.status
    return 0


@contextmanager
def needing(package: str, *, what: str) -> Iterator[None]:
    """Wrap the import of an optional package: if it is missing, raise a UserError that says `what` needs it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} {package}, which is not installed: pip install {package}") from error


def flush_stdout() -> None:
    """Flush now, so that a failed write is the command's error and not the interpreter's at exit."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _give_up_broken_stdout() -> None:
    """If stdout cannot be flushed, keep the interpreter from trying again at exit."""
    try:
        flush_stdout()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(value: object) -> str:
    """`value` for a message: on one line, truncated if long."""
    if isinstance(value, str) and 0 < len(value) <= _SHORT.maxstring and value.isprintable() and value == value.strip():
        return value
    return quoted(value)


def quoted(value: object) -> str:
    """The `repr` of `value`, truncated if long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return "a number of thousands of digits"


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 16
_SHORT.maxstring = _SHORT.maxother = 250


def environment_number(name: str, default: int) -> int:
    """The whole number in an environment variable, `default` if it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if not re.fullmatch("[0-9]*", text, re.ASCII):
        raise UserError(f"The environment variable {name} is {shown(text)}, not a number. Type unset {name} first.")
    return int(text or default)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`"1 epoch"`, `"2 epochs"`; give `plural` for irregular nouns."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def rounded(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits, never in scientific notation if large: 0.04543, 4.608, 13150."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def printable(name: str) -> str:
    """A file name or other untrusted text, for messages: escapes characters that could clear the terminal, fake a log
    line, or not be encoded as UTF-8.
    """
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], name)


def printable_lines(text: str) -> str:
    """`printable` for a message of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def suggest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean A or B?"`, with the options closest to `name`; "" if none is close."""
    options = list(options)
    by_lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.6)
    if not near:  # a key typed without its section: compare the last parts
        by_lower = {option.lower().rsplit(".", 1)[-1]: option for option in options}
        near = difflib.get_close_matches(name.lower().rsplit(".", 1)[-1], by_lower, cutoff=0.75)
    return f" Did you mean {' or '.join(by_lower[n] for n in near)}?" if near else ""
