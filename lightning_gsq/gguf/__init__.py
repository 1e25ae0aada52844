"""GGUF files: what lies in them, and how are they made?

types              every ggml type: bytes to codes, scales or code vectors, back, and to values
file               the container, read without trusting it
write              the container, written
blocks             which type holds one of this project's schemes exactly
quantizer          llama.cpp's own quantizers
quantizer_process  the process that they run in
imatrix            importance matrices
metadata           key-values of the Llama family
names              its tensor names
"""
