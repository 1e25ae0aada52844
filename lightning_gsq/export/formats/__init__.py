"""One file a format.

base                what a format is, and the list of all
native              this package's own, packed
dequantized         an ordinary Hugging Face folder
gguf, gguf_check    llama.cpp
compressed_tensors  vLLM and transformers
gptq                GPTQModel and what reads its files
"""
