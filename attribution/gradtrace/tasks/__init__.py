"""Ready-made tasks for a model and data: image, text and tabular classification, tabular regression, and Hugging Face
models of language."""

from gradtrace.tasks.base import data_file
from gradtrace.tasks.image import ImageClassification
from gradtrace.tasks.language import CausalLM, SequenceClassification, SequenceToSequence, TokenClassification
from gradtrace.tasks.tabular import TabularClassification, TabularRegression
from gradtrace.tasks.text import TextClassification, Vocabulary

__all__ = [
    "CausalLM",
    "ImageClassification",
    "SequenceClassification",
    "SequenceToSequence",
    "TabularClassification",
    "TabularRegression",
    "TextClassification",
    "TokenClassification",
    "Vocabulary",
    "data_file",
]
