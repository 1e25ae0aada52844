"""Gradients at the outputs of matrices, seen in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_gsq.models.products import Product, WatchProducts


@contextmanager
def watch_output_gradients(block: nn.Module, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``seen(parameter name, gradient ... O)`` for what runs inside, when its backward pass is made.

    Products whose outputs lie in another order than their inputs (``W @ x``, several matrices at once) are left out.

    Args:
        block: The block.
        seen: Takes the gradient at the outputs of one product.
    """

    def ran(func: Any, _: tuple[Any, ...], __: Mapping[str, Any], output: Any, products: list[Product]) -> None:
        if len(products) != 1 or not isinstance(output, Tensor) or not output.requires_grad:
            return
        product = products[0]
        if func is not nn.functional.linear and product.rows_are_outputs:
            return
        if output.shape == (*product.inputs.shape[:-1], product.out_features):
            output.register_hook(lambda gradient: seen(product.name, gradient))

    with WatchProducts(dict(block.named_parameters()), lambda _: None, ran):
        yield
