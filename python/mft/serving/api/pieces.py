"""Send the pieces of one answer to its client, whole or as a stream of events, until the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from openai.types import CompletionUsage
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mft.serving.api.answer import END, TextAnswer, refusal_event
from mft.serving.batch.generation import Generation, Piece
from mft.serving.batch.scheduler import Scheduler
from mft.serving.refusal import Refused


class Pieces:
    """The pieces of one generation, as they come. Call leave() at the end: it frees the generation's place.

    tell: called once, with the generation, its status and how it ended.
    """

    def __init__(
        self,
        generation: Generation,
        queue: "asyncio.Queue[Piece]",
        scheduler: Scheduler,
        tell: Callable[[Generation, int, str], None],
    ) -> None:
        self._generation, self._queue, self._scheduler, self._tell = generation, queue, scheduler, tell
        self._status, self._ending = 499, "cancelled"  # by the client, until the generation ends

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces; the last one has a finish. Raises: Refused instead of the rest."""
        while True:
            piece = await self._queue.get()
            if piece.refused is not None:
                self._status, self._ending = piece.refused.status, piece.refused.message
                raise piece.refused
            if piece.finish is not None:
                self._status, self._ending = 200, piece.finish
            yield piece
            if piece.finish is not None:
                return

    def usage(self) -> CompletionUsage:
        prompt, made = len(self._generation.prompt), self._generation.tokens
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)

    def leave(self) -> None:
        self._scheduler.cancel(self._generation)
        self._tell(self._generation, self._status, self._ending)


class Stream(StreamingResponse):
    """Server-sent events, until the answer ends or the client leaves."""

    def __init__(self, pieces: Pieces, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pieces.leave()


async def events(answer: TextAnswer, pieces: Pieces, *, with_usage: bool) -> AsyncIterator[str]:
    for text in answer.first():
        yield text
    try:
        async for piece in pieces:
            for text in answer.piece(piece.text, piece.finish):
                yield text
    except Refused as refused:
        yield refusal_event(refused)
        return
    if with_usage:
        yield answer.usage(pieces.usage())
    yield END


async def whole(answer: TextAnswer, pieces: Pieces) -> Response:
    made = [piece async for piece in pieces]
    finish = made[-1].finish
    assert finish is not None
    return JSONResponse(answer.whole("".join(piece.text for piece in made), finish, pieces.usage()))


async def unless_client_leaves(request: Request, pieces: Pieces, answer: Any) -> Response:
    made, gone = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())  # the body has been read
    try:
        await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else Response(status_code=499)
    finally:
        made.cancel()
        gone.cancel()
        pieces.leave()
