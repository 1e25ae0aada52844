"""What is a quantized weight?

scheme     its grid of levels, its groups, which weights get which
quantized  codes and scales
salient    codes and scales of a matrix whose salient weights have more bits
positions  where salient weights are, packed
packing    codes as words of 32 bits
ledger     where every bit goes
"""
