"""The names of the models, known before TensorFlow is loaded."""

SINGLE_TASK = "single-task"
SHARED_BOTTOM = "shared bottom"
EQUAL_BOTTOM = "shared bottom, equal size"  # to the layer that it is compared with
BASELINES = (SINGLE_TASK, SHARED_BOTTOM, EQUAL_BOTTOM)
LAYERS = ("OMoE", "MMoE", "sparse MMoE", "PLE", "AdaTT", "STEM", "HoME")
CHOICES = (SINGLE_TASK, SHARED_BOTTOM, *LAYERS)
