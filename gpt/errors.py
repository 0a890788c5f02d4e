"""The one exception that is the user's to fix, and how it shows what came."""

import reprlib


class UserError(Exception):
    """Bad input, told to the user in one sentence; the scripts print it and exit with status 2."""


class MissingLibraryError(UserError):
    """An optional library is not installed: nothing is wrong with what needs it."""

    def __init__(self, what: str, library: str, extra: str):
        super().__init__(f"{what} needs the {library} library, which is not installed: pip install -e '.[{extra}]'")


def shown(value: object) -> str:
    """`value` as Python writes it, in a few words whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits, though it reads them as hexadecimal
        return "an integer of thousands of digits"
