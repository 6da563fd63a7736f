"""The exception for errors that the user can fix."""


class BadInput(ValueError):
    """Bad input, found before any work starts; its one-line message says what to do. Commands exit with code 2."""
