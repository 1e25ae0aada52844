"""How do options become objects? The command line on LightningCLI.

app        the commands and what they share
"""

from lightning_gsq.cli.app import main

__all__ = ["main"]
