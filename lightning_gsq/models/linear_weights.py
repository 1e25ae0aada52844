"""Which parameters of a block are linear weights, and what flows into them, found by watching the block run.

Nothing is matched by class or by name: a parameter that is used as the matrix of a product is a linear weight (see
:mod:`lightning_gsq.models.products`). That covers ``nn.Linear``, GPT-2's transposed ``Conv1D``, experts fused into one
parameter, and experts in a list, of which those that no token of the probe reaches are known by their siblings.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gsq.models.products import Product, WatchProducts
from lightning_gsq.models.roles import GATE, HANDFUL, STATE, Roles


@dataclass(frozen=True)
class LinearSite:
    """A linear weight inside a block.

    Args:
        name: Parameter name inside the block, such as ``mlp.down_proj.weight``.
        experts: Matrices fused in the parameter, ``E``; 0 for a plain weight.
        out_features: ``O``.
        in_features: ``I``.
        transposed: The parameter stores ``I O`` (per expert) rather than ``O I``.
        shape: Shape of the parameter where it is another than that of these matrices: ``E O`` rows, for one.
        role: Why it is left in full precision unless it is asked for; empty if it is not.
    """

    name: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool
    shape: tuple[int, ...] = ()
    role: str = field(default="", compare=False)

    @property
    def rows(self) -> int:
        """Rows of the weight seen as one matrix: ``O``, or ``E * O``."""
        return max(self.experts, 1) * self.out_features

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as one matrix of ``rows`` by ``I``."""
        if self.shape:
            sizes = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
            parameter = parameter.reshape(*([self.experts] if self.experts else []), *sizes)
        if self.transposed:
            parameter = parameter.transpose(-1, -2)
        return parameter.reshape(self.rows, self.in_features)

    def from_matrix(self, w_OI: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`; differentiable."""
        if self.experts:
            w_OI = w_OI.view(self.experts, self.out_features, self.in_features)
        w_OI = w_OI.transpose(-1, -2) if self.transposed else w_OI
        return w_OI.reshape(self.shape) if self.shape else w_OI


@contextmanager
def watch_inputs(block: nn.Module, seen: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """While active, calls ``seen(parameter name, expert, inputs ... I)`` for each product inside ``block``."""
    with WatchProducts(dict(block.named_parameters()), lambda p: seen(p.name, p.part, p.inputs)):
        yield


def find_linear_sites(block: nn.Module, run: Callable[[], Any]) -> list[LinearSite]:
    """Those of :func:`find_all_sites` that are quantized unless somebody says otherwise: the ones without a role."""
    return [site for site in find_all_sites(block, run) if not site.role]


def find_all_sites(block: nn.Module, run: Callable[[], Any]) -> list[LinearSite]:
    """The linear weights of a block, in the order of its parameters.

    Args:
        block: The block.
        run: Runs the block once on any input.
    """
    parameters = dict(block.named_parameters())
    products: dict[str, list[Product]] = {}
    roles = Roles()
    watch = WatchProducts(parameters, lambda p: products.setdefault(p.name, []).append(p), roles.ran)
    with torch.no_grad(), watch:
        run()
    sites = {name: _site(name, parameters[name], seen) for name, seen in products.items()}
    there = {name: site for name, site in sites.items() if site is not None}
    there |= _siblings(block, there)
    named = _with_roles(there, roles.of, {name: _inputs(seen) for name, seen in products.items()})
    return [named[name] for name in parameters if name in named]


def to_quantize(sites: Mapping[str, LinearSite], include: Iterable[str]) -> list[str]:
    """Names of the weights without a role, and of those with one that a pattern asks for by name.

    A pattern does so if what follows its last wildcard covers a module's whole name: ``*.mlp.gate`` or
    ``model.layers.0.mlp.gate.weight``, and not ``*`` or ``*.mlp.*``.

    Args:
        sites: The weights, by their full names.
        include: The patterns of ``model.include``.
    """
    patterns = [pattern.removesuffix(".weight") for pattern in include]

    def asked_for(name: str) -> bool:
        name = name.removesuffix(".weight")
        for pattern in patterns:
            literal = re.split(r"[*?\]]", pattern)[-1].lstrip(".")
            by_name = len(literal) >= len(name.rpartition(".")[2]) and f".{name}".endswith(f".{literal}")
            if by_name and fnmatch.fnmatchcase(name, pattern):
                return True
        return False

    return [name for name, site in sites.items() if not site.role or asked_for(name)]


def _site(name: str, parameter: Tensor, products: list[Product]) -> LinearSite | None:
    """The linear weight that these products are of; None where they use it in ways that no one matrix explains."""
    first = products[0]
    forms = {(p.matrix.shape, p.matrix.stride(), p.rows_are_outputs) for p in products}
    if len(forms) > 1 and (first.transposed or any(p.transposed for p in products)):
        return None
    out_features, in_features = first.out_features, first.matrix.numel() // first.out_features
    parts, rest = divmod(parameter.numel(), first.matrix.numel())
    plain = (in_features, out_features) if first.transposed else (out_features, in_features)
    if parts == 1:
        shape = () if tuple(parameter.shape) == plain else tuple(parameter.shape)
        return LinearSite(name, 0, out_features, in_features, first.transposed, shape)
    whole_parts = len(forms) == 1 and not rest and not any(p.offset % p.matrix.numel() for p in products)
    if parameter.ndim == 3 and whole_parts and parts == len(parameter):
        return LinearSite(name, parts, out_features, in_features, first.transposed)
    if parameter.ndim != 2 or parameter.shape[1] != (out_features if first.transposed else in_features):
        return None
    if whole_parts and _apart(products):
        return LinearSite(name, parts, out_features, in_features, first.transposed, tuple(parameter.shape))
    # Rows used in pieces, such as queries, keys and values apart: one weight, if its rows are outputs.
    return None if first.transposed else LinearSite(name, 0, parameter.shape[0], in_features, False)


def _apart(products: list[Product]) -> bool:
    """Whether the parts of a parameter are applied to different inputs, as experts are; all inputs are alive."""
    return len(_inputs(products)) > 1 or len({p.offset for p in products}) == 1


def _inputs(products: list[Product]) -> set[Any]:
    """What the products are of, told apart by where it lies; all inputs are alive."""
    return {(p.inputs.data_ptr(), p.inputs.shape, p.inputs.stride()) for p in products}


def _siblings(block: nn.Module, sites: Mapping[str, LinearSite]) -> dict[str, LinearSite]:
    """Weights that no product was seen of, in modules of a list whose like has a linear weight in their place."""
    siblings: dict[str, LinearSite] = {}
    for prefix, modules in block.named_modules():
        if not isinstance(modules, nn.ModuleList):
            continue
        of_form: dict[Any, dict[str, LinearSite]] = {}
        forms = []
        for index, module in enumerate(modules):
            names = {name: tuple(p.shape) for name, p in module.named_parameters()}
            forms.append((type(module), tuple(names.items())))
            stem = f"{prefix}.{index}." if prefix else f"{index}."
            seen = {name: sites[stem + name] for name in names if stem + name in sites}
            of_form.setdefault(forms[-1], {}).update(seen)
        for index, form in enumerate(forms):
            stem = f"{prefix}.{index}." if prefix else f"{index}."
            for name, site in of_form[form].items():
                if stem + name not in sites:
                    siblings[stem + name] = replace(site, name=stem + name)
    return siblings


def _with_roles(
    sites: Mapping[str, LinearSite], roles: Mapping[str, str], inputs: Mapping[str, set[Any]]
) -> dict[str, LinearSite]:
    """The weights, each with its role; ``inputs`` are those of the weights that a product was seen of."""
    of = {}
    for name, site in sites.items():
        handful = min(site.out_features, site.in_features) < HANDFUL
        of[name] = roles.get(name, GATE if handful else "")
    for name, role in roles.items():
        if role != STATE or name not in sites:
            continue
        # Time steps and decays have a partner of the same shape, computed from the same inputs, which no softplus gives
        # away. The shape alone says nothing: that of Mamba's x_proj may be that of its out_proj.
        owner, site = name.rpartition(".")[0].rpartition(".")[0], sites[name]
        for other, twin in sites.items():
            beside = other.rpartition(".")[0].rpartition(".")[0] == owner
            alike = (twin.rows, twin.in_features) == (site.rows, site.in_features)
            if beside and alike and not of[other] and not inputs[name].isdisjoint(inputs.get(other, ())):
                of[other] = STATE
    return {name: replace(site, role=of[name]) for name, site in sites.items()}
