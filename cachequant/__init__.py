"""Which calls of a trajectory compute and at which precision: cache plans, their planners and their executor."""
