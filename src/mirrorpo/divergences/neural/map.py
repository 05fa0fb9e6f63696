r"""The neural mirror map of GBMPO: 380 non-negative numbers choose the generator.

.. math:: h'(x) = \phi^{-1}(x) = \sum_{j=1}^{126} v_j \sigma_j(w_j x + b_j) + a x + c \log x,
          \qquad d_h(x, z) = \int_z^x (h'(s) - h'(z)) ds

(an omega-potential; GBMPO, arXiv 2602.04380). h' increases because every parameter is >= 0; that is checked here, for
every map, however it was made: a map outside the non-negative orthant is not a divergence. a = 2 alone is ProbL2, c = 1
alone is KL, and every map is locally a mixture of the two (``neural_table``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mirrorpo._checks import Float, Tensor
from mirrorpo.divergences.base import Term
from mirrorpo.divergences.bregman import BregmanDivergence
from mirrorpo.divergences.neural.generator import (
    GROUPS,
    NUM_PARAMETERS,
    NUM_UNITS,
    SLICES,
    TARGETS,
    UNITS_PER_GROUP,
    closest,
    curvature,
    phi_inv,
    project,
)
from mirrorpo.divergences.neural.table import Table, build_table
from mirrorpo.errors import check_number, unknown_name

INIT_SCALE = 0.01  # GBMPO
SOURCES = ("seed", "path", "parameters", "like")
# Below this curvature at x = 1 a divergence is 0 in every dtype.
_SMALLEST_CURVATURE = 1e-200
# Beyond this h itself may leave float64.
_LARGEST_CURVATURE = 1e250
# Below this d and its slope stay within float32 for every log-probability that a float32 batch holds.
_LARGEST_ORDINARY = 1e30
# Above this the digits of float32 are left to what a token of probability 1e-8 contributes.
_SMALLEST_ORDINARY = 1e-20


@dataclass(frozen=True, eq=False)
class MirrorMap:
    """The parameters of a neural mirror map, checked.

    Attributes:
        parameters: (380,), float64, on the CPU: v, w, b (126 each, group by group), a, c. Given in any floating dtype,
            on any device; copied. Other forms: ``MirrorMap.of``.
        origin: where it comes from, for people.
        fit_error: for a map made by ``like``: the largest relative error of h'' on [1e-4, 1], which bounds that of
            the divergence and of its gradient there.

    Raises:
        ValueError: a wrong number of parameters, one that is negative or not finite (it is named), a map that is
            constant (its divergence would be zero) or too steep for float64.

    Reference: GBMPO, arXiv 2602.04380.

    Example:
        >>> MirrorMap(torch.full((380,), 0.005)).divergence().name
        'neural'
    """

    parameters: Tensor
    origin: str = "given"
    fit_error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", checked(self.parameters))

    def __repr__(self) -> str:
        error = "" if self.fit_error is None else f", fit_error={self.fit_error:.3g}"
        return f"MirrorMap({self.origin}{error})"

    @classmethod
    def of(cls, given: object) -> MirrorMap:
        """A map from a tensor, an array or a list of 380 numbers, a mapping with exactly the keys v, w, b, a, c, or a
        map.

        Example:
            >>> MirrorMap.of({"v": [0.0] * 126, "w": [0.0] * 126, "b": [0.0] * 126, "a": 2.0, "c": 0.0})
            MirrorMap(given)
        """
        return given if isinstance(given, MirrorMap) else cls(checked(given))

    @classmethod
    def random(cls, seed: object = 0, scale: object = INIT_SCALE) -> MirrorMap:
        """Parameters uniform on [0, scale]; the global random state is not touched.

        Raises:
            ValueError: a seed that is not an integer >= 0, a scale outside (0, 10].
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2^63), got {seed!r}")
        largest = check_number("scale", scale, 0.0, 10.0, open_low=True)
        generator = torch.Generator().manual_seed(seed)
        return cls(
            largest * torch.rand(NUM_PARAMETERS, generator=generator, dtype=torch.float64, device="cpu"),
            f"random, seed {seed}",
        )

    @classmethod
    def like(cls, name: object) -> MirrorMap:
        """The closest map to a named divergence; ``fit_error`` says how close.

        Raises:
            ValueError: another name than ``kl``, ``prob_l2`` or ``itakura_saito``.

        Example:
            >>> MirrorMap.like("prob_l2").fit_error < 1e-14
            True
            >>> MirrorMap.like("itakura_saito").fit_error > 0.9  # nothing here is as steep
            True
        """
        if not isinstance(name, str) or name not in TARGETS:
            raise unknown_name("like", name, TARGETS)
        parameters, error = closest(TARGETS[name])
        return cls(parameters, f"like {name}", error)

    def phi_inv(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """h'(x) by its definition, float64."""
        return phi_inv(self.parameters, x)

    def divergence(self) -> NeuralDivergence:
        """The divergence of this map; building its table takes a few milliseconds."""
        table = build_table(self.parameters)
        steepness = curvature(self.parameters, torch.ones(1, dtype=torch.float64, device="cpu")).item()
        return NeuralDivergence(
            "neural",
            coordinate=table,
            table=table,
            map=self,
            growth_known=steepness < _LARGEST_ORDINARY,
            fits_float32=_SMALLEST_ORDINARY < steepness < _LARGEST_ORDINARY,
        )


@dataclass(frozen=True)
class NeuralDivergence(BregmanDivergence):
    """The Bregman divergence of a neural mirror map.

    Attributes:
        table: what is evaluated.
        map: the parameters.
        fits_float32: whether values and slopes are numbers of float32, whatever the log-probabilities.
    """

    table: Table = field(kw_only=True)
    map: MirrorMap = field(kw_only=True)
    fits_float32: bool = field(default=False, kw_only=True)

    def _sampled(self, logp: Tensor, logq: Tensor, guard: bool) -> Term:
        return self.table.between(logp.double(), logq.double(), guard)

    def term(self, logx: Tensor, logz: Tensor) -> Term:
        return self.table.between(logx, logz)

    def _in_float32(self, logx: Tensor, logz: Tensor) -> Term | None:
        return self.table.between_float32(logx, logz) if self.fits_float32 else None


def checked(given: Any) -> Tensor:
    """The parameters as a new (380,) float64 tensor on the CPU; see ``MirrorMap`` for what is refused."""
    parameters = _from_mapping(given) if isinstance(given, Mapping) else _numbers("parameters", given, NUM_PARAMETERS)
    bad = (~(parameters >= 0) | parameters.isinf()).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"{parameter_name(at)} must be in [0, inf), got {parameters[at].item()!r}")
    # Everything in h'' but c/x is largest at 1, and c/x is ordinary wherever c is.
    steepness = curvature(parameters, torch.ones(1, dtype=torch.float64, device="cpu")).item()
    if not steepness < _LARGEST_CURVATURE:
        raise ValueError(
            f"parameters give phi_inv a slope of {steepness:g} at 1, legal: below {_LARGEST_CURVATURE:g}; "
            "an exp unit v exp(w + b) grows fastest"
        )
    if steepness < _SMALLEST_CURVATURE:
        raise ValueError(
            "parameters give a constant phi_inv, so its divergence would be zero: "
            "at least one of a, c or v_j w_j must be positive"
        )
    return parameters


def parameter_name(index: int) -> str:
    """The name of that place of the vector.

    Example:
        >>> parameter_name(0), parameter_name(126 + 22), parameter_name(379)
        ("v[0] (group 'cube')", "w[22] (group 'square')", 'c')
    """
    name, place = next((name, place) for name, place in SLICES.items() if place.start <= index < place.stop)
    if name in ("a", "c"):
        return name
    unit = index - place.start
    return f"{name}[{unit}] (group {GROUPS[unit // UNITS_PER_GROUP]!r})"


def _from_mapping(given: Mapping[Any, Any]) -> Tensor:
    for key in given:
        if key not in SLICES:
            raise unknown_name("parameters key", key, SLICES)
    for key in SLICES:
        if key not in given:
            raise ValueError(f"parameters need the keys {', '.join(SLICES)}, but {key!r} is missing")
    return torch.cat([_numbers(f"parameters[{key!r}]", given[key], at.stop - at.start) for key, at in SLICES.items()])


def _numbers(name: str, given: Any, count: int) -> Tensor:
    """``count`` numbers in a row, as a new float64 tensor on the CPU."""
    try:  # untrusted: whatever the caller or a file holds
        # Lists hold Python's floats, which are float64; an array or a tensor knows its own type.
        numbers = torch.as_tensor(
            given, dtype=torch.float64 if isinstance(given, list | tuple | int | float) else None, device="cpu"
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be {count} numbers, got {type(given).__name__} ({error})") from None
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"{name} must be {count} real numbers, got dtype {numbers.dtype}")
    if numbers.numel() != count or numbers.dim() > 1:
        raise ValueError(f"{name} must be {count} numbers, got shape {tuple(numbers.shape)}")
    return numbers.detach().to("cpu", torch.float64, copy=True).reshape(count)


__all__ = [
    "GROUPS",
    "INIT_SCALE",
    "NUM_PARAMETERS",
    "NUM_UNITS",
    "SLICES",
    "UNITS_PER_GROUP",
    "MirrorMap",
    "NeuralDivergence",
    "phi_inv",
    "project",
]
