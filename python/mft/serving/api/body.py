"""The bodies of requests: OpenAI's keys that have an effect here, and those that are accepted only without effect."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from mft.checks import nearest, shown
from mft.serving.refusal import Refused

MOST_MESSAGES = 2048
MOST_PROMPTS = 1024
MOST_CHOICES = 16  # of one prompt
MOST_LIKELIEST = 20  # tokens that are named beside each one, as with OpenAI


def most_bytes(length: int) -> int:
    """Return the most bytes of a body that is read, if prompt and answer have at most length tokens together.

    Source code has 3.4 bytes per token with SmolLM2, and a token of Chinese text that JSON escapes has about 12.
    """
    return (1 << 16) + 32 * length


def _prompts(value: Any) -> Any:
    """Return one or several prompts as a list of texts, or of lists of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if isinstance(value, list) and (all(isinstance(each, str) for each in value) or all(map(_is_tokens, value))):
        return value
    raise ValueError("must be a text, a list of token ids, or a list of one of these")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


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
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((key for key in kept if key not in known), None)
        if unknown is not None:
            # pydantic's own extra="forbid" makes an error for each of them: 700 bytes for every 4 of the body.
            raise PydanticCustomError("unknown_key", "{key} is unknown", {"key": unknown})
        return kept

    def check_together(self) -> None:
        """Raise Refused if keys that are valid alone do not fit together."""


class Message(Keys):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class StreamOptions(Keys):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Keys):
    ignored = ("description",)

    name: str = Field("", max_length=64)
    content: dict[str, Any] = Field({}, alias="schema")
    strict: bool = True


class ResponseFormat(Keys):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


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
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        FailFast(),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(max_length=16),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logit_bias: dict[str, Any] = Field({}, max_length=0)

    @property
    def prompts(self) -> int:
        return 1

    @property
    def likeliest(self) -> int | None:
        """The number of likeliest tokens to name with each token's log-probability; None for none of both."""
        raise NotImplementedError

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        return None


class CompletionBody(Body):
    """POST /v1/completions"""

    prompt: Annotated[list[Any], BeforeValidator(_prompts), Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: str = Field("", max_length=0)

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def check_together(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise Refused("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
        if self.best_of not in (None, self.n):
            raise Refused(f"best_of must be left out or as large as n ({self.n}), got {self.best_of}", param="best_of")


class Chat(Keys):
    """What a chat's template takes. By default the template begins the assistant's next turn."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    def check_together(self) -> None:
        if not self.continue_final_message:
            return
        param, role = "continue_final_message", self.messages[-1].role
        if role != "assistant":
            raise Refused(
                f"{param} must be false unless the last message is the assistant's, got {role}'s", param=param
            )
        if self.add_generation_prompt:
            raise Refused(f"{param} must be false if add_generation_prompt is true, got both", param=param)


class ChatBody(Body, Chat):
    """POST /v1/chat/completions"""

    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name of max_tokens
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LIKELIEST)
    response_format: ResponseFormat = ResponseFormat(type="text")
    modalities: Annotated[list[Literal["text"]], FailFast(), Field(max_length=1)] = ["text"]
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    functions: list[Any] = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        if self.response_format.type == "text":
            return None
        asked = self.response_format.json_schema
        return {"type": "object"} if asked is None else asked.content

    def check_together(self) -> None:
        super().check_together()
        if self.top_logprobs and not self.logprobs:
            raise Refused(
                f"top_logprobs must be 0 unless logprobs is true, got {self.top_logprobs}", param="top_logprobs"
            )
        format = self.response_format
        if (format.type == "json_schema") != (format.json_schema is not None):
            param = "response_format.json_schema"
            raise Refused(f"{param} must be given with type json_schema, and only then", param=param)


class TokenizeBody(Chat):
    """POST /tokenize, of a text or of a chat"""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], FailFast(), Field(max_length=MOST_MESSAGES)] = []

    def check_together(self) -> None:
        if (self.prompt is None) != bool(self.messages):
            raise Refused("prompt must be given, or messages, got both or none", param="prompt")
        super().check_together()


AnyBody = TypeVar("AnyBody", bound=Keys)


def read_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Parse a body. Raises: Refused that names the first key at fault."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], kind.model_fields) from None
    body.check_together()
    return body


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
