"""The exceptions that are meant for the person at the keyboard."""


class InputError(ValueError):
    """A bad input. The message is one sentence: what, which value, what was expected, what to do."""


class DataError(InputError):
    """An image, or what holds the images, that cannot be read."""


def single_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
