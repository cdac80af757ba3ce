"""The loop of `rhc.Runner`, in functions of a `Fit` and a `Window`; `windows` has its verbs."""
