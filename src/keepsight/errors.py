"""What other libraries' errors say, for errors of our own."""


def reason(cause: Exception) -> str:
    """The first line of an error's text, or its type where it has none; without a full stop, to be put in brackets."""
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
