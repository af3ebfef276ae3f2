"""The names of the models; importing them does not load TensorFlow."""

SINGLE_TASK = "single-task"
SHARED_BOTTOM = "shared bottom"
EQUAL_BOTTOM = "shared bottom, equal size"  # as many parameters as the best layer
BASELINES = (SINGLE_TASK, SHARED_BOTTOM, EQUAL_BOTTOM)
LAYERS = ("OMoE", "MMoE", "sparse MMoE", "PLE", "AdaTT", "STEM", "HoME")
CHOICES = (SINGLE_TASK, SHARED_BOTTOM, *LAYERS)
