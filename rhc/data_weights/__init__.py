"""Data weights: a weight on the loss of every cell, which is an example, a class, a source of data
or a term of the loss."""

from rhc.data_weights.cells import DATA_WEIGHTS, DataWeights, indexed
from rhc.data_weights.course import FEW, Course
from rhc.data_weights.loss import (
    Factors,
    Judged,
    Weighed,
    factors_of,
    leaves_of,
    per_cell,
    per_row,
    taken_slopes,
    unweighed,
    weighed,
    weighing,
)
from rhc.data_weights.rows import Numbered, RowLosses, row_losses, with_index
from rhc.data_weights.update_rule import Evidence, Observation

__all__ = [
    "DATA_WEIGHTS",
    "FEW",
    "Course",
    "DataWeights",
    "Evidence",
    "Factors",
    "Judged",
    "Numbered",
    "Observation",
    "RowLosses",
    "Weighed",
    "factors_of",
    "indexed",
    "leaves_of",
    "per_cell",
    "per_row",
    "row_losses",
    "taken_slopes",
    "unweighed",
    "weighed",
    "weighing",
    "with_index",
]
