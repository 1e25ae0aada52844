"""What happens in which order, and what is on disk?

run             a run as one object
phases          its phases, each with its perplexity; the saved model, the summary
warm_start      the first phase
blocks          the second: the loop over the blocks
block_fit       the fit of one block
matrices        its weights as a quantizer sees them
end_to_end      the third phase
outer_weights   embedding and head, before all of these
perplexity      of the whole model, or block by block
forward_passes  hidden states on their way through the model
hidden_states   where they are kept
block_plan      which weights of which block
substitution    other weights in a model, for a while or for good
folder          the folder of a run
recipe          what makes two runs the same
summary         what a run found
report          its figures and their names
tensorboard     what a run leaves for TensorBoard
"""
