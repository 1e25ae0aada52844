"""GGUF files: block types, the container, names and key-values of the Llama family."""
