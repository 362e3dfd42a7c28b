"""What a request may hold, as pydantic models: strict, nothing ignored.

A field of OpenAI's protocol that this server cannot follow is listed with the values that ask for nothing (its default); any other
value is a 400 that names it. A field that is in no list is one too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

TOP_LOGPROBS = 20


class Only:
    """Accepts these values and nothing else; null always. The error says that the parameter is not supported."""

    def __init__(self, *values: Any) -> None:
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Not supported: only these values, which ask for nothing."}

    def _check(self, value: Any) -> Any:
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values):
            return value
        offered = " or ".join(repr(v) for v in self.values[1:]) or "null"
        raise PydanticCustomError("unsupported", "not supported by this server; leave it out{offered}", {"offered": f" or give {offered}"})


Nothing = Annotated[Any, Only()]
Zero = Annotated[Any, Only(0)]
No = Annotated[Any, Only(False)]
Empty = Annotated[Any, Only({}, [])]


class Strict(BaseModel):
    """No unknown field, no conversion of types, no infinite number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A piece of text. Other kinds of parts (images, sound) are not supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Empty = None
    logprobs: Empty = None


class CalledFunction(Strict):
    """The name of a function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    annotations: Empty = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs `content` (only an assistant's with `tool_calls` may go without)")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has `tool_calls`")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("`tool_call_id` belongs to a message of role `tool`, which needs it")
        return self

    def text(self) -> str:
        """Its text, parts joined."""
        return content_text(self.content)


def content_text(content: str | list[TextPart] | None) -> str:
    """The text of a content, parts joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: No = None


class Tool(Strict):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: Function


class JsonSchema(Strict):
    """A named JSON Schema that the answer has to follow. It is always followed strictly."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`json_schema` belongs to type `json_schema`, which needs it")
        return self

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON Schema to follow, None for plain text."""
        return self.json_schema.schema_ if self.json_schema else {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Strict):
    """include_usage: a last chunk with the usage of the whole request."""

    include_usage: bool | None = None
    include_obfuscation: No = None


class _Sampled(Strict):
    """What every request may say about how tokens are chosen. top_k, min_p and repetition_penalty are extensions."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stream: bool | None = None
    metadata: Empty = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    user: str | None = Field(None, max_length=256, description="A word of the caller's for the request log.")
    safety_identifier: Nothing = None
    prompt_cache_key: Nothing = None
    prompt_cache_retention: Nothing = None


_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Length = Annotated[int, Field(ge=1, le=2**31)]
_Word = Annotated[str, Field(min_length=1, max_length=1000)]
_Stop = _Word | Annotated[list[_Word], Field(max_length=4)]


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: _Length | None = None
    max_completion_tokens: _Length | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, Only("auto", "none")] = None
    parallel_tool_calls: Annotated[Any, Only(True)] = None
    n: Annotated[Any, Only(1)] = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Empty = None
    store: No = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Nothing = None
    functions: Empty = None
    function_call: Annotated[Any, Only("auto", "none")] = None

    @model_validator(mode="after")
    def _belongs_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; give one of them")
        return self


class CompletionRequest(_Sampled):
    """POST /v1/completions: text goes on, without a chat template."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: _Length | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    stream_options: StreamOptions | None = None
    n: Annotated[Any, Only(1)] = None
    best_of: Annotated[Any, Only(1)] = None
    echo: No = None
    suffix: Annotated[Any, Only("")] = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Empty = None

    @model_validator(mode="after")
    def _belongs_together(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        return self


class InputItem(Strict):
    """One message of a response's input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class TextFormat(Strict):
    """As `ResponseFormat`, with the schema's fields in place."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("`schema` belongs to type `json_schema`, which needs it")
        return self

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON Schema to follow, None for plain text."""
        return {"type": "object"} if self.type == "json_object" else self.schema_


class TextSettings(Strict):
    """How the text of a response is formed."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Only("medium")] = None


class ResponsesRequest(_Sampled):
    """POST /v1/responses: text in, text out. Nothing is stored."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: _Length | None = None
    text: TextSettings | None = None
    seed: _Seed | None = Field(None, description="An extension, as in chat completions.")
    stop: _Stop | None = Field(None, description="An extension, as in chat completions.")
    store: No = None
    stream_options: Nothing = None
    background: No = None
    conversation: Nothing = None
    include: Empty = None
    max_tool_calls: Nothing = None
    parallel_tool_calls: Annotated[Any, Only(True)] = None
    previous_response_id: Nothing = None
    prompt: Nothing = None
    reasoning: Nothing = None
    tool_choice: Annotated[Any, Only("auto", "none")] = None
    tools: Empty = None
    top_logprobs: Zero = None
    truncation: Annotated[Any, Only("disabled")] = None


def field_names() -> set[str]:
    """Every name that may stand in the path of an error."""
    kinds: list[type[BaseModel]] = [TextPart, CalledFunction, ToolCall, Message, Function, Tool, JsonSchema, ResponseFormat]
    kinds += [StreamOptions, ChatRequest, CompletionRequest, InputItem, TextFormat, TextSettings, ResponsesRequest]
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
