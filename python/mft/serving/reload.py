"""On SIGHUP, read the keys and the list of masks again. A faulty file or entry changes nothing."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

from mft.masks.location import masks_directory
from mft.serving.api.api_keys import ApiKeys
from mft.serving.log import Log
from mft.serving.refusal import Refused
from mft.serving.task_list import read_masks_file
from mft.serving.tasks import Tasks


class MasksFile:
    """The file of --masks-file. loaded: {task: directory} loaded from it."""

    def __init__(self, path: Path) -> None:
        self.path, self.loaded = path, read_masks_file(path)


class Reload:
    """Reloads the keys and the list of masks on SIGHUP, if the server has them."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_asked = False
        self._running: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # one list of masks at a time, so that the newest one is the last
        self._has_next = False

    @contextlib.contextmanager
    def catching_hang_up(self) -> Iterator[None]:
        """Make SIGHUP in the block ask for a reload instead of ending the process. Call it on the main thread."""
        before = signal.signal(signal.SIGHUP, lambda *_: self._ask())
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def begin(self, tasks: Tasks, keys: ApiKeys | None, masks_file: MasksFile | None) -> None:
        """Reload on signals from now on, on the running loop; at once if one has come. None: the server has none."""
        self._tasks, self._keys, self._masks_file = tasks, keys, masks_file
        self._loop = asyncio.get_running_loop()
        if self._is_asked:
            self._start()

    def _ask(self) -> None:
        self._is_asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        task = asyncio.ensure_future(self.run())
        self._running.add(task)  # asyncio itself keeps no reference to a task
        task.add_done_callback(self._running.discard)

    async def run(self) -> None:
        """Read both files again, and load and unload the tasks whose entries have changed."""
        self._log.tell("reloading", "SIGHUP: reading the keys and the list of masks again")
        if self._keys is not None:
            try:
                self._keys.read_again()
                self._log.tell("reloaded", f"API keys: {len(self._keys)}", keys=len(self._keys))
            except (ValueError, OSError) as error:
                self._fail(f"the keys stay as they were: {error}")
        if self._masks_file is None or self._has_next:  # the next one will read the file as it is then
            return
        self._has_next = True
        async with self._turn:
            self._has_next = False
            await self._reload_masks(self._masks_file)

    async def _reload_masks(self, file: MasksFile) -> None:
        try:
            listed = await asyncio.to_thread(read_masks_file, file.path)
        except (ValueError, OSError) as error:
            self._fail(f"the masks stay as they were: {error}")
            return
        before = file.loaded
        gone = [task for task in before if task not in listed and task in self._tasks.names]
        new = [task for task in listed if listed[task] != before.get(task) or task not in self._tasks.names]
        loading = (self._load(task, listed[task], before) for task in new)
        await asyncio.gather(*(self._unload(task, before) for task in gone), *loading)
        self._log.tell("reloaded", f"serving {', '.join(self._tasks.names)}", models=list(self._tasks.names))

    async def _load(self, task: str, place: str, loaded: dict[str, str]) -> None:
        try:
            directory = await asyncio.to_thread(masks_directory, place)
            await self._tasks.load(task, directory, replace=True)
            loaded[task] = place
            self._log.tell("loaded", f"loaded {task} from {place}", model=task)
        except (ValueError, RuntimeError, OSError) as error:
            self._fail(f"{task} stays as it was: {error}")

    async def _unload(self, task: str, loaded: dict[str, str]) -> None:
        del loaded[task]
        try:
            await self._tasks.unload(task)
            self._log.tell("unloaded", f"unloaded {task}", model=task)
        except Refused as refused:  # a client has unloaded it already
            self._fail(refused.message)

    def _fail(self, message: str) -> None:
        self._log.tell("reload_failed", message, level=logging.ERROR)
