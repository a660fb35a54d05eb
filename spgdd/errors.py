"""Errors meant for the person at the keyboard: each message says what was received and what mends it."""


class SpgddError(Exception):
    """Base class; its message is complete and needs no traceback to be understood. Each argument is a line of it."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class ImageError(SpgddError):
    """A picture that cannot be read or used."""


class WeightsError(SpgddError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class DataError(SpgddError):
    """A folder, table or text file of a data set that cannot be used."""


def printable(text: str) -> str:
    """The text as one line: what would steer a terminal, or is no Unicode, as file names may hold it, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
