"""The rooms of the loop that `rhc.Runner` runs, each a class that is given what it works with.

`windows` takes one window from the state before it to the attempt that is committed. It has
`rolling` roll until that is finite, `looking` look back, `surprise` see that the data changed, and
`rewriting` propose, replay and compare; these have `judge` say what a way through the window is
worth, and `steps` move the plant. `committing` makes it final, and `epochs` asks the planner what
follows. `beginning` is what comes before the first step, `saving` writes and reads checkpoints.

`state` is what evolves, in one record: each room says what it writes there. `course` is the plan
and the budget, which decide from it; `records` what is told and written of it; `checks` settings
that depend on the optimizer. Imports point from the rooms down to these, and no room knows the
Runner.
"""

from rhc.loop.state import Attempt, Cost, Loop, Moment, Window

__all__ = ["Attempt", "Cost", "Loop", "Moment", "Window"]
