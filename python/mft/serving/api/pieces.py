"""Send the pieces of one answer to its client, whole or as a stream of events, until the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mft.serving.api.answer import END, TextAnswer, event
from mft.serving.batch.generation import Generation, Piece
from mft.serving.batch.scheduler import Scheduler
from mft.serving.refusal import Refused


class Pieces:
    """The pieces of one request's generations, as they come. Call leave() at the end: it frees their places.

    queue: of pairs (index of the generation, its piece).
    tell: called once with each generation, its status and how it ended.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        queue: "asyncio.Queue[tuple[int, Piece]]",
        scheduler: Scheduler,
        tell: Callable[[Generation, int, str], None],
    ) -> None:
        self._generations, self._queue, self._scheduler, self._tell = generations, queue, scheduler, tell
        self._endings = [(499, "cancelled")] * len(generations)  # by the client, until a generation ends

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index, piece); the last piece of each index has a finish. Raises: Refused instead of the rest."""
        left = len(self._generations)
        while left:
            index, piece = await self._queue.get()
            if piece.refused is not None:
                self._endings[index] = piece.refused.status, piece.refused.message
                raise piece.refused
            if piece.finish is not None:
                self._endings[index], left = (200, piece.finish), left - 1
            yield index, piece

    def usage(self, n: int) -> dict[str, int]:
        """Return the tokens of all, with the prompt of each n generations counted once."""
        prompt = sum(len(each.prompt) for each in self._generations[::n])
        made = sum(each.tokens for each in self._generations)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def leave(self) -> None:
        for generation, ending in zip(self._generations, self._endings, strict=True):
            self._scheduler.cancel(generation)
            self._tell(generation, *ending)


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


async def events(answer: TextAnswer, pieces: Pieces, n: int, *, with_usage: bool) -> AsyncIterator[str]:
    for text in answer.first():
        yield text
    try:
        async for index, piece in pieces:
            yield answer.piece(index, piece)
    except Refused as refused:
        yield event(refused.body())
        return
    if with_usage:
        yield answer.usage(pieces.usage(n))
    yield END


async def whole(answer: TextAnswer, pieces: Pieces, n: int) -> Response:
    made = {index: piece async for index, piece in pieces}  # whole ones: see AnswerText
    in_order = [made[index] for index in sorted(made)]
    # Beside the event loop: the log-probabilities of a long prompt take a second.
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(in_order, pieces.usage(n))))


async def unless_client_leaves(request: Request, pieces: Pieces, answer: Any) -> Response:
    made, gone = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())  # the body has been read
    try:
        await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else Response(status_code=499)
    finally:
        made.cancel()
        gone.cancel()
        pieces.leave()
