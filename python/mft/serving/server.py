"""Serve on a port until asked to stop: then new requests are refused, and running ones have some time to end."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from mft.serving.api.connection import Connection
from mft.serving.batch.scheduler import Scheduler


class Server(uvicorn.Server):
    """Args:
    grace: seconds between being asked to stop and refusing the requests that are not answered by then.
    connections: most connections at once (Connection.most).
    """

    def __init__(
        self, app: ASGIApp, scheduler: Scheduler, *, grace: float, connections: int, ready: Callable[[], None]
    ) -> None:

        class Limited(Connection):
            most = connections

        # httptools and uvloop are not used even if they are installed: only one configuration is tested.
        super().__init__(
            uvicorn.Config(
                app,
                http=Limited,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,  # uvicorn's loggers then pass their lines to the root logger
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=math.ceil(grace) + 5,  # for clients that do not read their refusal
            )
        )
        self._scheduler, self._grace, self._ready = scheduler, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.on_end = self._stop
        self._scheduler.start()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.close()
        cut = asyncio.get_running_loop().call_later(self._grace, self._scheduler.cut)
        await super().shutdown(sockets)
        cut.cancel()
        self._scheduler.cut()
        await asyncio.to_thread(self._scheduler.join, self._grace)  # the loop still runs and takes the thread's pieces

    def run_until_signal(self, sockets: list[socket.socket]) -> None:
        """Serve until SIGINT or SIGTERM, which end the service but not the process. Call it on the main thread."""
        # For signals before uvicorn installs its handlers, and after: uvicorn raises the signal that stopped it again.
        before = {each: signal.signal(each, lambda *_: self._stop()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.run(sockets)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _stop(self) -> None:
        self.should_exit = True  # uvicorn checks it every 0.1 s
