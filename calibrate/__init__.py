"""What is learned about a model before it is changed: pipeline, structure, clock, calibration set, ranges, cost, quality."""
