"""What is a quantized weight?

grid          the codes of one weight, what they are worth, how they are stored
vector_grid   codes that come as vectors of four or eight weights
code_vectors  which vectors there are
salient_part  which weights of a matrix get more bits
layout        how the scales of a matrix are stored: the design of all schemes
presets       schemes that have names
scheme        grid, groups and layout of a matrix, and what is left to choose
assignment    which weights of a model get which scheme
quantized     codes and scales
mixed         codes and scales of a matrix whose salient columns have more bits
element       the same where any weight may be salient
stored        from a file's tensors to either
positions     where salient weights are, packed
packing       codes as words of 32 bits
ledger        where every bit goes
"""
