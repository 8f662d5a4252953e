"""The tasks by the names that clients use. They can be loaded and unloaded while the service runs."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from os import PathLike

from mft.checks import check_rule, nearest
from mft.masks.bank import MaskBank
from mft.serving.batch.scheduler import Scheduler
from mft.serving.key import EVERYTHING, Key
from mft.serving.passing_thread import in_passing_thread
from mft.serving.refusal import Refused
from mft.serving.task_list import check_name

_MOST_SHOWN = 20  # names in a message


class Tasks:
    """The tasks of a bank, while the scheduler answers requests. base: the name of the base without masks."""

    def __init__(self, bank: MaskBank, scheduler: Scheduler, base: str, *, force: bool = False) -> None:
        self.bank, self.base = bank, base
        self._scheduler, self._force = scheduler, force
        self.on_unload: Callable[[str], None] = lambda name: None
        self._reading = asyncio.Lock()  # one export at a time: reading it takes a thread and memory

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request may ask for now, the base first."""
        return (self.base, *(task for task in self.bank.tasks if not self._scheduler.is_retiring(task)))

    def names_for(self, key: Key) -> tuple[str, ...]:
        return tuple(filter(key.knows, self.names))

    def find(self, model: str, *, param: str = "model", key: Key = EVERYTHING) -> str | None:
        """Return the task of a request's model, None for the base.

        Raises: Refused if there is no such name, or if the key may not call it, whether or not it exists.
        """
        key.check_model(model)
        if model == self.base:
            return None
        names = self.names_for(key)
        if model not in names:
            raise Refused(
                f"{param} must be one of {_name_list(names)}, got {model!r}{nearest(model, names)}",
                status=404,
                param=param,
                code="model_not_found",
            )
        return model

    async def load(
        self, name: str, directory: str | PathLike, *, replace: bool = False, most: int | None = None
    ) -> None:
        """Load one more task, or replace the masks of a task after its running requests have ended.

        Args: most: most tasks afterwards, if this is one more.
        Raises: ValueError that names lora_name, the parameter, if the name is invalid or taken, or one more than most;
            or as MaskBank.read. In each case, the tasks are as before.
        """
        check_name("lora_name", name)
        check_rule(name != self.base, "lora_name", "be another name than the base's", repr(name))
        async with self._reading:
            self._check_free(name, replace)
            loaded = len(self.bank.tasks)
            if most is not None and loaded >= most and name not in self.bank.tasks:
                raise ValueError(f"lora_name must be one of at most {most} tasks, got one more: unload another first")
            masks = await asyncio.to_thread(
                in_passing_thread, functools.partial(self.bank.read, directory, force=self._force)
            )
            self._check_free(name, replace)
            if name not in self.bank.tasks:
                await asyncio.to_thread(in_passing_thread, functools.partial(self.bank.put, name, masks))
                return

        def exchange() -> None:
            self.bank.remove(name)
            self.bank.put(name, masks)

        await self._call_when_unused(name, exchange)

    async def unload(self, name: str) -> None:
        """Refuse new requests of a task, wait for those that were accepted, and free its masks.

        Raises: Refused if there is no such task.
        """
        if self.find(name, param="lora_name") is None:
            raise Refused(f"lora_name must be a task's name, got the base's, {name!r}", param="lora_name")
        await self._call_when_unused(name, lambda: self.bank.remove(name))
        self.on_unload(name)

    def _check_free(self, name: str, replace: bool) -> None:
        if name not in self.bank.tasks:
            return
        if self._scheduler.is_retiring(name):
            raise ValueError(f"lora_name must be free, got {name!r}, which is being unloaded: try again later")
        if not replace:
            raise ValueError(
                f"lora_name must be new, got {name!r}, which has already been loaded: unload it first, or send "
                "load_inplace: true"
            )

    async def _call_when_unused(self, name: str, then: Callable[[], None]) -> None:
        """Call then when none of the task's requests is left."""
        done = Future[None]()
        done.set_running_or_notify_cancel()  # it goes on if whoever waits is cancelled

        def unused() -> None:
            try:
                then()
            except (ValueError, RuntimeError) as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._scheduler.retire(name, unused)
        await asyncio.wrap_future(done)


def _name_list(names: Sequence[str]) -> str:
    """Return names for a message, at most 20."""
    more = len(names) - _MOST_SHOWN
    shown = ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more (GET /v1/models)" if more > 0 else "")
    return shown or "the key's tasks, of which none is loaded"
