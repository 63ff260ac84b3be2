"""A user's own model: one Python file with a class that satisfies the interface, checked before it is trained.

The class is called as ``Name(d_in, d_out, layers, dropout)``. A class attribute ``continuous = True`` says that its
state moves with the elapsed time. Reading the file runs it: that happens only for a file that the user named, or
for the copy in a run folder that the user said to trust.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
import types
from functools import cache
from pathlib import Path
from typing import cast

from recur.models.parity import ParityError, check_parity
from recur.models.registry import Core, Make
from recur.vocabulary import UsageError, did_you_mean

TOLERANCE = 1e-9
_WIDTHS = ((5, 8, 1), (20, 16, 2))  # d_in, d_out, layers; two widths, since one may be written into the class


def source_sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


@cache
def own_core(source: bytes, name: str, path: str) -> Core:
    """Run ``source``, once per process, and return its class ``name`` once it has shown parity in float64.

    ``path`` is for messages. UsageError in one line, with the numbers, for a file that fails, a class that is not
    there or does not satisfy the interface, or ways of running that disagree by more than 1e-9.
    """
    module = _run(source, path)
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        classes = [
            k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__
        ]
        raise UsageError(
            f"{path} has no class '{name}': found {', '.join(classes) or 'none'}.{did_you_mean(name, classes)}",
            "Give the model as path/to/file.py:Name.",
        )
    make = cast(Make, cls)
    for d_in, d_out, layers in _WIDTHS:
        where = f"{path}:{name}(d_in={d_in}, d_out={d_out}, layers={layers}, dropout=0)"
        try:
            report = check_parity(lambda a=d_in, b=d_out, c=layers: make(a, b, c, 0.0), TOLERANCE)  # type: ignore[misc]
        except ParityError as error:
            raise UsageError(f"{where} does not satisfy the interface: {error.message}", _HINT) from error
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            raise UsageError(f"{where} failed: {_where(error, path)}", _HINT) from error
        if not report.passed:
            raise UsageError(
                f"{where} fails parity in float64: largest differences {report}, tolerated {TOLERANCE:g}.",
                _HINT,
            )
    return Core(
        f"{Path(path).name}:{name}", make, continuous=bool(getattr(cls, "continuous", False)), source=source
    )


_HINT = "docs/training.md says what a model must do."


def _run(source: bytes, path: str) -> types.ModuleType:
    module = types.ModuleType(f"recur_own_{source_sha256(source)[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and torch look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 (the user asked for it)
    except (Exception, SystemExit) as error:
        raise UsageError(f"The model file {path} cannot be run: {_where(error, path)}", _HINT) from error
    return module


def _where(error: BaseException, path: str) -> str:
    """``TypeError: … (line 12)``: the innermost line of the user's own file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line, what = lines[-1] if lines else None, str(error)
    if isinstance(error, SyntaxError):
        line, what = error.lineno, error.msg
    return f"{type(error).__name__}: {what}" + ("" if line is None else f" (line {line})")
