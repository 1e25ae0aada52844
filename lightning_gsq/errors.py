"""The one exception that means: what was asked for cannot be done as asked, and here is the way out."""


class ConfigurationError(ValueError):
    """Bad input from the user. The command line prints its message without a traceback and exits with 2."""


class WorkFailedError(RuntimeError):
    """Work that was begun could not be finished. The command line prints its message alone and exits with 1."""
