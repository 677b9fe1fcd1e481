"""What the process imports from which worker processes are forked. It starts no thread and no CUDA."""

from __future__ import annotations

import gc
import signal

gc.disable()  # a fifth of the time of the imports was spent on looking for garbage in them

import gradtrace_service.answers.influence  # noqa: E402
import gradtrace_service.indexes.catalog  # noqa: E402, F401  (imported for the workers, which open their indexes by it)

# A supervisor may send SIGTERM to the whole group: the service, which ends this process with itself, decides.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

gc.freeze()  # PyTorch's modules are never garbage: looking at all of them again and again took workers 0.15 s each time
gc.enable()
