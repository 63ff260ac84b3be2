"""Each test has its own place for what processes share, so that a ban in one is not known to the next."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_runtime_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("runtime")))
