"""prime-rl: an objective of this library as its custom loss, called once for each sequence.

.. code-block:: toml

    [trainer.loss]
    type = "custom"
    import_path = "mirrorpo.integrations.prime_rl.loss"
    kwargs = { objective = "objective.yaml" }

The documented call (PrimeIntellect-ai/prime-rl, ``docs/algorithms.md``, "Custom Loss", read at commit 559b4477): the
function gets ``LossInputs`` with flat tensors of one sequence, prompt included, (seq,): ``trainer_logprobs``,
``inference_logprobs``, ``advantages``, ``loss_mask``, and since the component losses ``ref_logprobs`` and
``loss_weights`` (both may be None). It returns ``LossOutputs(loss, metrics)`` with the SUM over the tokens of the mask;
prime-rl adds the sequences and divides by the number of tokens of all ranks, of those whose weight is not 0. So
``token_mean`` is what it can express.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from mirrorpo.integrations.shared import Reach, SeamError, check_expressible, expressible
from mirrorpo.losses.objective import Objective

REACH = Reach(
    framework="prime-rl",
    aggregations={"token_mean": {}},  # its only denominator
    advantages={"dr_grpo": {"orchestrator.algo.type": "grpo"}},  # the reward minus the group's mean
    rollout_policies=1,  # inference_logprobs
)
_NEEDED = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
_OPTIONAL = ("ref_logprobs", "loss_weights")


def loss(inputs: Any, objective: str | Mapping[str, Any]) -> Any:
    r"""A sequence's contribution to the loss: :math:`\sum_t m_t (\text{policy}_t + \text{penalty}_t)\, c_t`.

    The trust region is around the policy that sampled (``inference_logprobs``): prime-rl hands no other.

    Args:
        inputs: prime-rl's ``LossInputs``, tensors (seq,).
        objective: an objective file, its text in braces, a mapping (a TOML table) or a preset's name.

    Returns:
        prime-rl's ``LossOutputs``: the summed loss, and the metrics under ``mirrorpo/``, each once for every token of
        the mask: prime-rl joins the sequences' and takes mean and maximum, so its means are over tokens.

    Raises:
        InputError: an objective that prime-rl cannot express.
        SeamError: ``LossInputs`` has other fields than those that are documented.
        ValueError: a penalty without reference log-probabilities.

    Reference: prime-rl, docs/algorithms.md, "Custom Loss"; tests/integrations/test_prime_rl.py.
    """
    chosen = expressible(objective if isinstance(objective, str) else json.dumps(objective), REACH)
    given = _fields(inputs)
    ref = given["ref_logprobs"]
    if chosen.needs_reference:
        _check_reference(chosen, ref, given["loss_mask"])
    weights = given["loss_weights"]
    terms = chosen.terms(
        logp=_row(given["trainer_logprobs"]),
        logp_old=_row(given["inference_logprobs"]),
        logp_sampler=_row(given["inference_logprobs"]),
        logp_ref=None if ref is None else _row(ref),
        advantages=_row(given["advantages"]),
        mask=_row(given["loss_mask"]),
    )
    per_token = terms.loss if weights is None else terms.loss * _row(weights)
    total = per_token.masked_fill(~terms.mask, 0.0).sum()
    outputs = import_module(type(inputs).__module__).LossOutputs
    tokens = int(terms.mask.sum())
    metrics = {f"mirrorpo/{name}": value.expand(tokens) for name, value in terms.metrics().items()}
    return outputs(loss=total, metrics=metrics)


def _fields(inputs: Any) -> dict[str, Tensor | None]:
    """What prime-rl sent, by name; a field that a version does not have is None."""
    names = {field.name for field in dataclasses.fields(inputs)}
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise SeamError(
            f"prime-rl's LossInputs has no {missing[0]!r} (it has {', '.join(sorted(names))}): its custom-loss call "
            f"moved; mirrorpo reads {', '.join(_NEEDED)}"
        )
    return {name: getattr(inputs, name) if name in names else None for name in (*_NEEDED, *_OPTIONAL)}


def _check_reference(objective: Objective, ref: Tensor | None, mask: Tensor | None) -> None:
    """Refuses a row without reference log-probabilities.

    Where rows with and without them share a micro-batch, prime-rl fills the rows that have none with zeros: a
    probability of 1 for every token.
    """
    assert mask is not None
    if ref is not None and (not mask.any() or bool(ref[mask.bool()].any())):
        return
    found = (
        "no ref_logprobs" if ref is None else "a row whose ref_logprobs are all 0, which is how it fills missing ones"
    )
    raise ValueError(
        f"objective {objective.name!r} has a penalty toward the reference and prime-rl sent {found}. None of its "
        "algorithms scores the tokens of the policy loss with a reference: set coefficient: 0, an anchor 'sampler', or "
        "an algorithm of your own that sets ref_logprobs on every sample"
    )


def _row(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.unsqueeze(0)


def settings(source: str, objective: Objective) -> str:
    """prime-rl's TOML for an objective file.

    Raises:
        InputError: what prime-rl cannot express.
    """
    check_expressible(objective, REACH)
    lines = [
        "[trainer.loss]",
        'type = "custom"',
        'import_path = "mirrorpo.integrations.prime_rl.loss"',
        f"kwargs = {{ objective = {_quoted(source)} }}",
        "",
        "[orchestrator.algo]",
        'type = "grpo"',
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
