"""Any decoder as a chain of blocks.

loading         a model and its tokenizer by an address; what other rooms use of the eight below
address         where it is: folder, hub name, GGUF file, file in a package
config          its configuration, and what that says of a model that cannot be quantized
empty           the model without its weights
weight_names    are its weights all in its files, and nothing beside them?
gguf_weights    the same for a GGUF file
finite          numbers that are not finite, in weights and activations
saving          as an ordinary folder
loader_errors   what other libraries raise meanwhile, as one line
chain           its blocks, and what each is called with
linear_weights  which parameters of a block are linear weights
probe           the short sequence that shows all this
shared_weights  weights that blocks share
head            its logits from its last hidden states
norms           the parameters of its normalisation layers
standing_in     other functions in the place of its blocks
"""
