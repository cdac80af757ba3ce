"""Data weights: a weight on the loss of every cell, which is an example, a class, a source of data
or a term of the loss."""

from rhc.data_weights.cells import DataWeights, indexed
from rhc.data_weights.loss import (
    Weighed,
    leaves_of,
    per_cell,
    per_row,
    taken_slopes,
    weighed,
    weighing,
)
from rhc.data_weights.update_rule import Evidence, Observation

__all__ = [
    "DataWeights",
    "Evidence",
    "Observation",
    "Weighed",
    "indexed",
    "leaves_of",
    "per_cell",
    "per_row",
    "taken_slopes",
    "weighed",
    "weighing",
]
