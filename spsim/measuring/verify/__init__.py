"""Verification: real PyTorch layers run on the processes at hand, held against the simulation of the same layers.

Nothing here loads torch but what runs inside a rank.
"""

from spsim.measuring.verify.cases import VerifyCase, build_cases
from spsim.measuring.verify.comparison import CaseComparison, Prediction, Quantity, Verification, predict, verify
from spsim.measuring.verify.ranks import RankPool, count_ranks, open_ranks

__all__ = [
    "CaseComparison",
    "Prediction",
    "Quantity",
    "RankPool",
    "Verification",
    "VerifyCase",
    "build_cases",
    "count_ranks",
    "open_ranks",
    "predict",
    "verify",
]
