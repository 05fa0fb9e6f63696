"""How do verl, prime-rl and slime optimise an objective of this library? Through their own hooks, one module each.

Nothing numerical lives here: names and shapes are converted, ``Objective.terms`` is called, and the framework's own
average is taken. No module imports another framework; importing this package imports none.
"""
