"""What is trained, by which loss?

model          the model, with every setting that concerns it
block          one block against its full-precision output
end_to_end     the whole model against the original's logits
student_block  a block of that model
optim          Adam and Lion for fp32 and bf16 logits
teacher        the original's most probable tokens, stored
token_weights  how much each token counts
"""

from lightning_gsq.training.block import BlockQuantization, NonFiniteLossError
from lightning_gsq.training.end_to_end import EndToEndOptions, EndToEndQuantization
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
