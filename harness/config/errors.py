"""The one exception that means: the user can mend this."""


class BadInput(ValueError):
    """Bad input, found before anything started; its one line says what to do. Commands end with exit code 2."""
