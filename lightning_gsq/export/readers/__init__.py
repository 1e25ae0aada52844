"""Programs that read exported files, to check them.

packages           which are installed
llama_cpp          llama.cpp, in a process of its own
mlx                MLX, on the CPU
llama_cpp_process  that process
"""
