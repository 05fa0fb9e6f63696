"""Names that tests use as tools without saying where they come from.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import math

# Taken from the standard library where the tests do not import them.
LIBRARY = {
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple", "ChainMap"), "collections"),
    **dict.fromkeys(("isclose", "sqrt", "pi", "inf", "nan", "isnan"), "math"),
    "Fraction": "fractions",
    "Decimal": "decimal",
}
# Tools of other libraries, and of the standard library under a bare name: never the program's to define.
_OTHERS = (
    "np numpy pd pandas pytest scipy sp torch tf jnp jax sympy nx networkx plt sklearn mock hypothesis nose",
    "approx allclose is_close almost_equal is_almost_equal approx_equal approximately float_equal floats_equal",
    "nearly_equal close_enough assert_allclose assert_array_equal assert_almost_equal assert_equal assert_equals",
    "assertEqual assertTrue assertFalse assertAlmostEqual assertRaises assertIn raises eq_ ok_ array_equal",
    "array mean median norm literal_eval deepcopy reduce partial chain product permutations combinations",
)
TOOLS = frozenset(name for name in dir(math) if not name.startswith("_"))
TOOLS |= {name for line in _OTHERS for name in line.split()}
