"""Turn a record into token ids and labels: chat messages, prompt and completion, plain text, or a preference pair.

labels repeat the scored ids and hold IGNORED elsewhere. Models shift them by one themselves.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import jinja2
import numpy

from mft.data.formats import FORMS, PREFERENCE, Chat, Completion, drop_filling, read_example, read_pair, read_string
from mft.data.sources import Records, form_of

IGNORED = -100
# Errors of a chat template, including its sandbox's refusals (SecurityError) and raise_exception.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError)
BATCH = 64  # records tokenised at a time: tokenizers spread a batch over the cores
PIECE = 2**20  # characters tokenised at a time; a tokenizer takes about 200 bytes per character


@dataclass
class Encoded:
    """ids and labels, both int32 (T,). starts: where examples begin; a pair has two, the chosen and the rejected."""

    ids: numpy.ndarray
    labels: numpy.ndarray
    starts: tuple[int, ...] = (0,)


@dataclass
class Documents:
    """The examples of one split, tokenised on demand."""

    records: Records
    encode: Callable[[Sequence[dict[str, Any]], Callable[[int], str]], list[Encoded]]
    is_text: bool
    empty: int = 0  # examples so far without a token to score
    _known: dict[int, Encoded] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records.rows)

    def encoded(self, order: Sequence[int]) -> Iterator[tuple[int, Encoded]]:
        """Yield (index, example) in this order. Examples without a token to score are left out and counted."""
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            new = [i for i in batch if i not in self._known]
            if new:
                found = self.encode([self.records.rows[i] for i in new], lambda j: self.records.place(new[j]))  # noqa: B023
                self._known.update(zip(new, found))
                self.empty += sum(not _scored(example) for example in found)
            for i in batch:
                if _scored(self._known[i]):
                    yield i, self._known[i]


def open_documents(records: Records, tokenizer: Any, *, assistant_only: bool, pairs: bool = False) -> Documents:
    """Return records as examples, by their columns. Raises: ValueError unless they are pairs just if pairs is True."""
    form = _form(records, pairs)
    if form == "text":
        return Documents(records, lambda rows, place: _texts(rows, place, tokenizer), is_text=True)
    of_arrow, templated = isinstance(records.rows, datasets.Dataset), bool(tokenizer.chat_template)

    def encoded(example: Chat | Completion, place: str) -> Encoded:
        if isinstance(example, Chat):
            return _chat(example, place, tokenizer, assistant_only)
        return _completion(example, tokenizer)

    def encode(rows: Sequence[dict[str, Any]], place: Callable[[int], str]) -> list[Encoded]:
        examples = []
        for j, row in enumerate(rows):
            row = drop_filling(row) if of_arrow else row
            if pairs:
                both = [encoded(example, place(j)) for example in read_pair(row, place(j))]
                examples.append(_pair(*both))
            else:
                examples.append(encoded(read_example(form, row, place(j), templated=templated), place(j)))
        return examples

    return Documents(records, encode, is_text=False)


def _form(records: Records, pairs: bool) -> str:
    lacking = [column for column in FORMS[PREFERENCE].needs if column not in records.columns]
    if pairs and lacking:
        raise ValueError(
            f"{records.place(0)}: data must have the columns chosen and rejected for the objective dpo, got "
            f"{', '.join(sorted(records.columns))}: give preference pairs, or set objective.name to another"
        )
    form = PREFERENCE if pairs else form_of(records)
    if form == PREFERENCE and not pairs:
        raise ValueError(
            f"{records.place(0)}: data must not be preference pairs (columns chosen and rejected) unless the objective "
            "compares answers: set objective.name=dpo, or rename the column of the answers to learn to completion"
        )
    return form


def _pair(chosen: Encoded, rejected: Encoded) -> Encoded:
    """Join the two of a pair; the result is empty unless both have a scored token."""
    if not (_scored(chosen) and _scored(rejected)):
        return _whole([])
    ids, labels = (numpy.concatenate([getattr(one, name) for one in (chosen, rejected)]) for name in ("ids", "labels"))
    return Encoded(ids, labels, (0, len(chosen.ids)))


def _texts(rows: Sequence[dict[str, Any]], place: Callable[[int], str], tokenizer: Any) -> list[Encoded]:
    """Encode texts as tokens + eos, all scored; an empty text has none. Long texts are split at line ends."""
    texts = [read_string(row, "text", place(j)) for j, row in enumerate(rows)]
    examples = []
    for group in _groups(texts):
        found = _tokens(group, tokenizer) if len(group[0]) <= PIECE else [_long_tokens(group[0], tokenizer)]
        for text, ids in zip(group, found):
            ids.extend(_eos_unless_there(ids, tokenizer))
            examples.append(_whole(ids if text.strip() else []))
    return examples


def _completion(example: Completion, tokenizer: Any) -> Encoded:
    """Encode prompt + completion + eos; completion and eos are scored."""
    prompt, completion = example.prompt, example.completion
    head, both = _tokens([prompt, prompt + completion], tokenizer)
    head = head[: len(head) - (head[-1:] == [tokenizer.eos_token_id])]  # some tokenizers close every text
    # At inference the prompt is tokenised alone, so the completion must continue exactly those tokens.
    tail = both[len(head) :] if both[: len(head)] == head else _tokens([completion], tokenizer, special=False)[0]
    tail = [*tail, *_eos_unless_there(tail, tokenizer)] if completion.strip() else []
    labels = [IGNORED] * len(head) + tail
    return Encoded(_array(head + tail), _array(labels))


def _chat(chat: Chat, place: str, tokenizer: Any, assistant_only: bool) -> Encoded:
    template = _template(tokenizer, place, chat.tools)
    if not chat.messages:
        return _whole([])
    _check_calls(chat, template, place)
    if not assistant_only and not chat.first:
        return _whole(apply_template(tokenizer, chat, chat.messages, place)["input_ids"])
    if re.search(r"\{%-?\s*generation\b", template) is None:
        return _encode_prefixes(tokenizer, chat, place)
    output = apply_template(tokenizer, chat, chat.messages, place, return_assistant_tokens_mask=True)
    ids, scored = output["input_ids"], numpy.array(output["assistant_masks"], dtype=bool)
    prompt = chat.messages[: chat.first]
    if any(message["role"] == "assistant" for message in prompt):
        before = apply_template(tokenizer, chat, prompt, place)["input_ids"]
        if ids[: len(before)] != before:
            raise _continuation_error(chat, chat.first, place)
        scored[: len(before)] = False
    return Encoded(_array(ids), numpy.where(scored, ids, IGNORED).astype(numpy.int32))


def _encode_prefixes(tokenizer: Any, chat: Chat, place: str) -> Encoded:
    """Score each assistant turn: what the template adds after the generation prompt, up to the end-of-turn token."""
    messages = chat.messages
    ids = apply_template(tokenizer, chat, messages, place)["input_ids"]
    labels = numpy.full(len(ids), IGNORED, dtype=numpy.int32)
    for turn in range(chat.first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before, after = [], apply_template(tokenizer, chat, messages[: turn + 1], place)["input_ids"]
        if turn:
            before = apply_template(tokenizer, chat, messages[:turn], place, add_generation_prompt=True)["input_ids"]
        if not turn or after[: len(before)] != before or ids[: len(after)] != after:
            raise _continuation_error(chat, turn, place)
        end = len(after)
        special = set(tokenizer.all_special_ids)
        closing = [i for i in range(len(before), end) if ids[i] in special]
        if closing:
            end = closing[-1] + 1  # excludes the newline that ChatML adds after its end-of-turn token
        labels[len(before) : end] = ids[len(before) : end]
    return Encoded(_array(ids), labels)


def _check_calls(chat: Chat, template: str, place: str) -> None:
    """Raise ValueError if a turn has only tool calls and the template renders none: its answer would be empty."""
    for turn, message in enumerate(chat.messages):
        if "tool_calls" in message and not message["content"].strip() and "tool_calls" not in template:
            raise ValueError(
                f"{place}: the chat template of this tokenizer must render tool_calls where a message has no content, "
                f"and does not name them, got them in messages[{turn}]: set model.chat_template to one that does, or "
                "write the calls into content"
            )


def _continuation_error(chat: Chat, turn: int, place: str) -> ValueError:
    marks = "use a template with {% generation %} marks"
    remedy = f"give strings, or {marks}" if chat.first else f"{marks}, or set data.assistant_only to false"
    return ValueError(
        f"{place}: the chat template of this tokenizer must render a conversation as a continuation of its "
        f"beginning, and does not at messages[{turn}] ({chat.messages[turn]['role']}): which tokens to score is "
        f"unknown; begin with a user message, {remedy}"
    )


def apply_template(
    tokenizer: Any, chat: Chat, messages: list[dict[str, Any]], place: str, **asked: bool
) -> dict[str, list[int]]:
    """Apply the chat template to these messages of chat. Raises: ValueError that starts with place if it cannot."""
    _template(tokenizer, place, chat.tools)
    try:
        return tokenizer.apply_chat_template(messages, tools=chat.tools, return_dict=True, **asked)
    except _TEMPLATE_ERRORS as error:
        raise ValueError(
            f"{place}: the chat template of this tokenizer must render messages, and stops with "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}: change the messages, or set "
            "model.chat_template (tulu, or a Jinja file)"
        ) from error


def _template(tokenizer: Any, place: str, tools: list[dict[str, Any]] | None) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{place}: messages need a tokenizer with a chat template, got one without: set "
            "model.chat_template (tulu, or a Jinja file), use an instruction-tuned model, or data with prompt and "
            "completion"
        )
    return tokenizer.get_chat_template(tools=tools)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield groups of consecutive texts, of at most PIECE characters together, or of one longer text."""
    group: list[str] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > PIECE:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _long_tokens(text: str, tokenizer: Any) -> array:
    """Tokenise one text in pieces, with the memory of one piece. Only tokens across a cut differ from _tokens."""
    ids = array("i")
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        piece = _tokens([text[start:end]], tokenizer, special=not start)[0]
        closed = not start and not _eos_unless_there(piece, tokenizer)  # some tokenizers close every text
        ids.extend(piece[:-1] if closed else piece)
        start = end
    return ids


def _tokens(texts: list[str], tokenizer: Any, *, special: bool = True) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _eos_unless_there(ids: Sequence[int], tokenizer: Any) -> list[int]:
    return [] if len(ids) and ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]


def _whole(ids: Sequence[int]) -> Encoded:
    return Encoded(_array(ids), _array(ids))


def _array(values: Sequence[int]) -> numpy.ndarray:
    return numpy.array(values, dtype=numpy.int32)


def _scored(example: Encoded) -> bool:
    """Return whether a token after the first is scored; no token predicts the first."""
    return bool((example.labels[1:] != IGNORED).any())  # in a pair, both examples have one; see _pair
