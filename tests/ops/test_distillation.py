"""The chunked loss and its written-out gradient against autograd over whole logits, in float64."""

import itertools

import pytest
import torch

from lightning_gsq.ops.distillation import IGNORED, Head, HiddenTarget, Target, TopKTarget, distillation_loss
from lightning_gsq.ops.distillation.reference import distillation_loss_reference

N, D, V, K = 37, 8, 50, 5


def _problem(temperature: float, softcap: float | None, top_k: bool) -> tuple[Head, torch.Tensor, Target, torch.Tensor]:
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    head = Head(draw(V, D).requires_grad_(), draw(V).requires_grad_(), 0.7, softcap)
    teacher, hidden = Head(draw(V, D), None, 1.3, softcap), draw(N, D)
    target: Target = HiddenTarget(hidden, teacher)
    if top_k:
        log_probs, tokens = torch.log_softmax(teacher.logits(hidden) / temperature, dim=-1).topk(K)
        target = TopKTarget(tokens.int(), log_probs)
    labels = torch.randint(V, (N,))
    labels[3] = IGNORED
    return head, draw(N, D).requires_grad_(), target, labels


@pytest.mark.parametrize(
    ("temperature", "mix", "softcap", "top_k"),
    list(itertools.product([1.0, 2.0], [0.0, 0.3, 1.0], [None, 3.0], [False, True])),
)
def test_loss_and_gradient_match_autograd(temperature: float, mix: float, softcap: float | None, top_k: bool) -> None:
    head, hidden, target, labels = _problem(temperature, softcap, top_k)
    assert head.bias_V is not None
    results = []
    for own, chunk in ((distillation_loss_reference, {}), (distillation_loss, {"chunk": 20})):
        loss, kl, ce = own(hidden, head, target, labels, temperature=temperature, cross_entropy=mix, **chunk)
        gradients = torch.autograd.grad(2 * loss, [hidden, head.weight_VD, head.bias_V])
        results.append([loss, kl, ce, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_chunks_do_not_matter() -> None:
    head, hidden, target, labels = _problem(1.0, None, False)
    losses = [distillation_loss(hidden, head, target, labels, chunk=chunk)[0] for chunk in (1, 16, 37, 1000)]
    assert all(torch.allclose(loss, losses[0], rtol=1e-12) for loss in losses)


def test_top_k_approaches_the_whole_from_below_and_is_zero_for_the_teacher_itself() -> None:
    head, hidden, target, labels = _problem(1.0, None, False)
    assert isinstance(target, HiddenTarget)
    whole = distillation_loss(hidden, head, target, labels)[1]
    log_p_NV = torch.log_softmax(target.head.logits(target.hidden_ND), dim=-1)
    last = torch.tensor(0.0)
    for k in (1, 5, 20, V):
        log_probs, tokens = log_p_NV.topk(k)
        divergence = distillation_loss(hidden, head, TopKTarget(tokens, log_probs), labels)[1]
        assert last <= divergence <= whole + 1e-12
        own = distillation_loss(target.hidden_ND, target.head, TopKTarget(tokens, log_probs), labels)[1]
        assert abs(float(own)) < 1e-12
        last = divergence
    torch.testing.assert_close(last, whole)


def test_products_follow_autocast() -> None:
    hidden = torch.randn(N, D, requires_grad=True)
    head, target = Head(torch.randn(V, D)), HiddenTarget(torch.randn(N, D), Head(torch.randn(V, D)))
    labels = torch.randint(V, (N,))
    exact = distillation_loss(hidden, head, target, labels)[0]
    (expected,) = torch.autograd.grad(exact, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        half = distillation_loss(hidden, head, target, labels)[0]
    (found,) = torch.autograd.grad(half, hidden)
    assert found.dtype == half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert float((found - expected).norm() / expected.norm()) < 0.02
