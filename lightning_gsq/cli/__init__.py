"""How do options become objects? The command line on LightningCLI.

entry     arguments in, exit code out
errors    which errors are told in one line
verbs     the verbs by name
app       their options, and what each is given
parser    errors of one line
defaults  what every verb shares
"""

from lightning_gsq.cli.entry import main

__all__ = ["main"]
