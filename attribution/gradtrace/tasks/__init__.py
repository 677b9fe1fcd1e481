"""Ready-made tasks: give them a model and data."""

from gradtrace.tasks.files import data_file
from gradtrace.tasks.image import ImageClassification

__all__ = ["ImageClassification", "data_file"]
