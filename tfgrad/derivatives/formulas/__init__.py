"""The table of gradients that TensorFlow 2.21 has wrong or lacks, each put right.

The formulas consist of ops whose own gradients are right, so derivatives of every order
are. A complex gradient is the conjugate of the derivative times what arrives, as
everywhere in TensorFlow.
"""

from tfgrad.derivatives.formulas import decompositions, reductions
from tfgrad.derivatives.formulas.elementary import is_in_moments
from tfgrad.derivatives.formulas.signals import POOLING
from tfgrad.derivatives.formulas.table import TABLE, Gradient

__all__ = [
    "POOLING",
    "TABLE",
    "Gradient",
    "decompositions",
    "is_in_moments",
    "reductions",
]
