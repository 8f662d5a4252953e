"""Keep an answer within a JSON schema: llguidance says which tokens may come next."""

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from mft.serving.refusal import Refused

# One line, written as json.dumps does: with free white space, small models may write nothing else.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_SECONDS = 3.0  # to read a schema: a pattern of 64 others in allOf takes longer than a minute
_CHECK = (
    "import sys, llguidance as l;"
    "print(l.LLMatcher.validate_grammar(sys.stdin.read(), limits=l.LLParserLimits(verbose_errors=False)))"
)


class JsonGrammars:
    """Reads schemas for a tokenizer. ends: the tokens that may come after the JSON text."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._for_llguidance: Any = None
        self._making = threading.Lock()

    def read(self, schema: dict[str, Any]) -> "JsonGrammar":
        """Return a schema's grammar. Raises: Refused if the server or llguidance cannot follow it."""
        param = "response_format"
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise Refused(
                f"{param} must be text, got a schema, but the server lacks llguidance: install "
                "mft_kernels[serve] or llguidance there",
                param=param,
            ) from None
        with self._making:  # takes 0.3 s with SmolLM2's tokenizer
            try:
                self._for_llguidance = self._for_llguidance or llguidance.hf.from_tokenizer(
                    self._tokenizer, eos_token=sorted(self._ends)
                )
            except ValueError as error:
                message = f"{param} must be text with this base, got a schema, but llguidance says: {error}"
                raise Refused(message, param=param) from None
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_STYLE)
        except ValueError as error:
            raise _refused(str(error)) from None
        _check(grammar)
        matcher = llguidance.LLMatcher(
            self._for_llguidance, grammar, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return JsonGrammar(matcher)


class JsonGrammar(LogitsProcessor):
    """Forbids the tokens that leave a grammar. Each answer needs its own copy."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._begun = matcher, False

    def copy(self) -> "JsonGrammar":
        return JsonGrammar(self._matcher.deep_copy())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._begun:
            self._matcher.consume_token(int(input_ids[0, -1]))
        self._begun = True
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # too much work for one token, or rules that refer to themselves without end
            raise _refused(self._matcher.get_error())
        allowed = torch.from_numpy(np.unpackbits(bits, count=scores.shape[-1], bitorder="little")).bool()
        return scores.masked_fill(~allowed, -torch.inf)


@functools.lru_cache(256)
def _check(grammar: str) -> None:
    """Raise Refused if llguidance cannot read a grammar within 3 s. It has no limit itself, so a process tries."""
    try:
        command = [sys.executable, "-I", "-X", "utf8", "-c", _CHECK]
        done = subprocess.run(command, input=grammar, capture_output=True, encoding="utf-8", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise _refused(f"reading it takes more than {_SECONDS:g} s") from None
    if done.returncode or done.stdout.strip():
        raise _refused(done.stdout.strip() or "reading it fails")


def _refused(message: str) -> Refused:
    param = "response_format.json_schema.schema"
    return Refused(
        f"{param} must be a JSON schema that llguidance can follow, got one that it cannot: {message[:300]}",
        param=param,
    )
