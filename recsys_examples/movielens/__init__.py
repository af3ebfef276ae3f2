"""The MovieLens example: data, split, models and their comparison."""
