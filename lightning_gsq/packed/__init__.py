"""How does a model run whose weights stay packed?

load            reads a native folder into packed modules, also through transformers
layers          a linear layer and fused experts
salient_linear  a linear layer with salient weights
"""
