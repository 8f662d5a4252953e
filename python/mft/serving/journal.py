"""Record each request once: how it was answered, or why it was refused."""

import logging
import time
from typing import Any

from mft.serving.api.exchange import Exchange
from mft.serving.batch.generation import Generation
from mft.serving.log import Log
from mft.serving.prometheus import Metrics


class Journal:
    """Records requests in the log and in the metrics."""

    def __init__(self, log: Log, metrics: Metrics) -> None:
        self.log, self._metrics = log, metrics

    def record_answer(self, of: Exchange, answer_id: str, model: str, it: Generation, status: int, ending: str) -> None:
        """Record a generation that has ended or whose client has left. ending: stop, length, or why it ended early."""
        of.is_told = True
        seconds = (it.ended or time.monotonic()) - it.began
        self._metrics.count_answer(model, it, status, ending, seconds)
        first = it.first - it.began if it.first else None
        after = f", first token after {first:.2f} s" if first is not None else ""
        self.log.tell(
            "answer",
            f"{answer_id}{of.key.mark} {model} {status} {ending}: {len(it.prompt)} + {it.tokens} tokens "
            f"in {seconds:.2f} s{after}",
            level=logging.INFO if status < 500 else logging.ERROR,
            request_id=of.id,
            id=answer_id,
            key=of.key.name or None,
            model=model,
            status=status,
            ending=ending,
            prompt_tokens=len(it.prompt),
            completion_tokens=it.tokens,
            seconds=round(seconds, 4),
            first_token_seconds=None if first is None else round(first, 4),
            queue_seconds=round(it.joined - it.began, 4) if it.joined else None,
        )

    def record_response(self, of: Exchange, status: int) -> None:
        """Record that the response to a request begins, unless the request is recorded as an answer."""
        if of.is_told:
            return
        known: dict[str, Any] = {"request_id": of.id, "key": of.key.name or None, "method": of.method}
        known |= {"path": of.path[:200], "status": status}
        line = f"{of.id}{of.key.mark} {of.method} {of.path[:200]} {status}"
        if of.refused is None:
            self.log.tell("response", line, level=logging.DEBUG, **known)
            return
        of.is_told = True
        self._metrics.count_refusal(status, of.key.name)
        self.log.tell(
            "refusal",
            f"{line}: {of.refused.message}",
            level=logging.WARNING if status < 500 else logging.ERROR,
            **known,
            param=of.refused.param,
            code=of.refused.code,
            reason=of.refused.message,
        )
