"""What does each verb do, from top to bottom?

fit      quantizes a model into a run folder
export   writes a finished run as files for other programs
predict  text from prompts
"""
