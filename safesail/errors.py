"""The one exception type that means "the person, not the program, can mend this"."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A problem with what was given: the message says what it was, what is valid and what to type next.

    The command line prints its message as one sentence and exits with status 2; every other exception is a bug and
    keeps its traceback.
    """
