"""The one exception that is meant for the person at the keyboard."""


class InputError(ValueError):
    """A bad input. The message is one sentence: what, which value, what was expected, what to do."""
