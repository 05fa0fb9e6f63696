"""Studies: arms x seeds over one base recipe, and the statistics of their differences.

Imported by the commands ``mirrorpo study`` and ``mirrorpo report``; nothing here is needed to train.
"""

from mirrorpo.config.study import Study, load_study, study_from

__all__ = ["Study", "load_study", "study_from"]
