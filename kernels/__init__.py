"""What runs at inference, and its truth: affine arithmetic, storage layouts, integer operations and their dispatch."""
