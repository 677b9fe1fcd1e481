"""Ready-made tasks of Hugging Face models: a model's directory and a file of data, no Python of one's own.

`options` has what a task is made from, `tasks` makes a task of it, and each kind of model has a module. `pretrained`
reads models, `records` reads data, `encoding` turns records into tokens, and `summary` counts them. Nothing is
downloaded. transformers, peft and datasets are imported where they are needed.
"""

from gradtrace.tasks.language.causal import CausalLM
from gradtrace.tasks.language.classification import SequenceClassification, TokenClassification
from gradtrace.tasks.language.options import TASK_FILE, LanguageOptions, TaskFile
from gradtrace.tasks.language.seq2seq import SequenceToSequence
from gradtrace.tasks.language.summary import TokenSummary, batch_size, rows_at_a_time, token_summary
from gradtrace.tasks.language.task import LanguageTask
from gradtrace.tasks.language.task_file import language_task, read_task_file, task_file_text

__all__ = [
    "TASK_FILE",
    "CausalLM",
    "LanguageOptions",
    "LanguageTask",
    "SequenceClassification",
    "SequenceToSequence",
    "TaskFile",
    "TokenClassification",
    "TokenSummary",
    "batch_size",
    "language_task",
    "read_task_file",
    "rows_at_a_time",
    "task_file_text",
    "token_summary",
]
