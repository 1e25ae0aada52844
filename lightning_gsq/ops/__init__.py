"""Hot loops: in each folder ``reference.py`` is the specification, the rest is fast.

gumbel_softmax     a sampled weight from logits and scales
distillation       the divergence of two models' logits, from hidden states
packed_linear      a product with packed codes
scaled_codes       a dense weight from codes and scales
rounded_positions  a dense weight from positions that are rounded to codes
"""
