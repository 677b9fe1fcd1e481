"""Every comparison on MNIST, and on CIFAR-10 where it was trained before: minutes of one core."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.__main__ import prepared

COMPARISONS = ("tracincp", "ekfac", "trak")


def main() -> None:
    datasets = []
    for dataset in ("mnist", "cifar10"):
        if obstacle := prepared(dataset):
            print(f"{dataset} is left out: {obstacle}.\n", flush=True)
        else:
            datasets.append(dataset)
    for name in COMPARISONS if datasets else ():
        subprocess.run([sys.executable, "-m", f"benchmarks.peers.{name}", *datasets], check=True)
        print(flush=True)


if __name__ == "__main__":
    main()
