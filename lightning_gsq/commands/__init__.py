"""What does each verb do, from top to bottom?

fit            quantizes a model into a run folder
validate       the perplexity of a model
plan           what fit would take
export         writes a finished run as files for other programs
predict        text from prompts
test           zero-shot tasks
harness        lm-eval
addresses      what other verbs wrote
file_types     what weights have whose types are those of a file
menu           what a size is divided among
sizing         a size becomes widths
sizing_before  the same before there is a run
tables         plans, summaries and ledgers as tables
"""
