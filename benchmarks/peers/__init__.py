"""Gradtrace's scores beside those of other libraries, on the same models, checkpoints, rows and queries: `make peers`.

Needs their virtual environment, which `make peers` creates from requirements.txt.
"""
