"""Errors meant for the person at the keyboard: each message says what was received and what mends it."""


class SpgddError(Exception):
    """Base class; its message is complete and needs no traceback to be understood."""


class ImageError(SpgddError):
    """A picture that cannot be read or used."""


class WeightsError(SpgddError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class DataError(SpgddError):
    """A folder, table or text file of a data set that cannot be used."""
