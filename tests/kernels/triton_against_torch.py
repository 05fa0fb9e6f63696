"""The Triton sweep against the torch sweep: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``).

Not collected by itself: ``test_triton.py`` runs it in a process of its own, since the interpreter is chosen when Triton
is imported. On a GPU: ``python -m pytest tests/kernels/triton_against_torch.py``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mirrorpo
from kernels_batch import Batch, batch, converted, distance, gradients
from mirrorpo.kernels import Anchor, Entries, Head, VocabularyTerm, objective_from_hidden, single_pass, token_logps
from mirrorpo.kernels import triton_kernels as kernels
from mirrorpo.kernels.backend import form_of, interpreted
from mirrorpo.kernels.triton_kernels import Other, gradient_, measure
from mirrorpo.losses.presets import PRESETS
from naive import CASES, Case, logits

DEVICE = torch.device("cpu" if interpreted() else "cuda")
# numpy says aloud what a GPU does silently with numbers that leave float32.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WITH_FORM = [case for case in CASES if form_of(mirrorpo.divergence(case.name, **case.options)) is not None]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "soft cap, scale, bias": {"bias": True, "softcap": 2.0, "scale": 1.5, "temperature": 0.7},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks to a row, the last of them not full."""
    for name in ("BLOCK", "TERM_BLOCK", "TABLE_BLOCK"):
        monkeypatch.setattr(kernels, name, 64)


def other_of(divergence: mirrorpo.Divergence, anchor: torch.Tensor | None, scale: float = 1.0) -> Other:
    form = form_of(divergence)
    assert form is not None
    table = divergence.table.rows(DEVICE) if form[0] == "neural" else None  # pyright: ignore[reportAttributeAccessIssue]
    return Other(form=form, logits=anchor, scale=scale, table=table)


def truth(
    z: torch.Tensor, tokens: torch.Tensor, divergences: Sequence[mirrorpo.Divergence], anchors: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(3 + J, C) values and the gradient of their weighted sum, by autograd in float64."""
    leaf = z.double().requires_grad_()
    logp = leaf.log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
    of_tokens = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    values = torch.stack(
        [of_tokens, entropy, *(d.exact(leaf, q.double()) for d, q in zip(divergences, anchors, strict=True))]
    )
    return values.detach(), torch.autograd.grad((values * weights.double()).sum(), leaf)[0]


def chunk_of(count: int, vocabulary: int, dtype: torch.dtype, spread: float = 0.5) -> tuple[torch.Tensor, ...]:
    """Logits of policy and anchor, tokens (the first and the last of the vocabulary among them), weights."""
    z = (2.0 * logits(count, vocabulary, seed=1)).to(DEVICE, dtype)
    q = (z.double() + spread * logits(count, vocabulary, seed=2).to(DEVICE)).to(dtype)
    tokens = torch.arange(count, device=DEVICE) * (vocabulary - 1) // max(1, count - 1)
    return z, q, tokens, logits(3, count, seed=3).float().to(DEVICE)


def swept(
    z: torch.Tensor, tokens: torch.Tensor, others: Sequence[Other], weights: torch.Tensor, head: Head | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the kernels."""
    head, into = head or Head(torch.zeros(z.shape[1], 1, device=DEVICE)), z.clone()
    found = measure(into, tokens, head, others)
    values = torch.stack([found.logp, found.entropy, *(found.of_term(j)[0] for j in range(len(others)))])
    gradient_(into, tokens, head, found, weights[0], others, list(weights[2:]), weights[1])
    return values.double(), into.double()


@pytest.mark.parametrize("case", WITH_FORM, ids=str)
def test_every_divergence_and_its_gradient_are_those_of_float64(case: Case) -> None:
    d = mirrorpo.divergence(case.name, **case.options)
    z, q, tokens, weights = chunk_of(2, 41, torch.float32)
    values, grad = swept(z, tokens, [other_of(d, q)], weights)
    expected, expected_grad = truth(z, tokens, [d], [q], weights)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("spread", [1e-3, 30.0])
@pytest.mark.parametrize("case", WITH_FORM, ids=str)
def test_near_and_far_a_divergence_loses_no_more_than_in_torch(case: Case, spread: float) -> None:
    d = mirrorpo.divergence(case.name, **case.options)
    z, q, tokens, _ = chunk_of(2, 33, torch.float32, spread)
    found = measure(z, tokens, Head(torch.zeros(33, 1, device=DEVICE)), [other_of(d, q)])
    logp, logq = z.log_softmax(-1), q.log_softmax(-1)
    in_torch = torch.stack([part.sum(-1) for part in d.over_vocabulary(logp, logq)]).double()
    exact = torch.stack([part.sum(-1) for part in d.term(*(x.double().log_softmax(-1) for x in (z, q)))])
    exact = exact.clamp(-1e38, 1e38)
    got = torch.stack(found.of_term(0)[:2]).double()
    assert got.isfinite().all()
    # What torch loses, and what log-ratios that are wrong in the seventh digit cost: their error times the slope.
    value, slope = (part.abs().sum(-1).double() for part in d.over_vocabulary(logp, logq))
    noise = 4e-6 * (1.0 + (logp - logq).abs().amax()) * torch.stack([value + slope, slope + 1.0])
    assert bool(((got - exact).abs() <= 3.0 * (in_torch - exact).abs() + noise).all()), (got, in_torch, exact)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 130])
def test_every_width_and_dtype(vocabulary: int, dtype: torch.dtype) -> None:
    d = mirrorpo.divergence("js")
    for count in (1, 2):
        z, q, tokens, weights = chunk_of(count, vocabulary, dtype)
        values, grad = swept(z, tokens, [other_of(d, q)], weights)
        expected, expected_grad = truth(z, tokens, [d], [q], weights)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
        # float32 inside: what is lost is the rounding of the result (the interpreter cuts bfloat16 off)
        unit = 2.0 * UNIT[dtype] if interpreted() else UNIT[dtype]
        assert (grad - expected_grad).norm() <= unit * expected_grad.norm() + 1e-5 * (1 + expected_grad.norm())


def test_several_anchors_one_of_them_uniform_and_one_that_is_only_measured() -> None:
    names = ("neural", "kl", "tv")
    z, q, tokens, _ = chunk_of(2, 67, torch.float32)
    weights = logits(5, 2, seed=3).float().to(DEVICE)
    divergences = [mirrorpo.divergence(name) for name in names]
    anchors = [q, torch.zeros_like(q), 0.5 * q]
    others = [other_of(divergences[0], q), other_of(divergences[1], None), other_of(divergences[2], q, 0.5)]
    values, grad = swept(z, tokens, others, weights)
    expected, expected_grad = truth(z, tokens, divergences, anchors, weights)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    found = measure(z, tokens, Head(torch.zeros(67, 1, device=DEVICE)), others)
    into = z.clone()
    given = [weights[2], None, weights[4]]
    gradient_(into, tokens, Head(torch.zeros(67, 1, device=DEVICE)), found, weights[0], others, given, weights[1])
    weights[3] = 0.0
    _, expected_grad = truth(z, tokens, divergences, anchors, weights)
    assert (into.double() - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("name", ["reverse_kl", "prob_l2", "neural", "js"])
def test_entries_that_cannot_occur_have_no_part_in_anything(name: str) -> None:
    d = mirrorpo.divergence(name)
    z, q, tokens, weights = chunk_of(3, 35, torch.float32)
    tokens = tokens.clamp(1, 30)
    kept = torch.ones(35, dtype=torch.bool, device=DEVICE)
    kept[[0, 16, 33, 34]] = False
    z_masked, q_masked = (x.masked_fill(~kept, -math.inf) for x in (z, q))
    place = kept.cumsum(0) - 1
    tokens = torch.where(kept[tokens], tokens, 1)
    values, grad = swept(z_masked, tokens, [other_of(d, q_masked)], weights)
    expected, expected_grad = truth(z[:, kept], place[tokens], [d], [q[:, kept]], weights)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    assert bool((grad[:, ~kept] == 0.0).all())
    assert (grad[:, kept] - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "chi2", "prob_l2", "itakura_saito", "kl", "neural"])
@pytest.mark.parametrize(("size", "softcap"), [(300.0, None), (3e38, None), (3e38, 30.0)])
def test_huge_logits_stay_finite(name: str, size: float, softcap: float | None) -> None:
    z = torch.zeros(2, 33, device=DEVICE)
    z[0, 3], z[1, 32] = size, -size
    tokens, weights = torch.tensor([3, 32], device=DEVICE), torch.ones(3, 2, device=DEVICE)
    head = Head(torch.zeros(33, 1, device=DEVICE), softcap=softcap)
    values, grad = swept(z, tokens, [other_of(mirrorpo.divergence(name), z.neg())], weights, head)
    assert values.isfinite().all()
    assert grad.isfinite().all()
    assert values[0, 0].abs() < 1e-6


@pytest.mark.parametrize("outside", [20, -100])
def test_a_row_that_is_not_finite_spoils_itself_alone_and_a_token_out_of_range_is_not_a_number(outside: int) -> None:
    z, q, tokens, weights = chunk_of(4, 20, torch.float32)
    clean = swept(z, tokens, [other_of(mirrorpo.divergence("tv"), q)], weights)
    z[1, 19], z[2, 0] = math.nan, math.inf
    tokens[3] = outside
    values, grad = swept(z, tokens, [other_of(mirrorpo.divergence("tv"), q)], weights)
    for x in (values[0], values[1], values[2]):
        assert bool(x[1:3].isnan().all())
    assert bool(values[0, 3].isnan())
    assert bool((values[:, 0] == clean[0][:, 0]).all())
    assert bool((grad[0] == clean[1][0]).all())


def both(b: Batch, **settings: Any) -> tuple[Head, Head]:
    return dataclasses.replace(b.head, **settings), dataclasses.replace(b.head, kernels="triton", **settings)


@pytest.mark.parametrize("head", HEADS)
def test_a_single_pass_of_every_kind_of_head_is_that_of_torch(head: str) -> None:
    b = moved(converted(batch((2, 0, 1), vocabulary=70, **HEADS[head]), torch.float32))
    one, entropy, js, uniform = logits(4, len(b.tokens), seed=9).float().to(DEVICE)
    terms = tuple(
        VocabularyTerm(divergence=mirrorpo.divergence(name), anchor=anchor)
        for name, anchor in (("js", b.reference), ("tv", b.reference), ("kl", None))
    )
    found = []
    for policy in both(b):
        done = single_pass(
            b.hidden,
            policy,
            b.tokens,
            lambda logp, part, values: one[part] * logp.exp() * values[1],
            terms=terms,
            term_weights=(js, None, uniform),
            entropy_weights=entropy,
            chunk=2,
        )
        numbers = (done.loss, done.logp, done.entropy, *done.values, *done.anchor_logps)
        found.append((numbers, gradients(done.loss, b.leaves)))
    for got, expected in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert distance(found[1][1], found[0][1]) < 1e-5


def moved(b: Batch) -> Batch:
    """The batch on the device that Triton runs on."""
    if DEVICE.type == "cpu":
        return b

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(DEVICE).requires_grad_(x.requires_grad)

    def of(head: Head) -> Head:
        return dataclasses.replace(head, weight=leaf(head.weight), bias=None if head.bias is None else leaf(head.bias))

    reference, rollout = (Anchor(hidden=leaf(a.hidden), head=of(a.head)) for a in (b.reference, b.rollout))
    rest = (x.to(DEVICE) for x in (b.tokens, b.mask, b.advantages))
    return Batch(leaf(b.hidden), of(b.head), reference, rollout, *rest)


OBJECTIVES: dict[str, dict[str, Any]] = {name: {} for name in PRESETS} | {
    "exact": {"divergence": "js", "estimator": "exact"},
    "exact neural": {"divergence": "neural", "estimator": "exact"},
    "exact toward the teacher": {
        "penalties": [{"divergence": "forward_kl", "anchor": "teacher", "estimator": "exact", "coefficient": 0.5}]
    },
    "exact toward uniform": {
        "penalties": [{"divergence": "kl", "anchor": "uniform", "estimator": "exact", "coefficient": 0.1}]
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_that_of_torch(name: str) -> None:
    objective = mirrorpo.objective(name if name in PRESETS else "grpo", **OBJECTIVES[name])
    b = moved(converted(batch(), torch.float32))
    given = {key: x for key, x in b.shared().items() if key not in ("logp_ref", "logp_teacher") or "exact" not in name}
    found = []
    for policy in both(b):
        out, logp, entropy = objective_from_hidden(
            objective, b.hidden, policy, b.tokens, reference=b.reference, rollout=b.rollout, teacher=b.teacher, **given
        )
        found.append(((out.loss, logp, entropy, *out.metrics.values()), gradients(out.loss, b.leaves)))
    for got, expected in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert distance(found[1][1], found[0][1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_lose_no_more_than_in_torch(dtype: torch.dtype) -> None:
    low = moved(converted(batch(bias=True), dtype))
    exact = converted(low, torch.float64)
    upstream = logits(2, len(low.tokens), seed=9).to(DEVICE)

    def grads(b: Batch, policy: Head) -> list[torch.Tensor]:
        found = token_logps(b.hidden, policy, b.tokens, chunk=4)
        return gradients(sum((w * x).sum() for w, x in zip(upstream.to(found[0]), found, strict=True)), b.leaves)

    expected = grads(exact, exact.head)
    in_torch, in_triton = (distance(grads(low, policy), expected) for policy in both(low))
    assert in_triton <= 1.05 * in_torch + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_in_another_place_and_dtype_is_that_in_place_rounded_once(dtype: torch.dtype) -> None:
    z, q, tokens, weights = chunk_of(2, 67, torch.float32)
    head, others = Head(torch.zeros(67, 1, device=DEVICE)), [other_of(mirrorpo.divergence("js"), q)]
    found, before, out = measure(z, tokens, head, others), z.clone(), torch.empty_like(z, dtype=dtype)
    gradient_(z, tokens, head, found, weights[0], others, [weights[2]], weights[1], out=out)
    assert bool((z == before).all())
    gradient_(z, tokens, head, found, weights[0], others, [weights[2]], weights[1])
    unit = 2.0 * UNIT[dtype] if interpreted() else UNIT[dtype]
    torch.testing.assert_close(out.float(), z, rtol=unit, atol=1e-7)


def test_rows_without_weight_get_no_gradient() -> None:
    d = mirrorpo.divergence("hellinger")
    z, q, tokens, weights = chunk_of(4, 33, torch.float32)
    weights[:, [0, 2]] = 0.0
    _, grad = swept(z, tokens, [other_of(d, q)], weights)
    assert bool((grad[[0, 2]] == 0.0).all())
    assert bool((grad[[1, 3]].abs().sum(-1) > 0.0).all())


def own(x: torch.Tensor) -> torch.Tensor:
    return x**3


NO_FORM: dict[str, Any] = {
    "divergence 'own' as it is defined": lambda b: VocabularyTerm(
        divergence=mirrorpo.divergence(own), anchor=b.reference
    ),
    "divergence 'beta' as it is defined": lambda b: VocabularyTerm(
        divergence=mirrorpo.divergence("beta", beta=-0.5), anchor=b.reference
    ),
    r"a divergence over K entries \(top_k\)": lambda b: VocabularyTerm(
        divergence=mirrorpo.divergence("js"), anchor=b.reference, k=3
    ),
    "a divergence over K entries": lambda b: VocabularyTerm(
        divergence=mirrorpo.divergence("js"),
        anchor=Entries(
            indices=torch.tensor([[1, 2]], device=DEVICE).expand(len(b.tokens), 2),
            logp=torch.full((len(b.tokens), 2), -1.0, device=DEVICE),
        ),
    ),
}


@pytest.mark.parametrize("reason", NO_FORM)
def test_what_has_no_form_is_taken_by_torch_with_one_line(reason: str) -> None:
    b = moved(converted(batch(), torch.float32))
    term = NO_FORM[reason](b)
    weight = torch.ones(len(b.tokens), device=DEVICE)

    def loss(policy: Head) -> torch.Tensor:
        return single_pass(b.hidden, policy, b.tokens, None, terms=(term,), term_weights=(weight,)).loss

    plain, triton = both(b)
    expected = loss(plain)
    with pytest.warns(UserWarning, match=f"kernels 'triton' has no form for {reason}.*: torch takes this sweep"):
        got = loss(triton)
    assert got == expected
    assert loss(dataclasses.replace(plain, kernels="auto")) == expected  # without a word


def test_float64_is_taken_by_torch_with_one_line() -> None:
    b = moved(batch())
    with pytest.warns(UserWarning, match="no form for float64 logits"):
        token_logps(b.hidden, both(b)[1], b.tokens)


def test_no_tokens_keep_the_graph() -> None:
    b = moved(converted(batch((0, 0)), torch.float32))
    loss = single_pass(b.hidden, both(b)[1], b.tokens, lambda logp, part, _: -logp).loss
    loss.backward()
    assert loss == 0.0
    assert all(leaf.grad is not None for leaf in b.leaves)
