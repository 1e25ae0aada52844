"""What will a run cost? Sizes, bits, memory, disk, steps and time, from a configuration alone.

skeleton          the model's structure without its weights
assigned          the weights and their schemes
quantities        sizes that several phases share
simulate          the activations of a block, run on tensors without content
experts           fused experts in such a run, and the share that a device has
block_terms       memory of a block: its warm start, its training
width_terms       memory of finding out what the choices of a size are worth
perplexity_terms  memory of measuring perplexity
end_to_end_terms  memory of the end-to-end phase
phases            the memory of a run, phase by phase
probe             seconds of a few steps on one block of random weights
start_probe       seconds of a warm start: watching a block's inputs, rounding a matrix of each shape
end_to_end_probe  seconds of the end-to-end phase, from a batch through such a block and the loss
width_probe       seconds of finding out what the choices of a size are worth, on such a block
timing            seconds of a call
surroundings      the machine, and settings that several terms depend on
limits            what this machine has
problems          what does not fit disks
remedies          which phases do not fit the memory, and options with which they do
advice            what would make the training of a block fit a device, or several
estimate          all of it together
"""

from lightning_gsq.estimate.assigned import assigned
from lightning_gsq.estimate.estimate import Estimate, estimate
from lightning_gsq.estimate.problems import refuse_early
from lightning_gsq.estimate.skeleton import make_skeleton

__all__ = ["Estimate", "assigned", "estimate", "make_skeleton", "refuse_early"]
