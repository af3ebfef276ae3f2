"""MovieLens: data, split, models and their comparison."""
