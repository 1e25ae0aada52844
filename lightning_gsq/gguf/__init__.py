"""GGUF files: what lies in them, and how are they made?

types              every ggml type: bytes to codes, scales or code vectors, back, and to values
file               the container, read without trusting it
write              the container, written
blocks             which type holds one of this project's schemes exactly
quantizer          llama.cpp's own quantizers
quantizer_process  the process that they run in
imatrix            importance matrices
imatrix_dat        their older form
fields             key-values from Python's numbers and texts
metadata           those of a model and its tokenizer
architectures      what llama.cpp wants to know of each architecture
tokenizers         a tokenizer as key-values
names              what parameters are called in a file
rows               in which order the rows of a matrix lie there
layout             where each parameter of a model lies
"""
