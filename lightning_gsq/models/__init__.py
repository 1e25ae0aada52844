"""Any decoder as a chain of blocks.

loading         a model by its address: folder, hub name, GGUF file, file in a package
chain           its blocks, run one at a time
calls           what a block is called with beside the hidden states
survey          what passes between blocks, and whether that is all
passing         the model's own code without its blocks
products        matrix products with a parameter, however they are written
linear_weights  which parameters of a block are linear weights
roles           which of them choose, gate, or feed states
left_out        what stays as it is, and why
probe           the short sequences that show all this
head            its logits from its last hidden states
norms           the parameters of its normalisation layers
standing_in     other functions in the place of its blocks
"""
