"""Errors that end a script in one line."""


class UserError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, where, and what to do."""
