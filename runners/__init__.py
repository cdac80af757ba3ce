"""Ready-made runs, each readable alone: a function from (seed, data) to an `rhc` Workload."""
