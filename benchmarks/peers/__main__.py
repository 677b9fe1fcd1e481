"""Every comparison on MNIST, and on CIFAR-10 where it was trained before: minutes of one core.

Words on the command line go to each comparison instead: `python -m benchmarks.peers digits --rows 100`.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.__main__ import prepared

COMPARISONS = ("tracincp", "ekfac", "trak")


def main() -> None:
    words = sys.argv[1:] or trained()
    for name in COMPARISONS if words else ():
        subprocess.run([sys.executable, "-m", f"benchmarks.peers.{name}", *words], check=True)
        print(flush=True)


def trained() -> list[str]:
    """The data sets that can be had; says what is in the way of the others."""
    datasets = []
    for dataset in ("mnist", "cifar10"):
        if obstacle := prepared(dataset):
            print(f"{dataset} is left out: {obstacle}.\n", flush=True)
        else:
            datasets.append(dataset)
    return datasets


if __name__ == "__main__":
    main()
