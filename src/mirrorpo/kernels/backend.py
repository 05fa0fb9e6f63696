"""The choice between the sweep in torch and the one in Triton, and what the second has a form for.

``kernels`` of a ``Head`` says what works on its logits: ``torch`` (the default), ``triton`` (two kernels, see
``triton_kernels``; needs a GPU, or Triton's interpreter on a CPU) or ``auto`` (Triton where it can be used). A sweep
that Triton has no form for is taken by torch; where ``triton`` was asked for, one line says why.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import partial

import torch

from mirrorpo.divergences import bregman, fdivergence
from mirrorpo.divergences.base import MAX_LOG_WEIGHT, Divergence
from mirrorpo.divergences.neural.map import NeuralDivergence
from mirrorpo.kernels.vocabulary import Entries, VocabularyTerm

# Family, name, option (alpha, beta), bound on the log-ratio: all that a kernel is compiled for.
Form = tuple[str, str, float, float]

_RATIO = {
    fdivergence.reverse_kl: "reverse_kl",
    fdivergence.forward_kl: "forward_kl",
    fdivergence.jeffreys: "jeffreys",
    fdivergence.js: "js",
    fdivergence.tv: "tv",
    fdivergence.chi2: "chi2",
    fdivergence.hellinger: "hellinger",
    fdivergence.alpha: "alpha",
    fdivergence.k1: "k1",
    fdivergence.k2: "k2",
    fdivergence.log_l2: "log_l2",
}
_BREGMAN = {
    bregman.kl_float32: "kl",
    bregman.prob_l2_float32: "prob_l2",
    bregman.itakura_saito: "itakura_saito",
    bregman.beta: "beta",
}


def form_of(divergence: Divergence) -> Form | None:
    """The form of a divergence that is evaluated as the table has it; None: torch alone knows it."""
    if type(divergence) is NeuralDivergence:
        return ("neural", "neural", 0.0, 0.0)
    if type(divergence) in (fdivergence.RatioDivergence, fdivergence.LogRatioPenalty):
        assert isinstance(divergence, fdivergence.RatioDivergence)
        function, options = _unwrapped(divergence.form)
        if divergence.float32_sums and function in _RATIO:
            bound = MAX_LOG_WEIGHT / max(1.0, divergence.growth)
            return ("ratio", _RATIO[function], float(options.get("alpha", 0.0)), bound)
    if type(divergence) is bregman.BregmanDivergence:
        function, options = _unwrapped(divergence.float32_term)
        bound = MAX_LOG_WEIGHT
        if function is bregman.clamped_float32:
            assert isinstance(divergence.float32_term, partial)
            coordinate, growth = divergence.float32_term.args
            function, options = _unwrapped(coordinate)
            bound = bregman.MAX_FLOAT32_LOG_RATIO / max(1.0, growth)
        if function in _BREGMAN:
            return ("bregman", _BREGMAN[function], float(options.get("beta", 0.0)), bound)
    return None


def _unwrapped(function: object) -> tuple[object, dict[str, float]]:
    return (function.func, function.keywords) if isinstance(function, partial) else (function, {})


def unavailable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on that device, in a few words; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install 'mirrorpo[kernels]'"
    if device.type != "cuda" and not interpreted():
        return f"Triton needs a GPU, the device is {device.type!r} (TRITON_INTERPRET=1 interprets, for tests)"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, slowly and anywhere."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def without_form(work: torch.dtype, terms: tuple[VocabularyTerm, ...]) -> str | None:
    """What of a sweep has no form in Triton; None: all has."""
    if work != torch.float32:
        return f"{str(work).removeprefix('torch.')} logits"
    for term in terms:
        if term.k is not None or isinstance(term.anchor, Entries):
            return "a divergence over K entries (top_k)"
        if form_of(term.divergence) is None:
            return f"divergence {term.divergence.name!r} as it is defined"
    return None


def check_available(kernels: str, device: torch.device) -> None:
    """Raises ``ValueError`` where ``triton`` is asked for and cannot run."""
    reason = unavailable(device) if kernels == "triton" else None
    if reason is not None:
        raise ValueError(f"kernels must be 'torch' or 'auto' here, got 'triton': {reason}")


def uses_triton(kernels: str, device: torch.device, work: torch.dtype, terms: tuple[VocabularyTerm, ...]) -> bool:
    """Whether a sweep goes through Triton's kernels.

    Raises:
        ValueError: ``triton`` is asked for and cannot run on that device.
    """
    if kernels == "torch":
        return False
    check_available(kernels, device)
    if unavailable(device) is not None:
        return False
    reason = without_form(work, terms)
    if reason is not None and kernels == "triton":
        warnings.warn(f"kernels 'triton' has no form for {reason}: torch takes this sweep", stacklevel=2)
    return reason is None


__all__ = ["Form", "check_available", "form_of", "interpreted", "unavailable", "uses_triton"]
