"""What do the bytes of a ggml type mean, and how are they made again?

table         every type that holds weights: number, block, bits a weight; what replaces it in short rows
codec         bytes to structure, structure to bytes, bytes to values, for all of them
levels        types whose weight is a scale times a level, less an offset (_0, _1, _K, IQ4, TQ)
level_bytes   their bytes
vectors       types whose weights are code vectors with signs (IQ1, IQ2, IQ3)
vector_bytes  their bytes
bits          fields of 1, 2, 4 bits and base-3 digits in bytes
parts         shapes and values of a structure, checked
"""
