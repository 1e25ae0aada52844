"""GGUF files: what lies in them, and how are they made?

* ``types/``: every ggml type: its bytes to codes, scales or code vectors, back, and to values.
* ``file``, ``write``: the container, read and written.
* ``blocks``: which type holds one of this project's schemes exactly.
* ``quantizer`` (``quantizer_process``): llama.cpp's own quantizers.
* ``imatrix``: importance matrices.
* ``metadata``, ``names``: key-values and tensor names of the Llama family.
"""
