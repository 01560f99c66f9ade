"""Requests of OpenAI's API as this gateway takes them, and what it answers.

Owns which fields there are, their ranges, and which are refused because the network cannot honour them: a field that
would change the answer is never ignored in silence. Promises shapes that OpenAI's own clients take apart. Amounts of
wei are text, since JSON's numbers are exact only up to 2^53.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints

from bsns.requester.chat_tokenizer import MAXIMUM_STOP_BYTES, MAXIMUM_STOP_STRINGS
from coordinator.gateway.errors import ApiError

MAXIMUM_MESSAGES: Final = 2_048
MAXIMUM_TEXT: Final = 1_048_576
LEGACY_MAXIMUM_TOKENS: Final = 16
_UINT64: Final = 2**64

_Text = Annotated[str, StringConstraints(max_length=MAXIMUM_TEXT, strict=True)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAXIMUM_STOP_BYTES, strict=True)]
_Model = Annotated[str, StringConstraints(min_length=1, max_length=255, strict=True)]
_Tokens = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: _Text


class ChatMessage(BaseModel):
    """One message. What a client got as an answer may be sent back as it came, empty fields included."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart] | None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0, description="no model here calls tools")

    @property
    def text(self) -> str:
        """All of the content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """What a stream holds besides."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class _Sampled(_Body):
    """What both kinds of request have."""

    model: _Model
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="of the likeliest so many; 0: all. Not in OpenAI's API"
    )
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    max_tokens: _Tokens | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAXIMUM_STOP_STRINGS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def seeds(self, count: int) -> list[int]:
        """One a choice: those after `seed`, or random ones. Greedy answers do not depend on it."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [(first + number) % _UINT64 for number in range(count)]

    def refuse_unsupported(self) -> None:
        """ApiError for what the network cannot do. Values that change nothing are fine."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise _unsupported(name, "draws are of the model's own probabilities, which committees check")
        if self.logit_bias and any(self.logit_bias.values()):
            raise _unsupported("logit_bias", "draws are of the model's own probabilities, which committees check")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for a stream: set stream to true", param="stream_options")


class ResponseFormat(BaseModel):
    """Only plain text is given."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    type: str


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAXIMUM_MESSAGES)]
    max_completion_tokens: _Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: StrictBool | None = None
    modalities: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: StrictBool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def maximum_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.logprobs or self.top_logprobs:
            raise _unsupported("logprobs", "the nodes of this network hand out tokens, no probabilities")
        if self.tools or self.functions:
            raise _unsupported("tools" if self.tools else "functions", "no model here calls tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise _unsupported("response_format", "answers are plain text")
        if self.modalities is not None and self.modalities != ["text"]:
            raise _unsupported("modalities", "answers are plain text")


class CompletionRequest(_Sampled):
    """POST /v1/completions: the model goes on with a text as it is."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAXIMUM_MESSAGES)]
        | Annotated[list[StrictInt], Field(min_length=1)]
        | Annotated[list[Annotated[list[StrictInt], Field(min_length=1)]], Field(min_length=1)]
    )
    echo: StrictBool | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    suffix: str | None = None

    @property
    def maximum_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else LEGACY_MAXIMUM_TOKENS

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.logprobs is not None:
            raise _unsupported("logprobs", "the nodes of this network hand out tokens, no probabilities")
        if self.suffix:
            raise _unsupported("suffix", "the models here only go on at the end")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _unsupported("best_of", "without probabilities there is no best one: ask for n")
        if self.echo and any(not isinstance(item, str) for item in self.prompts):
            raise _unsupported("echo", "it needs a prompt of text")


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    model: _Model
    input: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAXIMUM_MESSAGES)]
        | Annotated[list[StrictInt], Field(min_length=1)]
        | Annotated[list[Annotated[list[StrictInt], Field(min_length=1)]], Field(min_length=1)]
    )
    dimensions: _Tokens | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


def _unsupported(name: str, reason: str) -> ApiError:
    return ApiError(400, f"{name} is not supported: {reason}. Leave it out", code="unsupported_parameter", param=name)
