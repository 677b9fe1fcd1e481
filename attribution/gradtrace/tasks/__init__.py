"""Ready-made tasks for a model and data: image, text and tabular classification, and tabular regression."""

from gradtrace.tasks.base import data_file
from gradtrace.tasks.image import ImageClassification
from gradtrace.tasks.tabular import TabularClassification, TabularRegression
from gradtrace.tasks.text import TextClassification, Vocabulary

__all__ = [
    "ImageClassification",
    "TabularClassification",
    "TabularRegression",
    "TextClassification",
    "Vocabulary",
    "data_file",
]
