"""The one exception that is the user's to fix."""


class UserError(Exception):
    """Bad input, told to the user in one sentence; the scripts print it and exit with status 2."""
