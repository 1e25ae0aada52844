"""What happens in which order, and what is on disk?

block_plan     which weights of which block
blocks         the phases over the blocks
hidden_states  hidden states of all sequences at one depth
end_to_end     the end-to-end phase
perplexity     of the whole model, or block by block
substitution   other weights in a model, for a while or for good
folder         the folder of a run
recipe         what makes two runs the same
summary        what a run found
report         figures of all weights together, and their names
tensorboard    what a run leaves for TensorBoard
"""
