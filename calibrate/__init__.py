"""What is learned about a model before it is changed: its structure, trajectories, ranges, cost and quality."""
