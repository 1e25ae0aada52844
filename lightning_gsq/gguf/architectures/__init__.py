"""What does llama.cpp have to be told of a model's architecture, and what can it not compute?

table   one entry an architecture: its name there, its key-values, how its tensors lie in the file
common  what the architectures share
llama   Llama, Mistral, SmolLM3
qwen    Qwen2, Qwen3, Qwen3-MoE
gemma   Gemma, Gemma 2, Gemma 3 (text)
phi     Phi-3 and Phi-4-mini
"""
