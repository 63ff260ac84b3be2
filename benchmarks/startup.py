"""Start-up: ``recur --help`` against importing Typer alone, whole processes, taking turns."""

from __future__ import annotations

import subprocess
import sys

from common import Results, interleaved, main, show


def measure(quick: bool) -> Results:
    commands = {
        "recur --help": [sys.executable, "-m", "recur.cli", "--help"],
        "python -c 'import typer'": [sys.executable, "-c", "import typer"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    jobs = {
        name: (lambda c=command: subprocess.run(c, stdout=subprocess.DEVNULL, check=True))  # type: ignore[misc]
        for name, command in commands.items()
    }
    taken = interleaved(jobs, 5 if quick else 15)
    floor = taken["python -c 'import typer'"]
    show(
        "Start-up",
        ("", "ms", "ratio"),
        [(n, f"{1000 * s:.0f}", f"{s / floor:.2f}") for n, s in taken.items()],
    )
    return {
        "startup": {
            "recur_help_s": taken["recur --help"],
            "import_typer_s": floor,
            "ratio": taken["recur --help"] / floor,
        }
    }


if __name__ == "__main__":
    main(measure, __doc__)
