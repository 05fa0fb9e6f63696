"""verl, prime-rl, slime and SkyRL: an objective of this library through their own hooks, one module each.

Nothing numerical lives here: names and shapes are converted, ``Objective.terms`` is called, and the framework's own
average is taken. No module imports another framework; importing this package imports none.
"""
