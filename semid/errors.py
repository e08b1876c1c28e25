"""The one error that semid raises for bad input."""


class SemidError(ValueError):
    """Bad input, said in one line: what was expected, what arrived, where, and what to do about it."""
