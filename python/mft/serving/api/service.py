"""OpenAI's routes: turn a request's bytes into a generation, and its pieces into an answer or a stream of events."""

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mft.checks import shown
from mft.serving.api.adapter_routes import Adapters
from mft.serving.api.answer import ChatAnswer, TextAnswer
from mft.serving.api.api_keys import ApiKeys, check_key
from mft.serving.api.body import Body, ChatBody, CompletionBody, TokenizeBody, most_bytes, read_body
from mft.serving.api.connection import check_room
from mft.serving.api.exchange import Exchanges, check_length, exchange_of, refuse
from mft.serving.api.hosts import check_host
from mft.serving.api.incoming import json_bytes
from mft.serving.api.pieces import Pieces, Stream, events, unless_client_leaves, whole
from mft.serving.api.token_texts import TokenTexts
from mft.serving.batch.answer_text import AnswerText
from mft.serving.batch.generation import Generation, Piece
from mft.serving.batch.json_grammar import JsonGrammar, JsonGrammars
from mft.serving.batch.sampling import Sampling, SamplingOptions
from mft.serving.batch.scheduler import Scheduler
from mft.serving.journal import Journal
from mft.serving.key import Key
from mft.serving.log import Log
from mft.serving.prometheus import CONTENT_TYPE, Metrics
from mft.serving.prompt import Prompt, Prompts
from mft.serving.refusal import Refused, failure
from mft.serving.tasks import Tasks
from mft_kernels import __version__

READ_AT_ONCE = 2  # bodies that are parsed and tokenised at once: two, so that a long one does not block a short one
Read = TypeVar("Read")


class Service:
    """Serves the base and the bank's tasks, each as a model by its name.

    length: most tokens of prompt and answer together. max_tokens: see Prompts. hosts: see hosts.known_hosts.
    keys: None if no key is needed. load_from: None if clients may not load masks.
    """

    def __init__(
        self,
        tasks: Tasks,
        tokenizer: Any,
        scheduler: Scheduler,
        *,
        length: int,
        max_tokens: int | None = None,
        log: Log,
        hosts: frozenset[str] | None = None,
        keys: ApiKeys | None = None,
        load_from: Path | None = None,
    ) -> None:
        self._tasks, self._scheduler, self._metrics = tasks, scheduler, Metrics(tasks, scheduler)
        self._journal = Journal(log, self._metrics)
        scheduler.on_step, tasks.on_unload = self._metrics.count_rows, self._metrics.forget
        scheduler.on_turn = self._deliver
        self._taken: list[tuple[asyncio.Queue[tuple[int, Piece]], tuple[int, Piece]]] = []
        self._prompts = Prompts(tokenizer, length, max_tokens)
        self._most_bytes, self._reading = most_bytes(length), asyncio.Semaphore(READ_AT_ONCE)
        self._reading_schema = asyncio.Semaphore(1)
        self._tokenizer = copy.deepcopy(tokenizer)  # the scheduler's thread decodes while others encode
        self._texts = TokenTexts(self._tokenizer)
        self._ends = _ends(tasks.bank.model, tokenizer)
        self._grammars = JsonGrammars(self._tokenizer, self._ends)
        self._started = int(time.time())
        adapters = Adapters(tasks, load_from, log)
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", partial(self._answer, CompletionBody, TextAnswer), methods=["POST"]),
                Route("/v1/chat/completions", partial(self._answer, ChatBody, ChatAnswer), methods=["POST"]),
                Route("/v1/load_lora_adapter", adapters.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/version", self._version),
                Route("/health", self._health),
                Route("/health/live", self._live),
                Route("/health/ready", self._ready),
                Route("/metrics", self._page_of_metrics),
            ],
            exception_handlers={Refused: _refusal, 404: _no_such_route, 405: _no_such_route, Exception: _failure},
        )
        checks = (
            check_length,
            partial(check_host, hosts=hosts, other=", or one that --allow-host names"),
            partial(check_key, keys=keys),
            check_room,
        )
        self.app = Exchanges(app, self._journal.record_response, checks)

    async def _health(self, _: Request) -> Response:
        running, waiting = self._scheduler.counts
        return JSONResponse({"running": running, "waiting": waiting})

    async def _live(self, _: Request) -> Response:
        if self._scheduler.has_failed:
            raise Refused("the server must be running, got one that failed", status=503)
        return JSONResponse({"status": "live"})

    async def _ready(self, _: Request) -> Response:
        if self._scheduler.is_closing:
            raise Refused("the server must be running, got one that is stopping", status=503)
        return JSONResponse({"status": "ready"})

    async def _page_of_metrics(self, _: Request) -> Response:
        return Response(self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        names = self._tasks.names_for(exchange_of(request.scope).key)
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._tasks.find(name, key=exchange_of(request.scope).key)
        return JSONResponse(self._card(name))

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _tokenize(self, request: Request) -> Response:
        read = partial(self._read_tokens, key=exchange_of(request.scope).key)
        tokens = await self._read_beside(request, read)
        return JSONResponse({"count": len(tokens), "max_model_len": self._prompts.length, "tokens": tokens})

    def _read_tokens(self, data: bytes, key: Key) -> list[int]:
        body = read_body(TokenizeBody, data)
        if body.model is not None:
            self._tasks.find(body.model, key=key)
        return self._prompts.tokenize(body)

    async def _read_beside(self, request: Request, read: Callable[[bytes], Read]) -> Read:
        """Return what read makes of a request's body, on another thread. Raises: Refused."""
        data = await json_bytes(request, self._most_bytes, ", 64 KiB and 32 bytes per token of --length")
        async with self._reading:
            return await asyncio.to_thread(read, data)

    async def _answer(self, kind: type[Body], form: type[TextAnswer], request: Request) -> Response:
        exchange = exchange_of(request.scope)
        body, task, prompts = await self._read_beside(request, partial(self._read, kind, key=exchange.key))
        echoes = [prompt.echo or "" for prompt in prompts for _ in range(body.n)]
        answer = form(body.model, exchange.id, self._texts, echoes)
        grammar = None
        if body.schema_to_follow is not None:
            async with self._reading_schema:  # one takes seconds at most, and bodies without one do not wait
                grammar = await asyncio.to_thread(self._grammars.read, body.schema_to_follow)
        tell = partial(self._journal.record_answer, exchange, answer.id, body.model)
        pieces = self._begin(body, task, prompts, grammar, exchange.key.name, tell)
        if body.stream:
            return Stream(pieces, events(answer, pieces, body.n, with_usage=body.stream_options.include_usage))
        return await unless_client_leaves(request, pieces, whole(answer, pieces, body.n))

    def _read(self, kind: type[Body], data: bytes, key: Key) -> tuple[Body, str | None, list[Prompt]]:
        """Return (a request's body, the task whose masks it takes, its prompts). Raises: Refused."""
        body = read_body(kind, data)
        task, most = self._tasks.find(body.model, key=key), self._scheduler.most
        asked = body.prompts * body.n
        if asked > most:
            param = "prompt" if body.n == 1 else "n"
            got = f"{asked} ({body.prompts} times {body.n})"
            raise Refused(f"{param} must ask for at most {most} answers (--rows and --waiting), got {got}", param=param)
        return body, task, self._prompts.read(body)

    def _begin(
        self,
        body: Body,
        task: str | None,
        prompts: Sequence[Prompt],
        grammar: JsonGrammar | None,
        key: str,
        tell: Callable[[Generation, int, str], None],
    ) -> Pieces:
        queue, self._loop = asyncio.Queue[tuple[int, Piece]](), asyncio.get_running_loop()
        options = SamplingOptions(**{field.name: getattr(body, field.name) for field in fields(SamplingOptions)})

        def take(index: int, piece: Piece) -> None:
            self._taken.append((queue, (index, piece)))

        generations: list[Generation] = []
        for prompt in prompts:
            echo = ("", ()) if prompt.echo is None else (prompt.echo, prompt.tokens)
            for choice in range(body.n):  # with seeds of their own, so that they differ
                own = options if options.seed is None else replace(options, seed=options.seed + choice)
                generation = Generation(
                    task,
                    prompt.tokens,
                    prompt.most,
                    Sampling(prompt.tokens, own, grammar and grammar.copy()),
                    AnswerText(self._tokenizer, body.stop, *echo, at_once=not body.stream),
                    self._ends,
                    partial(take, len(generations)),
                    logprobs=body.likeliest,
                    reads_prompt=prompt.echo is not None and body.likeliest is not None,
                )
                generation.key = key
                generations.append(generation)
        self._scheduler.submit(generations)
        return Pieces(generations, queue, self._scheduler, tell)

    def _deliver(self) -> None:
        """Give the event loop all pieces of a turn. It wakes once, as each wake takes time from the model's thread."""
        taken, self._taken = self._taken, []

        def put() -> None:
            for queue, piece in taken:
                queue.put_nowait(piece)

        if taken:
            self._loop.call_soon_threadsafe(put)

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "mft"}


async def _refusal(request: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return refuse(request.scope, refused)


async def _no_such_route(request: Request, error: Any) -> Response:
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    known = ", ".join(f"{'POST' if 'POST' in (route.methods or ()) else 'GET'} {route.path}" for route in routes)
    got = shown(f"{request.method} {request.scope['path']}")
    message = f"the request must be one of {known}, got {got}"
    return refuse(request.scope, Refused(message, status=error.status_code))


async def _failure(request: Request, error: Exception) -> Response:
    """Answer a request that ended with an unforeseen error, which uvicorn logs."""
    return refuse(request.scope, failure())


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those that the model names, else its tokenizer's."""
    said = getattr(model.generation_config, "eos_token_id", None)
    said = tokenizer.eos_token_id if said is None else said
    return frozenset(said if isinstance(said, list) else [said])
