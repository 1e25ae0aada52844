"""The one exception that means: what was asked for cannot be done as asked, and here is the way out."""


class ConfigurationError(ValueError):
    """Bad input from the user. The command line prints its message without a traceback and exits with 2."""
