"""What clients send: the keys of OpenAI's requests that mean something here, and those that may ask for nothing."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mft.checks import nearest, shown
from mft.serving.refusal import Refused

# Of OpenAI's keys, those that change no answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise ValueError("must be one text or one list of token ids; send a request for each prompt")


def _text(value: Any) -> Any:
    """Content's parts as one text."""
    if not isinstance(value, list):
        return value
    if all(isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" for part in value):
        return "\n".join(str(part["text"]) for part in value)
    raise ValueError("must be a text, or a list of {type: text, text: ...}")


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(BaseModel):
    """What both have. A key that is null is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_listed), Field(max_length=4)
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # What these may be is what they are when they are left out.
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict[str, float] = Field({}, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None and key not in _IGNORED}


class CompletionBody(Body):
    """POST /v1/completions"""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    best_of: int = Field(1, ge=1, le=1)
    echo: Literal[False] = False


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # what OpenAI calls max_tokens by now
    logprobs: Literal[False] = False


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Raises: Refused that names the first key at fault."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], kind.model_fields) from None


def _refusal(error: ErrorDetails, known: Iterable[str]) -> Refused:
    place, kind, got = error["loc"], error["type"], error["input"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:99]}" for part in place).lstrip(".") or None
    if kind == "json_invalid":
        return Refused(f"the body must be JSON: {error['msg']}")
    if kind == "extra_forbidden":
        close = nearest(str(place[-1]), known) if len(place) == 1 else ""
        of = f" ({', '.join(known)})" if len(place) == 1 else ""
        return Refused(f"{param} must be left out, it is no key that is known here{of}{close}", param=param)
    if kind == "missing":
        return Refused(f"{param} must be given", param=param)
    rule = error["msg"].removeprefix("Input should ").removeprefix("Value error, must ")
    rule = rule[:1].lower() + rule[1:]
    return Refused(f"{param or 'the body'} must {rule}, got {shown(got)}", param=param)
