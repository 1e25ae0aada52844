"""Any decoder as a chain of blocks.

loading         a model and its tokenizer by an address; what other rooms use of the ten below
address         where it is: folder, hub name, GGUF file, file in a package
config          its configuration, and what that says of a model that cannot be quantized
classes         the class of transformers that loads it, and what is no part of its text decoder
dequantizing    files whose weights are quantized, read as plain numbers
computed_weights  those that are computed on loading, in files where memory is short
replaced        another function in the place of a library's own, for a while
empty           the model without its weights
weight_names    are its weights all in its files, and nothing beside them?
gguf_weights    the same for a GGUF file
gguf_reader     the reader of such files that transformers uses, without its slowness
finite          numbers that are not finite
saving          as an ordinary folder
loader_errors   what other libraries raise meanwhile, as one line
chain           its blocks, run one at a time
calls           what a block is called with beside the hidden states
survey          what passes between blocks, and whether that is all
passing         the model's own code without its blocks
products        matrix products with a parameter, however they are written
recording  what enters weights, and the sums that their outputs become a part of
linear_weights  which parameters of a block are linear weights
output_gradients  gradients at what these give
roles           which of them choose, gate, or feed states
experts         which of them belong to which routed expert
all_experts     every token through every one of these
left_out        what stays as it is, and why
expert_parallel fused experts of a block, each process with its own
shared_weights  weights that blocks share
probe           the short sequences that show all this
head            its logits from its last hidden states
ends            the matrices outside of the blocks: embedding and head
norms           the parameters of its normalisation layers
standing_in     other functions in the place of its blocks
in_turn         blocks that have their weights only while they run
"""
