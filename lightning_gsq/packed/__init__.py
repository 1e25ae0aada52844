"""How does a model run whose weights stay packed?

load            reads a native folder into packed modules, also through transformers
registration    makes transformers import that when it loads models
layers          a linear layer and fused experts
salient_linear  a linear layer with salient weights
"""
