"""The commands' parser of their options: a mistake is a UserError, one line and status 1, like every other one."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ats.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse would print the usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
