"""Any decoder as a chain of blocks.

loading         a model by its address: folder, hub name, GGUF file, file in a package
chain           its blocks, and what each is called with
linear_weights  which parameters of a block are linear weights
probe           the short sequence that shows all this
head            its logits from its last hidden states
ends            the matrices outside of the blocks: embedding and head
norms           the parameters of its normalisation layers
standing_in     other functions in the place of its blocks
"""
