"""What the command line tells in one line."""


class ConfigurationError(ValueError):
    """Bad input from the user. The command line prints its message without a traceback and exits with 2."""


class WorkFailedError(RuntimeError):
    """Work that was begun could not be finished. The command line prints its message alone and exits with 1."""


class ProcessLostError(RuntimeError):
    """Another process of the same run has ended. The command line prints the message alone and exits with 1."""
