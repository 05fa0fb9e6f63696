"""Log-probabilities, losses and divergences from hidden states: values, gradients, edges, bad input, memory."""

from typing import Any

import pytest
import torch

import mirrorpo
from kernels_batch import H, V, batch, converted, distance, gradients, head
from mirrorpo.kernels import (
    Anchor,
    Head,
    VocabularyTerm,
    exact_from_hidden,
    idle,
    single_pass,
    token_logps,
    top_k_from_hidden,
)
from mirrorpo.kernels import sweep as sweeping
from mirrorpo.kernels.head import memory_advice
from naive import CASES, Case, logits

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap, scale, bias": {"bias": True, "softcap": 2.0, "scale": 1.5, "temperature": 0.7},
}
# Of float16 and bfloat16: the unit roundoff.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def expected_logps(all_logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = all_logits.log_softmax(-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64, None])
@pytest.mark.parametrize("name", HEADS)
def test_log_probabilities_and_entropies_are_those_of_full_logits_for_every_chunk(name: str, chunk: int | None) -> None:
    b = batch(**HEADS[name])
    weights = logits(2, len(b.tokens), seed=9)
    expected, got = (
        expected_logps(b.head.logits(b.hidden), b.tokens),
        token_logps(b.hidden, b.head, b.tokens, chunk=chunk),
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    losses = [sum((w * x).sum() for w, x in zip(weights, pair, strict=True)) for pair in (got, expected)]
    assert distance(gradients(losses[0], b.leaves), gradients(losses[1], b.leaves)) < 1e-12


def test_the_gradient_of_one_result_alone_is_right_too() -> None:
    b = batch()
    for place in (0, 1):
        got, expected = (
            pair[place].sum()
            for pair in (token_logps(b.hidden, b.head, b.tokens), expected_logps(b.head.logits(b.hidden), b.tokens))
        )
        assert distance(gradients(got, b.leaves), gradients(expected, b.leaves)) < 1e-12


@pytest.mark.parametrize("name", HEADS)
def test_two_passes_pass_gradcheck(name: str) -> None:
    b = batch((2, 1), vocabulary=5, **HEADS[name])

    def found(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        policy = Head(weight, b.head.bias, b.head.softcap, b.head.scale, b.head.temperature)
        d = mirrorpo.divergence("js")
        exact = exact_from_hidden(d, hidden, policy, b.reference.hidden, b.reference.head, chunk=2)
        return *token_logps(hidden, policy, b.tokens, chunk=2), exact

    assert torch.autograd.gradcheck(found, (b.hidden, b.head.weight))


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("name", HEADS)
def test_a_single_pass_is_its_sum_over_tokens(name: str, upstream: float) -> None:
    b = batch(**HEADS[name])
    weights, entropy_weights, term_weights = logits(3, len(b.tokens), seed=9)
    d = mirrorpo.divergence("hellinger")
    done = single_pass(
        b.hidden,
        b.head,
        b.tokens,
        lambda logp, part, values: weights[part] * logp.exp() * logp,
        terms=(VocabularyTerm(divergence=d, anchor=b.reference),),
        term_weights=(term_weights,),
        entropy_weights=entropy_weights,
        chunk=4,
    )
    all_logits = b.head.logits(b.hidden)
    logp, entropy = expected_logps(all_logits, b.tokens)
    exact = d.exact(all_logits, b.reference.head.logits(b.reference.hidden))
    loss = (weights * logp.exp() * logp + entropy_weights * entropy + term_weights * exact).sum()
    torch.testing.assert_close(done.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.values[0], exact, rtol=1e-12, atol=1e-12)
    got, expected = (gradients(upstream * x, b.leaves) for x in (done.loss, loss))
    assert distance(got, expected) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_divergences_are_those_of_full_logits(case: Case) -> None:
    d, b = mirrorpo.divergence(case.name, **case.options), batch(bias=True)
    upstream = logits(len(b.tokens), seed=9)
    p, q = b.head.logits(b.hidden).softmax(-1), b.reference.head.logits(b.reference.hidden).softmax(-1)
    expected = case.divergence(p, q)  # by its definition
    for dtype, tolerance in ((torch.float64, max(1e-9, 10 * case.tolerance)), (torch.float32, 2e-5)):
        x = converted(b, dtype) if dtype == torch.float32 else b
        got = exact_from_hidden(d, x.hidden, x.head, x.reference.hidden, x.reference.head, chunk=4)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        truth = torch.autograd.grad((upstream * expected).sum(), b.leaves, retain_graph=True)
        assert distance(gradients((upstream.to(dtype) * got).sum(), x.leaves), list(truth)) < tolerance


@pytest.mark.parametrize("spread", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("name", ["neural", "prob_l2", "kl", "beta", "itakura_saito", "js", "reverse_kl", "alpha"])
def test_float32_divergences_lose_no_more_than_the_logits_did(name: str, spread: float) -> None:
    options = {"beta": {"beta": 1.5}, "alpha": {"alpha": -0.5}}.get(name, {})
    d, b = mirrorpo.divergence(name, **options), batch(vocabulary=501)
    near = Anchor(hidden=b.hidden.detach() + spread * logits(*b.hidden.shape, seed=8), head=b.head.detached())
    truth = d.exact(b.head.logits(b.hidden), near.head.logits(near.hidden))
    x = converted(b, torch.float32)
    near32 = Anchor(hidden=near.hidden.float(), head=x.head.detached())
    got = exact_from_hidden(d, x.hidden, x.head, near32.hidden, near32.head)
    # What float32 logits allow at best: the same divergence of them, in float64.
    at_best = d.exact(x.head.logits(x.hidden).double(), near32.head.logits(near32.hidden).double())
    scale = truth.detach().abs().amax()
    assert (got - truth).abs().amax() <= 3.0 * (at_best - truth).abs().amax() + 3e-6 * scale
    upstream = torch.ones_like(truth)
    grads = [
        torch.autograd.grad(v, leaves, w)[0].double()
        for v, leaves, w in (
            (truth, b.hidden, upstream),
            (got, x.hidden, upstream.float()),
            (at_best, x.hidden, upstream),
        )
    ]
    allowed = 3.0 * (grads[2] - grads[0]).norm() + 3e-6 * grads[0].norm()
    assert (grads[1] - grads[0]).norm() <= allowed


@pytest.mark.parametrize("k", [1, 3, V, V + 5])
@pytest.mark.parametrize("name", ["reverse_kl", "js", "prob_l2", "neural", "log_l2"])
def test_top_k_is_that_of_full_logits(name: str, k: int) -> None:
    d = mirrorpo.divergence(name)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        b = batch(bias=True)
        upstream = logits(len(b.tokens), seed=9)
        expected = d.top_k(b.head.logits(b.hidden), b.reference.head.logits(b.reference.hidden), b.tokens, k)
        x = converted(b, dtype)
        got = top_k_from_hidden(d, x.hidden, x.head, x.reference.hidden, x.reference.head, x.tokens, k, chunk=4)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        one = gradients((upstream.to(dtype) * got).sum(), x.leaves)
        assert distance(one, gradients((upstream * expected).sum(), b.leaves)) < tolerance


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_16_bit_inputs_lose_no_more_than_rounding_the_gradients(dtype: torch.dtype) -> None:
    low = converted(batch(bias=True), dtype)
    # The truth for these very numbers: float64 copies of the rounded inputs.
    truth = converted(low, torch.float64)
    objective = mirrorpo.objective("grpo")

    def loss(logp: torch.Tensor) -> torch.Tensor:
        return objective(logp=logp, **{k: v.to(logp) if v.dtype != torch.bool else v for k, v in given.items()}).loss

    given = {k: truth.shared()[k] for k in ("advantages", "mask", "logp_old", "logp_ref")}
    expected = gradients(loss(truth.logp(truth.head.logits(truth.hidden))), truth.leaves)
    logp, _ = token_logps(low.hidden, low.head, low.tokens, chunk=4)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(
        low.padded(logp).double(), truth.logp(truth.head.logits(truth.hidden)), rtol=1e-5, atol=1e-5
    )
    got = torch.autograd.grad(loss(low.padded(logp)), low.leaves)
    assert [g.dtype for g in got] == [dtype] * len(got)
    assert distance([g.double() for g in got], expected) < UNIT[dtype]


def test_mixed_dtypes_and_autocast_meet_in_float32() -> None:
    b = converted(batch(), torch.float32)
    expected = token_logps(b.hidden.bfloat16().float(), b.head, b.tokens)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logps(b.hidden.bfloat16(), b.head, b.tokens)[0]
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("frozen", ["weight", "hidden", "all"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    full, b = batch(), batch()
    b.head.weight.requires_grad_(frozen == "hidden")
    b.hidden.requires_grad_(frozen == "weight")

    def loss(x: Any) -> torch.Tensor:
        return single_pass(x.hidden, x.head, x.tokens, lambda logp, part, _: -logp, chunk=4).loss

    expected = dict(zip(("hidden", "weight"), gradients(loss(full), full.leaves), strict=True))
    got = loss(b)
    assert got.requires_grad == (frozen != "all")
    if frozen != "all":
        (grad,) = torch.autograd.grad(got, b.leaves)
        torch.testing.assert_close(grad, expected["hidden" if frozen == "weight" else "weight"], rtol=0.0, atol=0.0)
    with torch.no_grad():
        torch.testing.assert_close(loss(full), got.detach(), rtol=0.0, atol=0.0)


def test_a_tied_weight_gets_both_gradients() -> None:
    b = batch()
    table = logits(V, H, seed=3).requires_grad_()
    ids = torch.arange(len(b.tokens)) % V

    def grad(fused: bool) -> torch.Tensor:
        hidden, tied = torch.tanh(table[ids]), Head(table)
        logp = (
            token_logps(hidden, tied, b.tokens, chunk=3) if fused else expected_logps(tied.logits(hidden), b.tokens)
        )[0]
        return torch.autograd.grad(logp.sum(), table)[0]

    torch.testing.assert_close(grad(True), grad(False), rtol=1e-12, atol=1e-12)


def test_accumulated_micro_batches_are_the_whole_batch() -> None:
    b = batch()
    parts = (slice(0, 4), slice(4, 5), slice(5, len(b.tokens)))

    def run(parts: tuple[slice, ...]) -> list[torch.Tensor]:
        for leaf in b.leaves:
            leaf.grad = None
        for part in parts:
            single_pass(b.hidden[part], b.head, b.tokens[part], lambda logp, _, __: -logp / 10).loss.backward()
        return [leaf.grad for leaf in b.leaves if leaf.grad is not None]

    assert distance(run(parts), run((slice(0, len(b.tokens)),))) < 1e-12


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (1,), (1, 0, 1)])
@pytest.mark.parametrize("function", ["single_pass", "token_logps", "exact"])
def test_few_or_no_tokens_keep_the_graph(function: str, lengths: tuple[int, ...]) -> None:
    b = batch(lengths)
    if function == "single_pass":
        loss = single_pass(b.hidden, b.head, b.tokens, lambda logp, part, _: -logp).loss
    elif function == "token_logps":
        loss = -token_logps(b.hidden, b.head, b.tokens)[0].sum()
    else:
        d = mirrorpo.divergence("js")
        loss = exact_from_hidden(d, b.hidden, b.head, b.reference.hidden, b.reference.head).sum()
    loss.backward()
    assert all(leaf.grad is not None for leaf in b.leaves)
    assert (loss == 0) == (sum(lengths) == 0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("second", [0.0, 1e-3])
def test_tokens_without_a_gradient_are_passed_over(chunk: int, second: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "WORTH", {"cpu": 1})  # else so few are multiplied with the others
    seen: list[int] = []
    inner = sweeping.add_weight_grad_

    def counted(out: torch.Tensor, grad: torch.Tensor, *rest: Any) -> None:
        seen.append(len(grad))
        inner(out, grad, *rest)

    monkeypatch.setattr(sweeping, "add_weight_grad_", counted)
    b = batch((8, 8))
    weights = torch.zeros(16, dtype=torch.float64)
    weights[9] = 1.0
    weights[11] = second
    term = VocabularyTerm(divergence=mirrorpo.divergence("js"), anchor=b.reference)
    done = single_pass(
        b.hidden,
        b.head,
        b.tokens,
        lambda logp, part, _: weights[part] * logp,
        terms=(term,),
        term_weights=(torch.zeros(16, dtype=torch.float64),),
        chunk=chunk,
    )
    logp = expected_logps(b.head.logits(b.hidden), b.tokens)[0]
    expected = logp[9] + weights[11] * logp[11]
    exact = term.divergence.exact(b.head.logits(b.hidden), b.reference.head.logits(b.reference.hidden))
    torch.testing.assert_close(done.values[0], exact, rtol=1e-12, atol=1e-14)
    assert distance(gradients(done.loss, b.leaves), gradients(expected, b.leaves)) < 1e-12
    # from the first to the last with a gradient, chunk by chunk
    live = weights.nonzero().squeeze(1)
    spans = [live[(live >= first) & (live < first + chunk)] for first in range(0, 16, chunk)]
    assert seen == [int(span[-1] - span[0]) + 1 for span in spans if len(span)]


def test_a_second_backward_pass_of_a_single_pass_says_what_to_do() -> None:
    b = batch()
    loss = single_pass(b.hidden, b.head, b.tokens, lambda logp, part, _: -logp).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_a_token_that_cannot_occur_has_no_part_in_anything() -> None:
    b = batch(bias=True)
    assert b.head.bias is not None
    with torch.no_grad():
        b.head.bias[V - 1] = -torch.inf
    tokens = b.tokens % (V - 1)
    logp, entropy = token_logps(b.hidden, b.head, tokens)
    small = Head(b.head.weight[:-1], b.head.bias[:-1])
    expected = token_logps(b.hidden, small, tokens)
    torch.testing.assert_close((logp, entropy), expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(logp.sum() + entropy.sum(), b.leaves)
    assert all(torch.isfinite(g).all() for g in grads)


def test_far_logits_stay_finite_in_float32() -> None:
    weight = torch.tensor([[0.0], [300.0], [-300.0]], requires_grad=True)
    hidden, tokens = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.tensor([2, 1])
    logp, entropy = token_logps(hidden, Head(weight), tokens)
    torch.testing.assert_close(logp, torch.tensor([-600.0, -600.0]))
    far = Head(-weight.detach())
    for name in ("reverse_kl", "forward_kl", "chi2", "prob_l2", "itakura_saito", "neural"):
        d = mirrorpo.divergence(name)
        value = exact_from_hidden(d, hidden, Head(weight), hidden.detach(), far)
        grads = torch.autograd.grad(value.sum(), (hidden, weight))
        assert all(torch.isfinite(x).all() for x in (value, entropy, *grads)), name


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "width": (
        {"hidden": torch.zeros(10, H + 1)},
        rf"hidden must be a floating \(N, {H}\), got torch.float32 \(10, 6\)",
    ),
    "number": (
        {"tokens": torch.zeros(9, dtype=torch.long)},
        r"tokens must be integers \(10,\), got torch.int64 \(9,\)",
    ),
    "dtype": ({"tokens": torch.zeros(10)}, "tokens must be integers"),
    "above": ({"tokens": torch.full((10,), V)}, rf"tokens must be in \[0, {V}\), got {V}"),
    "below": ({"tokens": torch.full((10,), -100)}, rf"tokens must be in \[0, {V}\), got -100"),
    "chunk": ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
    "chunk type": ({"chunk": True}, "chunk must be an integer >= 1, got True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_value_and_what_is_legal(name: str) -> None:
    b = batch()
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        token_logps(**({"hidden": b.hidden, "head": b.head, "tokens": b.tokens} | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Head(torch.zeros(3)), r"weight must be a floating \(V, H\)"),
        (lambda: Head(torch.zeros(3, 2), torch.zeros(2)), r"bias must have shape \(3,\), got \(2,\)"),
        (lambda: Head(torch.zeros(3, 2), temperature=0.0), "temperature must be a number"),
        (lambda: Head(torch.zeros(3, 2), softcap=-1.0), "softcap must be a number"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_anchor_that_does_not_fit_is_refused() -> None:
    b, d = batch(), mirrorpo.divergence("js")
    with pytest.raises(ValueError, match=f"vocabulary has {V + 1} tokens, the policy's {V}"):
        exact_from_hidden(d, b.hidden, b.head, b.hidden, head(vocabulary=V + 1))
    with pytest.raises(ValueError, match="must have 10 rows, those of hidden, got 3"):
        exact_from_hidden(d, b.hidden, b.head, b.hidden[:3], b.head)
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        top_k_from_hidden(d, b.hidden, b.head, b.hidden, b.head, b.tokens, 0)
    with pytest.raises(ValueError, match="term_weights must hold 0 entries"):
        single_pass(b.hidden, b.head, b.tokens, None, term_weights=(None,))
    with pytest.raises(ValueError, match=r"entropy_weights must have shape \(10,\), got \(1,\)"):
        single_pass(b.hidden, b.head, b.tokens, None, entropy_weights=torch.ones(1))


def test_out_of_memory_names_the_chunk_and_what_would_fit() -> None:
    huge = Head(torch.zeros(1, 1).expand(2**50, 1))  # a row of its logits is beyond every address space
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory with chunk=2: .* not even chunk=1 fits"):
        token_logps(torch.zeros(2, 1), huge, torch.zeros(2, dtype=torch.long), chunk=64)


def test_the_advice_is_a_chunk_that_fits() -> None:
    small = Head(torch.zeros(8, 2))
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"chunk=512: its logits take 2 x 512 x 8 .* chunk=256 fits"),
        memory_advice(small, 512, 2, torch.device("cpu"), 4),
    ):
        raise torch.OutOfMemoryError("as an accelerator's allocator says it")
    with pytest.raises(RuntimeError, match="another"), memory_advice(small, 512, 2, torch.device("cpu"), 4):
        raise RuntimeError("another")


def test_no_more_than_a_chunk_of_logits_is_alive() -> None:
    vocabulary, count, chunk = 5000, 64, 8
    x = converted(batch((32, 32), vocabulary=vocabulary), torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        single_pass(x.hidden, x.head, x.tokens, lambda logp, part, _: -logp, chunk=chunk).loss.backward()
    largest = max(event.self_cpu_memory_usage for event in found.events())
    assert largest <= 2 * chunk * vocabulary * 4 < count * vocabulary * 4
