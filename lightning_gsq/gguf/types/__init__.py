"""What do the bytes of a ggml type mean, and how are they made again?

* ``table``: every type that holds weights, its number, its block, its bits a weight; what replaces it in short rows.
* ``bits``: fields of 1, 2, 4 bits and base-3 digits in bytes.
* ``levels``: types whose weight is a scale times a level, less an offset (``_0``, ``_1``, ``_K``, ``IQ4``, ``TQ``).
* ``vectors``: types whose weights are code vectors with signs (``IQ1``, ``IQ2``, ``IQ3``).
* ``codec``: bytes to structure, structure to bytes, bytes to values, for all of them.
"""
