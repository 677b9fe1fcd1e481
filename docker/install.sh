#!/bin/sh
# What the images install: a virtual environment with Gradtrace in TARGET. `make docker-check` runs the same.
# usage: install.sh SOURCE TARGET TORCH [pip's options for PyTorch]
set -eu
source=$1 target=$2
shift 2
python3 -m venv "$target"
# PyTorch first, so that no later requirement chooses another build of it.
"$target/bin/python" -m pip install --no-cache-dir "$@"
"$target/bin/python" -m pip install --no-cache-dir "$source/client" "$source[cpu]"
"$target/bin/python" -m pip check
"$target/bin/gradtrace" --help > /dev/null
