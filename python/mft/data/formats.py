"""Read a record by the form that its columns have: as a chat, a prompt with its completion, a text, or a pair."""

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mft.checks import check_text, nearest, shown

ROLES = ("system", "user", "assistant", "tool")
# Role of each speaker's name in ShareGPT's conversations and similar ones.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
LONGEST = 2**22  # characters of a chat, or of prompt and completion, because these cannot be tokenised in pieces


@dataclass(frozen=True)
class Form:
    """The columns that records of a form must have, and those that they may have."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


# Alpaca's prompts, for tokenizers without a template: as in the column text of tatsu-lab/alpaca.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PREFERENCE = "preference"
# Records have the first of these forms whose columns they have.
FORMS = {
    "messages": Form(("messages",), ("tools",)),
    "conversations": Form(("conversations",), ("tools",)),  # ShareGPT's
    "completion": Form(("prompt", "completion"), ("tools",)),
    "instruction": Form(("instruction", "output"), ("input",)),  # Alpaca's
    "text": Form(("text",)),
    PREFERENCE: Form(("chosen", "rejected"), ("prompt", "tools")),  # TRL's, for objectives that compare
    "question": Form(("question", "answer")),  # GSM8K's
}
CONTENT_COLUMNS = tuple(dict.fromkeys(column for form in FORMS.values() for column in (*form.needs, *form.takes)))
_ALWAYS_CONTENT = ("messages", "prompt", "completion", "text")  # in any form, so that existing splits do not change


@dataclass
class Chat:
    """Messages as chat templates take them; empty if no assistant turn can be scored. Those before first never are.

    tools: the functions that the assistant may call, if the record has them.
    """

    messages: list[dict[str, Any]]
    first: int = 0
    tools: list[dict[str, Any]] | None = None


@dataclass
class Completion:
    prompt: str
    completion: str


def find_form(columns: Collection[str]) -> str | None:
    """Return the form of records with these columns; None if they have none."""
    return next((name for name, form in FORMS.items() if set(form.needs) <= set(columns)), None)


def content_of(columns: Collection[str]) -> list[str]:
    """Return the columns that are read from such records, and by which equal records are recognised."""
    name = find_form(columns)
    known = CONTENT_COLUMNS if name is None else (*_ALWAYS_CONTENT, *FORMS[name].needs, *FORMS[name].takes)
    return [column for column in CONTENT_COLUMNS if column in columns and column in known]


def read_example(form: str, row: dict[str, Any], place: str, *, templated: bool) -> Chat | Completion:
    """Read a record that is not a text; templated: there is a chat template. Raises: ValueError starting with place."""
    if form == "messages":
        return _chat(row, read_messages(row.get("messages"), "messages", place), place)
    if form == "conversations":
        return _chat(row, _conversation(row.get("conversations"), place), place)
    if form == "instruction":
        return _instruction(row, place, templated)
    if form == "question":
        said = {"instruction": read_string(row, "question", place), "output": read_string(row, "answer", place)}
        return _instruction(said, place, templated)
    return _prompted(row, place)


def read_pair(row: dict[str, Any], place: str) -> tuple[Chat | Completion, Chat | Completion]:
    """Read chosen and rejected, strings or lists of messages. The prompt has the same type, or is their common start.

    A prompt that is a string next to two lists is only a remark, as in TRL. Raises: ValueError that starts with place.
    """
    both = [row.get("chosen"), row.get("rejected")]
    if all(isinstance(value, list) for value in both):
        given = row.get("prompt")
        common = read_messages(given, "prompt", place) if isinstance(given, list) else []
        chats = [[*common, *read_messages(value, name, place)] for name, value in zip(("chosen", "rejected"), both)]
        first = len(common) if common else _shared(*chats)
        chosen, rejected = (_chat(row, messages, place, first=first) for messages in chats)
        return chosen, rejected
    if any(isinstance(value, list) for value in both):
        raise ValueError(
            f"{place}: chosen and rejected must both be strings or both lists of messages, got "
            f"{' and '.join(map(shown, both))}"
        )
    texts = [read_string(row, name, place) for name in ("chosen", "rejected")]
    if row.get("prompt") is None:
        end = _shared(*texts)
        end -= texts[0][:end].endswith(" ")  # a word's token starts with the space before it
        prompt, texts = texts[0][:end], [text[end:] for text in texts]
    else:
        prompt = read_string(row, "prompt", place)
    one, other = ({"prompt": prompt, "completion": text} for text in texts)
    return _completion(one, place), _completion(other, place)


def drop_filling(value: Any, *, inside: bool = False) -> Any:
    """Drop the null keys in tools and tool_calls that Arrow adds, since all objects of its columns have equal keys."""
    if isinstance(value, list):
        return [drop_filling(item, inside=inside) for item in value]
    if not isinstance(value, dict):
        return value
    items = ((key, item) for key, item in value.items() if item is not None or not inside)
    return {key: drop_filling(item, inside=inside or key in ("tools", "tool_calls")) for key, item in items}


def read_string(row: dict[str, Any], column: str, place: str) -> str:
    """Return the string in a column. Raises: ValueError if it is no string, or cannot be encoded."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column} must be a string, got {shown(value)}")
    check_text(f"{place}: {column}", value)
    return value


# ---------------------------------------------------------------------------------------------- private


def _prompted(row: dict[str, Any], place: str) -> Chat | Completion:
    """Read prompt and completion: two strings, or two lists of messages, which form one chat."""
    both = [row.get(column) for column in ("prompt", "completion")]
    lists = [isinstance(value, list) for value in both]
    if all(lists):
        prompt, completion = read_messages(both[0], "prompt", place), read_messages(both[1], "completion", place)
        return _chat(row, [*prompt, *completion], place, first=len(prompt))
    if any(lists):
        raise ValueError(
            f"{place}: prompt and completion must both be strings or both lists of messages, got "
            f"{' and '.join(map(shown, both))}"
        )
    return _completion(row, place)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many messages or characters both begin with; at least one of each is left over."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), max(0, most))


def _completion(row: dict[str, Any], place: str) -> Completion:
    prompt, completion = read_string(row, "prompt", place), read_string(row, "completion", place)
    _check_length(len(prompt) + len(completion), place)
    return Completion(prompt, completion)


def _instruction(row: dict[str, Any], place: str, templated: bool) -> Chat | Completion:
    """Read Alpaca's record; its input may be empty, null or absent."""
    instruction, output = read_string(row, "instruction", place), read_string(row, "output", place)
    given = "" if row.get("input") is None else read_string(row, "input", place)
    if templated:
        asked = f"{instruction}\n\n{given}" if given.strip() else instruction
        return _chat({}, [{"role": "user", "content": asked}, {"role": "assistant", "content": output}], place)
    prompt = (ALPACA_WITH_INPUT if given.strip() else ALPACA).format(instruction=instruction, input=given)
    return _completion({"prompt": prompt, "completion": output}, place)


def _conversation(turns: Any, place: str) -> list[dict[str, Any]]:
    """Return ShareGPT's turns as messages; turns that are messages already stay."""
    if not isinstance(turns, list):
        raise ValueError(f"{place}: conversations must be a list of {{from, value}}, got {shown(turns)}")
    return [_read_turn(turn, f"{place}: conversations[{number}]") for number, turn in enumerate(turns)]


def _read_turn(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, dict) and turn.get("role") is not None:
        return _message(turn, where)
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        keys = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, dict) else shown(turn)
        raise ValueError(f"{where} must have a from and a value, got {keys}")
    speaker = str(turn["from"])
    if speaker not in SPEAKERS:
        raise ValueError(
            f"{where}.from must be one of {', '.join(SPEAKERS)}, got {turn['from']!r}{nearest(speaker, SPEAKERS)}"
        )
    return {"role": SPEAKERS[speaker], "content": read_string(turn, "value", where)}


def _chat(row: dict[str, Any], messages: list[dict[str, Any]], place: str, *, first: int = 0) -> Chat:
    tools = _tools(row.get("tools"), place)
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    spoken = sum(len(message["content"]) for message in messages)
    _check_length(spoken + sum(map(len, map(_json_text, (tools, *calls)))), place)
    answered = any(
        message["role"] == "assistant" and (message["content"].strip() or "tool_calls" in message)
        for message in messages[first:]
    )
    return Chat(messages if answered else [], first, tools)


def _tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the schemas of functions, which some data sets store as JSON."""
    given = tools
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):  # refused below
            tools = json.loads(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}: tools must be a list of objects, or such a list as JSON, got {shown(given)}")
    read_string({"tools": _json_text(tools)}, "tools", place)
    return tools


def _json_text(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def read_messages(messages: Any, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise ValueError(f"{place}: {column} must be a list of {{role, content}}, got {shown(messages)}")
    return [_message(message, f"{place}: {column}[{turn}]") for turn, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with its content as one text, and without null keys."""
    calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
    if calls and message.get("content") is None:
        message = {**message, "content": ""}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        keys = f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else shown(message)
        raise ValueError(f"{where} must have a role and a content, got {keys}")
    if message["role"] not in ROLES:
        role = message["role"]
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}{nearest(str(role), ROLES)}")
    content = _joined(message["content"], where)
    read_string({"content": content}, "content", where)
    message = {key: value for key, value in {**message, "content": content}.items() if value is not None}
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif not isinstance(message["tool_calls"], list):
        raise ValueError(f"{where}.tool_calls must be a list, got {shown(message['tool_calls'])}")
    else:
        read_string({"tool_calls": _json_text(message["tool_calls"])}, "tool_calls", where)
    return message


def _joined(content: Any, where: str) -> Any:
    """Join text parts with line ends, as mft serve does."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            other = isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text"
            got = f"the type {part['type']}" if other else shown(part)
            raise ValueError(
                f"{where}.content[{number}] must be {{type: text, text: ...}}, since models read text alone, got {got}"
            )
    return "\n".join(part["text"] for part in content)


def _check_length(characters: int, place: str) -> None:
    if characters > LONGEST:
        raise ValueError(
            f"{place}: an example must have at most {LONGEST} characters, got {characters}: leave it out, or write it "
            "as several"
        )
