"""Errors that a user can cause with data; kept apart so that every layer can raise them."""


class DataError(ValueError):
    """A row, file or image is not usable. The message names file, row, value and what was expected."""
