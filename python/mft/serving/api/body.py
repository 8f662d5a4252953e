"""The bodies of requests: OpenAI's keys that have an effect here, and those that are accepted only without effect."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from mft.checks import nearest, shown
from mft.serving.refusal import Refused

MOST_MESSAGES = 2048


def most_bytes(length: int) -> int:
    """Return the most bytes of a body that is read, if prompt and answer have at most length tokens together.

    Source code has 3.4 bytes per token with SmolLM2, and a token of Chinese text that JSON escapes has about 12.
    """
    return (1 << 16) + 32 * length


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise ValueError("must be one text or one list of token ids; send a request for each prompt")


def _text(value: Any) -> Any:
    """Return the parts of content as one text."""
    if not isinstance(value, list):
        return value
    if all(_is_text(part) for part in value):
        return "\n".join(part["text"] for part in value)
    raise ValueError("must be a text, or a list of {type: text, text: ...}")


def _is_text(part: Any) -> bool:
    is_part = isinstance(part, dict) and part.keys() == {"type", "text"}
    return is_part and part["type"] == "text" and isinstance(part["text"], str)


class Keys(BaseModel):
    """A body whose null keys are ignored. The first unknown key is refused before any value is checked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {key: value for key, value in given.items() if value is not None and key not in cls.ignored}
        unknown = next((key for key in kept if key not in cls.model_fields), None)
        if unknown is not None:
            # pydantic's own extra="forbid" makes an error for each of them: 700 bytes for every 4 of the body.
            raise PydanticCustomError("unknown_key", "{key} is unknown", {"key": unknown})
        return kept


class Message(Keys):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class StreamOptions(Keys):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(Keys):
    type: Literal["text"]


class Body(Keys):
    """The keys of both bodies. Lists fail at the first faulty item: an error takes 700 bytes, an item may take 2."""

    # OpenAI's keys that change no answer. parallel_tool_calls says how to call tools, but there are no tools.
    ignored = (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls"),
    )

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        FailFast(),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(max_length=4),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # The only allowed value of each of these keys is its default.
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict[str, Any] = Field({}, max_length=0)


class CompletionBody(Body):
    """POST /v1/completions"""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    best_of: int = Field(1, ge=1, le=1)
    echo: Literal[False] = False
    suffix: str = Field("", max_length=0)


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name of max_tokens
    logprobs: Literal[False] = False
    top_logprobs: int = Field(0, ge=0, le=0)
    response_format: ResponseFormat = ResponseFormat(type="text")
    modalities: Annotated[list[Literal["text"]], FailFast(), Field(max_length=1)] = ["text"]
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    functions: list[Any] = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"


AnyBody = TypeVar("AnyBody", bound=Keys)


def read_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Parse a body. Raises: Refused that names the first key at fault."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], kind.model_fields) from None


def _refusal(error: ErrorDetails, known: Iterable[str]) -> Refused:
    place, kind, got = error["loc"], error["type"], error["input"]
    if kind == "unknown_key":
        place = (*place, error["ctx"]["key"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:99]}" for part in place).lstrip(".") or None
    if kind == "json_invalid":
        return Refused(f"the body must be JSON: {error['msg']}")
    if kind == "unknown_key":
        close = nearest(str(place[-1]), known) if len(place) == 1 else ""
        of = f" ({', '.join(known)})" if len(place) == 1 else ""
        return Refused(f"{param} must be left out, because it is not a known key here{of}{close}", param=param)
    if kind == "missing":
        return Refused(f"{param} must be given", param=param)
    return Refused(f"{param or 'the body'} must {_rule(error['msg'])}, got {shown(got)}", param=param)


def _rule(message: str) -> str:
    """Return what follows "must" in pydantic's "Input should be ..." or "List should have ..., not 5"."""
    _, _, rule = message.removeprefix("Value error, must ").rpartition(" should ")
    return rule.partition(" after validation")[0]
