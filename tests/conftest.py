"""Each test has its own place for what processes share, so that a ban in one is not known to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.scripted import Reply, Scripted


@pytest.fixture(autouse=True)
def own_runtime_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("runtime")))


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*replies: Reply) -> Scripted:
        servers.append(Scripted(list(replies)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
