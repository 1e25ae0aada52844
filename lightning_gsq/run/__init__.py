"""What happens in which order, and what is on disk?

run             a run as one object
claim           a folder becomes that of a run
checks          settings that would do nothing, or something else than they say
trial           one step with the user's settings on a tiny module
phases          the phases, each with its perplexity; the summary
warm_start      the first phase
blocks          the second: the loop over the blocks
block_fit       the fit of one block
acceptance      which of its weights stay trained
expert_outputs  how far the output of each of its experts is off
one_block       a block for a Trainer of one's own
importance      an importance matrix of llama.cpp in place of the run's own moments
imatrix_file    the one that a run leaves
calibration     what they see while their inputs are watched, experts above all
end_loss        how much each token counts there, by the gradients of the end loss
matrices        its weights as a quantizer sees them, and as they are stored
block_start     the warm start of a block's weights, in stages where it follows the full-precision model
following       these stages
end_to_end      the third phase
end_to_end_files  what it leaves, and whether it is whole
saving          the quantized model as an ordinary folder
finished        files of a phase that are there and whole
outer_weights   embedding and head, before all of these
perplexity      of the whole model, or block by block: which of the two
blockwise_perplexity  the latter
standard_errors of figures measured on windows of text
forward_passes  hidden states on their way through the model
hidden_states   where they are kept
block_plan      which weights of which block
experts         those that are spread over the processes
substitution    other weights in a model, for a while or for good
folder          the folder of a run
stored_blocks   the weights of all blocks, one in memory at a time
block_files     a block's file, and what it says about itself
dense_file      the file of what is not quantized
progress        progress.json and summary.json, of any shape
recipe          what makes two runs the same
recipe_file     its file: written, compared, written again
summary         what a run found
report          its figures and their names
agreement       a model against another, token by token
zero_shot       what tasks gave
tensorboard     what a run leaves for TensorBoard
"""
