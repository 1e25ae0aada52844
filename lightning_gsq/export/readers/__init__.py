"""Programs that read exported files, to check them.

packages           which are installed
compressed_tensors transformers with compressed-tensors: does it load a model packed, and what it unpacks
llama_cpp          llama.cpp, in a process of its own
mlx                MLX, on the CPU
llama_cpp_process  that process
"""
