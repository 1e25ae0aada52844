"""Products with matrices that stay packed in memory."""

from lightning_gsq.ops.packed_linear.reference import dequantize_packed, packed_linear

__all__ = ["dequantize_packed", "packed_linear"]
