"""The loop that `rhc.Runner` runs: its verbs are functions of a `Fit` and a `Window`.

`windows` has the verbs, `steps` what they have in common: steps of the live plant. `fit` is what
does not change during a fit, `state` what does. `update_rule` proposes schedules, `base_schedule`
is the one that nothing is rewritten in, `window_objective` says what a way through a window is
worth, `budget` what may be spent, `shift` whether the data changed. `lr_search` comes before the
first step, `epochs` asks a planner what follows, `checkpointing` saves and resumes, `records`
writes, `agreement` keeps ranks alike, `checks` are settings that depend on the optimizer.
"""
