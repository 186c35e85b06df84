"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: the message says in one sentence what is wrong and what to do. CLIs print it and exit with 2."""
