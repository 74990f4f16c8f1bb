"""What to do with a model, in which order: recipes, their stages, validation and the report."""
