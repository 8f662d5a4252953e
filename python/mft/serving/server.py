"""A service on a port, until it is asked to stop: then nobody new is taken, and who is being answered has some time."""

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
    grace: seconds between being asked to stop and refusing what is not answered by then.
    connections: at most at once, beside those that are being answered (Connection.most).
    """

    def __init__(
        self, app: ASGIApp, scheduler: Scheduler, *, grace: float, connections: int, ready: Callable[[], None]
    ) -> None:

        class Limited(Connection):
            most = connections

        # httptools and uvloop are not taken where they happen to be installed: one way, the one that is tested.
        super().__init__(
            uvicorn.Config(
                app,
                http=Limited,
                # Beyond that requests get 503. Twice, as uvicorn counts those of closed connections for a moment too.
                limit_concurrency=2 * connections,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,  # its loggers are Python's, and what they say goes where the root's does
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=math.ceil(grace) + 5,  # for clients that do not take what they are refused
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
        await asyncio.to_thread(self._scheduler.join, self._grace)  # while the loop still takes its pieces

    def run_until_signal(self, sockets: list[socket.socket]) -> None:
        """Until SIGINT or SIGTERM, which end the service and not the process. On the main thread."""
        # Of the moment before uvicorn has its own handlers, and after: it raises what stopped it once more.
        before = {each: signal.signal(each, lambda *_: self._stop()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.run(sockets)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _stop(self) -> None:
        self.should_exit = True  # looked at every 0.1 s
