"""The Census-Income example: two task groups, and models compared on one budget."""
