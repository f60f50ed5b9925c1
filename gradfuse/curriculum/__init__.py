"""Curricula: a training step gets the easiest share of the data, or the beginning of sequences.

A schedule is any callable that gives the share in (0, 1] of a step:

    sampler = CurriculumSampler(difficulty, Competence(steps=5000), batch_size=64)
    loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=4)
    for x, y in loader:
        ...
        sampler.step()
"""

from gradfuse.curriculum.sampler import CurriculumSampler
from gradfuse.curriculum.schedules import BabySteps, Competence
from gradfuse.curriculum.sequence_length import SequenceLengthWarmup

__all__ = ["BabySteps", "Competence", "CurriculumSampler", "SequenceLengthWarmup"]
