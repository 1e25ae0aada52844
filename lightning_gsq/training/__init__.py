"""What is trained, by which loss?

model               the model, with every setting that concerns it
settings            these settings, by what they are about
selection           which matrices, and to what, by patterns and by choice
outer_options       those of the embedding and the head
target              what a block learns to output
block               one block against its full-precision output
token_weights       how much each token counts there
expert_parallel     what processes with experts of their own have in common
end_to_end          the whole model against the original's logits
end_to_end_options  what trains there, and how
student_block       a block of that model
student_weights     its weights, whose scales train
student_outer       its quantized embedding and head
step_shares         which share of the learning rates each width takes there
teacher             the original's most probable tokens, stored
optim               Adam and Lion for fp32 and bf16 logits
losses              losses as they are added up
schedule            how the learning rate falls
"""

from lightning_gsq.training.block import BlockQuantization
from lightning_gsq.training.end_to_end import EndToEndQuantization
from lightning_gsq.training.end_to_end_options import EndToEndOptions
from lightning_gsq.training.losses import NonFiniteLossError
from lightning_gsq.training.model import ModelQuantization
from lightning_gsq.training.optim import Adam, Lion

__all__ = [
    "Adam",
    "BlockQuantization",
    "EndToEndOptions",
    "EndToEndQuantization",
    "Lion",
    "ModelQuantization",
    "NonFiniteLossError",
]
