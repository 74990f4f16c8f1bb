"""Passes that change weights, and the checkpoint that holds their result."""
