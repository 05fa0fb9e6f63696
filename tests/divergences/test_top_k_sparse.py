"""Divergences from an anchor that is known at K entries per position: by enumeration, padded, repeated, cut off."""

import math
from typing import Any

import pytest
import torch

import mirrorpo
from naive import BREGMAN, CASES, F_DIVERGENCES, Case, logits

V = 7
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: Case) -> mirrorpo.Divergence:
    return mirrorpo.divergence(case.name, **case.options)


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]


def naive(case: Case, p: torch.Tensor, entries: dict[int, float]) -> torch.Tensor:
    """One state: the terms of the entries, and for f-divergences the rest as one more token."""
    chosen = sorted(entries)
    q = torch.tensor([entries[v] for v in chosen], dtype=torch.float64)
    coarse_p = p[chosen]
    rest = [v for v in range(len(p)) if v not in chosen]
    if rest and case.name in (*F_DIVERGENCES, "k1"):
        coarse_p = torch.cat([coarse_p, p[rest].sum().view(1)])
        q = torch.cat([q, 1.0 - q.sum().view(1)])
    # summed term by term: the coarse distributions of a Bregman divergence need not sum to 1
    return case.coordinate(coarse_p, q).sum()


def batch(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (a leaf), the anchor's K likeliest entries, the sampled tokens and theirs; 2 x 3 states."""
    theta = logits(2, 3, V, seed=1).requires_grad_()
    logq = logits(2, 3, V, seed=2).log_softmax(-1)
    top = logq.topk(k, dim=-1)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    return theta, top.indices, top.values, tokens, logq.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("with_tokens", [True, False])
@EVERY_CASE
def test_value_and_gradient_are_those_of_the_coarser_vocabulary(case: Case, with_tokens: bool, k: int) -> None:
    theta, indices, entries, tokens, of_tokens = batch(k)
    sampled = (tokens, of_tokens) if with_tokens else (None, None)
    got = build(case).top_k_sparse(theta, indices, entries, *sampled)
    rows = []
    for i in range(2):
        for j in range(3):
            known = {int(v): q.exp().item() for v, q in zip(indices[i, j], entries[i, j], strict=True)}
            if with_tokens:
                known[int(tokens[i, j])] = of_tokens[i, j].exp().item()
            rows.append(naive(case, theta[i, j].softmax(-1), known))
    expected = torch.stack(rows).view(2, 3)
    torch.testing.assert_close(got, expected, rtol=case.tolerance, atol=max(case.tolerance * 1e-2, 1e-10))
    torch.testing.assert_close(
        gradient(got, theta), gradient(expected, theta), rtol=case.tolerance, atol=max(case.tolerance, 1e-10)
    )


@pytest.mark.parametrize("k", [2, V])
@EVERY_CASE
def test_it_is_top_k_of_the_whole_anchor(case: Case, k: int) -> None:
    theta, indices, entries, tokens, of_tokens = batch(k)
    whole = build(case).top_k(theta, logits(2, 3, V, seed=2), tokens, k)
    sparse = build(case).top_k_sparse(theta, indices, entries, tokens, of_tokens)
    torch.testing.assert_close(sparse, whole, rtol=case.tolerance, atol=1e-10)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js", "kl", "prob_l2"])
def test_padding_and_repeated_entries_change_nothing(name: str) -> None:
    d = mirrorpo.divergence(name)
    theta, indices, entries, tokens, of_tokens = batch(3)
    plain = d.top_k_sparse(theta, indices, entries, tokens, of_tokens)
    for pad in (-math.inf, math.nan):
        # padded with token 0, which may be an entry: the padding must not hide it
        wide = torch.cat([indices, torch.zeros(2, 3, 2, dtype=torch.long)], dim=-1)
        padded = d.top_k_sparse(
            theta, wide, torch.cat([entries, torch.full((2, 3, 2), pad)], dim=-1), tokens, of_tokens
        )
        torch.testing.assert_close(padded, plain, rtol=0, atol=0)
    nothing = d.top_k_sparse(theta, indices, torch.full_like(entries, -math.inf))  # a position without an answer
    assert nothing.tolist() == [[0.0] * 3] * 2
    assert gradient(nothing, theta).abs().max() == 0.0
    twice = d.top_k_sparse(
        theta, torch.cat([indices, indices], -1), torch.cat([entries, entries], -1), tokens, of_tokens
    )
    torch.testing.assert_close(twice, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case", [Case(name) for name in (*F_DIVERGENCES, *BREGMAN) if name not in ("alpha", "beta")], ids=str
)
def test_a_policy_gains_nothing_by_leaving_the_anchors_entries(case: Case) -> None:
    """The truncated sum of p log p/q is smallest where the entries have no mass at all; this one at the anchor."""
    logq = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05], dtype=torch.float64).log()
    top = logq.topk(2)
    d = build(case)

    def at(mass: float) -> float:
        inside = torch.tensor([0.625, 0.375], dtype=torch.float64) * mass
        outside = torch.full((3,), (1 - mass) / 3, dtype=torch.float64)
        return d.top_k_sparse(torch.cat([inside, outside]).log(), top.indices, top.values).item()

    assert at(0.8) == pytest.approx(0.0, abs=max(1e-12, 1e-3 * case.tolerance))
    values = [at(mass) for mass in (0.8, 0.6, 0.4, 0.2, 0.01)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_entries_whose_sum_rounds_above_one_leave_a_rest_that_is_finite() -> None:
    theta = logits(4, V, seed=3).float().requires_grad_()
    logq = logits(4, V, seed=4, scale=6.0).float().log_softmax(-1)
    top = logq.topk(V - 1, dim=-1)
    for name in ("reverse_kl", "forward_kl", "chi2", "js"):
        value = mirrorpo.divergence(name).top_k_sparse(theta, top.indices, (top.values + 1e-6).clamp(max=0.0))
        assert value.isfinite().all()
        assert gradient(value, theta).isfinite().all()
    value = mirrorpo.divergence("reverse_kl").top_k_sparse(theta, top.indices, top.values)
    assert (value < 50).all()  # not p_rest * log(p_rest / 0)


GIVEN = batch(3)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"indices": GIVEN[1][..., :2]}, "must have the same shape"),
    ({"indices": GIVEN[1][:1], "logp_anchor": GIVEN[2][:1]}, "must have the same shape"),
    ({"indices": GIVEN[1] + V}, rf"indices must be in \[0, {V}\)"),
    ({"indices": GIVEN[1] - V}, rf"indices must be in \[0, {V}\)"),
    ({"logp_anchor": GIVEN[2].exp()}, "logp_anchor must hold log-probabilities"),
    ({"tokens": None}, "tokens and logp_anchor_tokens go together, got None for tokens"),
    ({"logp_anchor_tokens": None}, "got None for logp_anchor_tokens"),
    ({"tokens": GIVEN[3][:, :2]}, "tokens has shape"),
    ({"tokens": GIVEN[3] + V}, rf"tokens must be in \[0, {V}\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    names = ("logits", "indices", "logp_anchor", "tokens", "logp_anchor_tokens")
    given = {**dict(zip(names, GIVEN, strict=True)), **changes}
    with pytest.raises(ValueError, match=message):
        mirrorpo.divergence("js").top_k_sparse(**given)


@pytest.mark.parametrize("support", ["policy", "union"])
@pytest.mark.parametrize("name", ["reverse_kl", "prob_l2"])
def test_the_support_may_be_the_policys_or_both(name: str, support: str) -> None:
    case, d = Case(name), mirrorpo.divergence(name)
    theta, theta_ref = logits(6, V, seed=8).requires_grad_(), logits(6, V, seed=9)
    tokens = torch.arange(6)
    got = d.top_k(theta, theta_ref, tokens, 2, support)
    rows = []
    for p, q, x, y, token in zip(theta.softmax(-1), theta_ref.softmax(-1), theta, theta_ref, tokens, strict=True):
        chosen = {int(token), *x.topk(2).indices.tolist()} | (
            set(y.topk(2).indices.tolist()) if support == "union" else set()
        )
        rows.append(naive(case, p, {v: q[v].item() for v in chosen}))
    expected = torch.stack(rows)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(got, theta), gradient(expected, theta), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="unknown support 'both'"):
        d.top_k(theta, theta_ref, tokens, 2, "both")


def test_an_objective_takes_a_sparse_teacher() -> None:
    theta, indices, entries, tokens, of_tokens = batch(3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    keep = mask.bool()
    indices[0, 2], entries[0, 2] = -100, math.nan  # masked
    spec = {"divergence": "js", "coefficient": 1.0, "anchor": "teacher", "estimator": "top_k"}
    objective = mirrorpo.objective("dapo", surrogate="none", penalties=[spec])
    given = {"logits": theta, "logp": of_tokens.clone(), "mask": mask, "teacher_top": (indices, entries)}
    d = mirrorpo.divergence("js")
    for sampled in ({}, {"tokens": tokens, "logp_teacher": of_tokens}):
        got = objective(**given, **sampled).loss
        rows = (indices[keep], entries[keep])
        more = (tokens[keep], of_tokens[keep]) if sampled else ()
        expected = d.top_k_sparse(theta[keep], *rows, *more).mean()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient(got, theta), gradient(expected, theta), rtol=1e-12, atol=1e-14)
    exact = mirrorpo.objective("dapo", surrogate="none", penalties=[{**spec, "estimator": "exact"}])
    for chosen, changes, message in (
        (exact, {}, "needs logits_teacher: teacher_top holds the teacher's own entries only"),
        (objective, {"logits_teacher": theta.detach()}, "logits_teacher and teacher_top say the same twice"),
        (objective, {"teacher_top": (indices[:1], entries[:1])}, "teacher_top must hold two tensors"),
        (objective, {"teacher_top": None}, "needs logits_teacher, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(**{**given, **changes})
