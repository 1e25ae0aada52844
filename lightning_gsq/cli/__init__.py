"""How do options become objects? The command line on LightningCLI.

entry      arguments in, exit code out; the overview
verbs      the verbs by name
errors     which errors are told in one line
app        the options of each verb, and what it is given
arguments  the command line as people type it
classes    classes by their short names
configs    the recipe without options; what a file may not hold
parser     the parser of a verb
messages   its errors in one line
names      names of options: the nearest, those of other programs
listings   what the parser prints, without the libraries
help       the options that are used first
unusual    what is said of unusual settings
trainers   Trainers from settings
defaults   what every verb shares
"""

from lightning_gsq.cli.entry import main

__all__ = ["main"]
