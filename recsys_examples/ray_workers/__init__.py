"""A multi-task model trained by several workers of Ray Train."""
