"""Which objective is better, and how sure is that? Arms x seeds over one base recipe, statistics, a report.

Imported by the commands ``mirrorpo study`` and ``mirrorpo report``; nothing here is needed to train.
"""

from mirrorpo.config.study import Study, load_study, study_from

__all__ = ["Study", "load_study", "study_from"]
