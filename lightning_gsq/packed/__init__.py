"""How does a model run whose weights stay packed?

load                    reads a native folder into packed modules, also through transformers
registration            makes transformers import that when it loads models
transformers_quantizer  what transformers calls meanwhile
exchange                packed modules in the place of a model's own
config                  the layout of each packed weight, as config.json has it
layers                  a linear layer and fused experts
embedding               an embedding, and a head that is tied to it
expert_products         fused experts over tokens sorted by expert
own_experts             the same of classes that leave no choice how they are run
salient_linear          a linear layer with salient weights
"""
