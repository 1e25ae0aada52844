"""How do options become objects? The command line on LightningCLI.

entry     arguments in, exit code out
app       the verbs, their options, and what each is given
parser    errors of one line
defaults  what every verb shares
"""

from lightning_gsq.cli.entry import main

__all__ = ["main"]
