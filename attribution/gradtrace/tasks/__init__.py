"""Ready-made tasks: give them a model and data."""

from gradtrace.tasks.files import data_file
from gradtrace.tasks.image import ImageClassification
from gradtrace.tasks.tabular import TabularClassification, TabularRegression
from gradtrace.tasks.text import TextClassification
from gradtrace.tasks.vocabulary import Vocabulary

__all__ = [
    "ImageClassification",
    "TabularClassification",
    "TabularRegression",
    "TextClassification",
    "Vocabulary",
    "data_file",
]
