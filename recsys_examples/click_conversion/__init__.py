"""Click and conversion: multi-task models where the second label needs the first."""
