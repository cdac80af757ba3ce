"""The rooms of the loop that `rhc.Runner` runs.

`state` is where the loop stands: what evolves, in one record. The other modules say what moves it.
"""

from rhc.loop.state import Attempt, Cost, Loop, Moment, Window

__all__ = ["Attempt", "Cost", "Loop", "Moment", "Window"]
