"""All benchmarks, one after the other; the figures go to ``benchmarks/results.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import features
import startup
import store
import training
from common import Results

if __name__ == "__main__":
    results: Results = {}
    for part in (startup, store, features, training):
        results |= part.measure("--quick" in sys.argv)
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=2) + "\n")
