"""Work on many tasks in a few threads, results as they come, with a way out at any moment.

``concurrent.futures`` joins its threads when the interpreter ends, so Ctrl-C would wait for every request in
flight. These threads are daemons: an abandoned request is simply dropped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Task, Result]):
    """What became of one task: a result, or the error that ``work`` raised."""

    task: Task
    result: Result | None = None
    error: Exception | None = None


class Parallel(Generic[Task, Result]):
    """Iterate over it once to get an ``Outcome`` per task, in the order in which they finish.

    Tasks start in the given order, at ``start`` or with the iteration. At most ``ahead`` outcomes wait to be taken, so a slow consumer slows the
    work down and does not fill the memory.
    """

    def __init__(
        self, tasks: Iterable[Task], work: Callable[[Task], Result], workers: int, ahead: int = 200
    ) -> None:
        self._tasks = iter(tasks)
        self._work = work
        self._workers = workers
        self._started = self._stopped = False
        self._lock = threading.Lock()
        self._free = threading.Semaphore(max(ahead, workers))
        self._outcomes: queue.SimpleQueue[Outcome[Task, Result] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to work, before anybody takes an outcome."""
        if not self._started:
            self._started = True
            for number in range(self._workers):
                threading.Thread(target=self._run, name=f"fetch-{number}", daemon=True).start()

    def stop(self) -> None:
        """Start no further task; those being worked on still give their outcome to whoever goes on iterating."""
        self._stopped = True
        self._free.release(self._workers)

    def __iter__(self) -> Iterator[Outcome[Task, Result]]:
        self.start()
        running = self._workers
        while running:
            outcome = self._outcomes.get()
            if outcome is None:
                running -= 1
            else:
                self._free.release()
                yield outcome

    def _run(self) -> None:
        while True:
            self._free.acquire()
            with self._lock:
                task = None if self._stopped else next(self._tasks, None)
            if task is None:
                self._outcomes.put(None)
                return
            try:
                self._outcomes.put(Outcome(task, result=self._work(task)))
            except Exception as error:  # noqa: BLE001  handed to the consumer, who raises it
                self._outcomes.put(Outcome(task, error=error))
