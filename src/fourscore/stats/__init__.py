"""Paired statistics: differences with intervals that hold under clustering, verdicts, power. numpy and scipy only."""

from fourscore.stats.decide import Decision, Verdict, holm, intersection_union, non_inferiority, superiority
from fourscore.stats.known import McNemar, mcnemar, newcombe, tango
from fourscore.stats.paired import Paired, paired_difference
from fourscore.stats.power import smallest_effect_before
from fourscore.stats.seeds import SeedInterval, seeds_interval

__all__ = [
    "Decision",
    "McNemar",
    "Paired",
    "SeedInterval",
    "Verdict",
    "holm",
    "intersection_union",
    "mcnemar",
    "newcombe",
    "non_inferiority",
    "paired_difference",
    "seeds_interval",
    "smallest_effect_before",
    "superiority",
    "tango",
]
