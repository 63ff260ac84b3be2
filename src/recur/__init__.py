"""Development shim: serve the repository root as the ``recur`` package (wheels do not contain this file)."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
