"""How is a tokenizer.json said in a GGUF file?

derive         the rule that a tokenizer is written by, and what all of them have
vocabulary     tokens and their kinds
byte_level     byte-level BPE, with the name of its rule of splitting text
sentencepiece  SentencePiece's BPE and unigram models
"""
