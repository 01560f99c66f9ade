"""OpenAI's HTTP API in front of the network: chat, completions, models; whole or as a stream.

Owns how a request becomes a job and how answers become JSON and server-sent events. Promises that unmodified OpenAI
clients work, that each answer says on which requests of the network it rests, what it cost and where its record is,
and that the same idempotency key gives the same answer without a second charge. What has no counterpart in OpenAI's
API is in one field, `bsns`, and in headers that begin with X-BSNS.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, ClassVar, Final

from fastapi import APIRouter, Header, Request, Response
from starlette.responses import JSONResponse, StreamingResponse

from bsns.protocol.sampling import SamplingError, SamplingParameters
from bsns.requester.chat_tokenizer import MAXIMUM_STOP_BYTES, ChatTokenizerError
from bsns.requester.client import Answer
from coordinator.gateway.access import KeyHolder
from coordinator.gateway.errors import ApiError
from coordinator.gateway.model_desk import (
    Choice,
    Done,
    Finished,
    Generation,
    Job,
    ModelDesk,
    OfferedModel,
    Opened,
    Piece,
)
from coordinator.gateway.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from coordinator.gateway.settings import GatewaySettings

MAXIMUM_IDEMPOTENCY_KEY: Final = 255
_DONE: Final = "data: [DONE]\n\n"
_SILENT: Final = ": still working\n\n"
_FINISH_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "length"}

_IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=MAXIMUM_IDEMPOTENCY_KEY, pattern=r"^[\x21-\x7e]+$",
        description="The same key gives the same answer, without a second charge.",
    ),
]  # fmt: skip
_MaximumPrice = Annotated[
    int | None,
    Header(alias="X-BSNS-Max-Price-Wei", ge=0, le=2**128 - 1, description="Refuse if it may cost more."),
]


class OpenAIApi:
    """The routes, over `desk`. `record_url` gives the address of a request's record."""

    def __init__(
        self,
        desk: ModelDesk,
        settings: GatewaySettings,
        record_url: Callable[[str], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk, self._settings, self._record_url, self._clock = desk, settings, record_url, clock
        self.router = APIRouter(prefix="/v1", tags=["OpenAI"])
        self.router.add_api_route("/models", self.models, methods=["GET"])
        self.router.add_api_route("/models/{model}", self.model, methods=["GET"])
        self.router.add_api_route("/chat/completions", self.chat, methods=["POST"])
        self.router.add_api_route("/completions", self.complete, methods=["POST"])
        self.router.add_api_route("/embeddings", self.embed, methods=["POST"])
        self.router.add_api_route("/quote", self.quote, methods=["POST"], tags=["bsns"])

    # -- models

    async def models(self, _key: KeyHolder) -> dict[str, Any]:
        """Models that can be asked."""
        return {"object": "list", "data": [_model(item) for item in self._desk.models.values()]}

    async def model(self, model: str, _key: KeyHolder) -> dict[str, Any]:
        """One of them."""
        return _model(self._desk.model(model))

    # -- answers

    async def chat(
        self,
        body: ChatRequest,
        request: Request,
        key: KeyHolder,
        idempotency_key: _IdempotencyKey = None,
        maximum_price: _MaximumPrice = None,
    ) -> Response:
        """Answer a conversation."""
        shape = _ChatShape(body, self._record_url)
        job = await self._job_of(body)
        return await self._answer(job, body, shape, request, key, idempotency_key, maximum_price)

    async def complete(
        self,
        body: CompletionRequest,
        request: Request,
        key: KeyHolder,
        idempotency_key: _IdempotencyKey = None,
        maximum_price: _MaximumPrice = None,
    ) -> Response:
        """Go on with a text."""
        shape = _CompletionShape(body, self._record_url)
        job = await self._job_of(body)
        return await self._answer(job, body, shape, request, key, idempotency_key, maximum_price)

    async def embed(self, body: EmbeddingRequest, _key: KeyHolder) -> Response:
        """No model of this network gives embeddings: its last stage draws a token."""
        self._desk.model(body.model)
        raise ApiError(
            400, f"model {body.model!r:.100} gives no embeddings: its last stage draws tokens", param="model",
            code="model_not_supported",
        )  # fmt: skip

    async def quote(self, body: ChatRequest | CompletionRequest, _key: KeyHolder) -> dict[str, Any]:
        """The most that a request would cost. Pays nothing."""
        job = await self._job_of(body)
        quotes = await self._desk.quote(job)
        found = quotes[0]
        return {
            "object": "bsns.quote",
            "model": job.model.name,
            "price_wei": str(self._desk.price(quotes)),
            "fee_per_token_wei": str(self._settings.price(found.fee_per_token)),
            "prompt_tokens": sum(len(item.prompt) for item in job.choices),
            "maximum_tokens": sum(item.sampling.maximum_tokens for item in job.choices),
            "choices": len(job.choices),
            "plan_id": "0x" + found.plan_id.hex(),
            "publisher": found.publisher,
            "stages": found.stage_count,
        }

    async def _answer(
        self,
        job: Job,
        body: ChatRequest | CompletionRequest,
        shape: _Shape,
        request: Request,
        key: KeyHolder,
        idempotency_key: str | None,
        maximum_price: int | None,
    ) -> Response:
        content = f"{request.url.path}\n{body.model_dump_json(exclude_none=True, exclude={'stream', 'stream_options'})}"
        found = await self._desk.submit(
            job,
            key,
            body_hash=hashlib.sha256(content.encode()).hexdigest(),
            idempotency_key=idempotency_key,
            allowed_wei=maximum_price,
            respond=lambda generation, done: json.dumps(shape.whole(generation, done, int(self._clock()))),
        )
        if isinstance(found, str):
            return self._again(json.loads(found), shape, is_stream=bool(body.stream))
        keeps_going = idempotency_key is not None
        if body.stream:
            return await self._stream(found, shape, keeps_going)
        return await self._whole(found, shape, request, keeps_going)

    async def _whole(self, generation: Generation, shape: _Shape, request: Request, keeps_going: bool) -> Response:
        done: Done | None = None
        async for event in generation.events(self._settings.keep_alive_seconds):
            if isinstance(event, Done):
                done = event
            elif not keeps_going and await request.is_disconnected():
                generation.abandon()
        assert done is not None, "events end with it, or raise"
        content = shape.whole(generation, done, int(self._clock()))
        return JSONResponse(content, headers=_headers(content))

    async def _stream(self, generation: Generation, shape: _Shape, keeps_going: bool) -> Response:
        """Begins once the network has taken the request, so that what it refuses is still an HTTP status."""
        events = generation.events(self._settings.keep_alive_seconds)
        first: Opened | None = None
        async for event in events:
            if isinstance(event, Opened):
                first = event
                break
        assert first is not None, "a request is opened before its answer comes"
        created, identity = int(self._clock()), _identity(shape.prefix, first.request_id)

        async def lines() -> AsyncIterator[str]:
            try:
                for item in shape.begin(generation):
                    yield _line(shape.chunk(generation, identity, created, item))
                async for event in events:
                    if event is None:
                        yield _SILENT
                    for item in shape.pieces(generation, event):
                        yield _line(shape.chunk(generation, identity, created, item))
                    if isinstance(event, Done):
                        for content in shape.end(generation, identity, created, event):
                            yield _line(content)
                        yield _DONE
            except ApiError as error:
                yield _line(error.body)
            finally:
                if not keeps_going:
                    generation.abandon()

        headers = {
            "X-BSNS-Request-Id": "0x" + first.request_id.hex(),
            "X-BSNS-Record": self._record_url("0x" + first.request_id.hex()),
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    def _again(self, content: dict[str, Any], shape: _Shape, *, is_stream: bool) -> Response:
        headers = {**_headers(content), "Idempotent-Replayed": "true"}
        if not is_stream:
            return JSONResponse(content, headers=headers)

        async def lines() -> AsyncIterator[str]:
            for item in shape.replayed(content):
                yield _line(item)
            yield _DONE

        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    # -- jobs

    async def _job_of(self, body: ChatRequest | CompletionRequest) -> Job:
        """What `body` asks for; in a worker thread, since half a megabyte of text takes a tokenizer a while."""
        if isinstance(body, ChatRequest):
            return await asyncio.to_thread(self._chat_job, body)
        return await asyncio.to_thread(self._completion_job, body)

    def _chat_job(self, body: ChatRequest) -> Job:
        body.refuse_unsupported()
        model = self._desk.model(body.model)
        tokenizer = _tokenizer(model)
        messages = [
            {"role": "system" if item.role == "developer" else item.role, "content": item.text}
            for item in body.messages
        ]
        for number, message in enumerate(messages):
            control = tokenizer.control_text(message["content"])
            if control is not None:
                raise ApiError(
                    400, f"message {number} spells out {control!r}, which would end or begin messages inside it: "
                    "take it out", code="control_token", param=f"messages[{number}].content",
                )  # fmt: skip
        try:
            prompt = tuple(tokenizer.conversation_token_ids(messages))
        except ChatTokenizerError as error:
            raise ApiError(400, str(error), param="messages") from error
        return self._job(model, [prompt], body)

    def _completion_job(self, body: CompletionRequest) -> Job:
        body.refuse_unsupported()
        model = self._desk.model(body.model)
        tokenizer = _tokenizer(model)
        prompts = [tuple(tokenizer.text_token_ids(item) if isinstance(item, str) else item) for item in body.prompts]
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, "the prompt is empty: there is nothing to go on with", param="prompt")
            if not all(0 <= token < model.manifest.vocabulary_size for token in prompt):
                limit = model.manifest.vocabulary_size
                raise ApiError(400, f"a token id of the prompt is outside the vocabulary of {limit}", param="prompt")
        return self._job(model, prompts, body)

    def _job(
        self, model: OfferedModel, prompts: Sequence[tuple[int, ...]], body: ChatRequest | CompletionRequest
    ) -> Job:
        count = (body.n or 1) * len(prompts)
        if count > self._settings.choices:
            raise ApiError(400, f"{count} answers at once, at most {self._settings.choices}", param="n")
        limit = model.manifest.context_limit
        choices = []
        seeds = body.seeds(body.n or 1)
        for prompt in prompts:
            # The last token drawn is nobody's input.
            room = limit - len(prompt) + 1
            wanted = body.maximum_tokens
            if room < (wanted or 1):
                raise ApiError(
                    400, f"this model's context is {limit} tokens, the prompt has {len(prompt)} and the answer may "
                    f"have {wanted or 1}: shorten the one or ask for less of the other", code="context_length_exceeded",
                    param="messages" if isinstance(body, ChatRequest) else "prompt",
                )  # fmt: skip
            maximum = wanted if wanted is not None else min(room, self._settings.default_maximum_tokens)
            for seed in seeds:
                try:
                    sampling = SamplingParameters(
                        temperature=1.0 if body.temperature is None else body.temperature,
                        top_k=body.top_k or 0,
                        top_p=1.0 if body.top_p is None else body.top_p,
                        seed=seed,
                        maximum_tokens=maximum,
                    )
                except SamplingError as error:
                    raise ApiError(400, str(error)) from error
                choices.append(Choice(prompt, sampling))
        stop = body.stop_strings
        for text in stop:
            if len(text.encode()) > MAXIMUM_STOP_BYTES:
                raise ApiError(400, f"a stop string has more than {MAXIMUM_STOP_BYTES} bytes", param="stop")
        return Job(model, tuple(choices), stop)


# --------------------------------------------------------------------------------------------------------------- shapes


class _Shape(ABC):
    """What chat and completions do not have in common."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, body: ChatRequest | CompletionRequest, record_url: Callable[[str], str]) -> None:
        self._body, self._record_url = body, record_url

    # What a choice looks like, whole, and in pieces.

    @abstractmethod
    def whole_choice(self, index: int, text: str, reason: str) -> dict[str, Any]: ...

    @abstractmethod
    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def begin(self, generation: Generation) -> list[dict[str, Any]]: ...

    def text_of(self, index: int, answer: Answer) -> str:
        return answer.text

    # Everything else.

    def whole(self, generation: Generation, done: Done, created: int) -> dict[str, Any]:
        answers = done.answers
        return {
            "id": _identity(self.prefix, answers[0].request_id),
            "object": self.whole_kind,
            "created": created,
            "model": generation.job.model.name,
            "system_fingerprint": _fingerprint(generation),
            "choices": [
                self.whole_choice(number, self.text_of(number, item), _finish_reason(item))
                for number, item in enumerate(answers)
            ],
            "usage": _usage(generation, answers),
            "bsns": self._extra(generation, done),
        }

    def chunk(self, generation: Generation, identity: str, created: int, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(generation, identity, created) | {"choices": [choice]}

    def pieces(self, generation: Generation, event: object) -> list[dict[str, Any]]:
        match event:
            case Piece(choice, text, _):
                return [self.piece(choice, text, None)]
            case Finished(choice, answer):
                return [self.piece(choice, "", _finish_reason(answer))]
            case _:
                return []

    def end(self, generation: Generation, identity: str, created: int, done: Done) -> list[dict[str, Any]]:
        """The last chunk has no choice: the price, and the usage if it was asked for."""
        content = self._head(generation, identity, created) | {"choices": [], "bsns": self._extra(generation, done)}
        options = self._body.stream_options
        if options is not None and options.include_usage:
            content["usage"] = _usage(generation, done.answers)
        return [content]

    def replayed(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        """A kept answer as a stream."""
        head = {key: value for key, value in content.items() if key not in ("choices", "usage", "bsns")}
        head["object"] = self.chunk_kind
        chunks = []
        for item in content["choices"]:
            text = item["message"]["content"] if "message" in item else item["text"]
            chunks.append(head | {"choices": [self.piece(item["index"], text, None)]})
            chunks.append(head | {"choices": [self.piece(item["index"], "", item["finish_reason"])]})
        last = head | {"choices": [], "bsns": content["bsns"]}
        options = self._body.stream_options
        if options is not None and options.include_usage:
            last["usage"] = content["usage"]
        return [*chunks, last]

    def _head(self, generation: Generation, identity: str, created: int) -> dict[str, Any]:
        return {
            "id": identity,
            "object": self.chunk_kind,
            "created": created,
            "model": generation.job.model.name,
            "system_fingerprint": _fingerprint(generation),
        }

    def _extra(self, generation: Generation, done: Done) -> dict[str, Any]:
        quote = generation.quotes[0]
        return {
            "price_wei": str(done.charge.charged),
            "held_wei": str(done.charge.held),
            "charge_id": done.charge.charge_id,
            "plan_id": "0x" + quote.plan_id.hex(),
            "requests": [
                {
                    "request_id": "0x" + item.request_id.hex(),
                    "record_url": self._record_url("0x" + item.request_id.hex()),
                    "network_price_wei": str(item.charged or 0),
                    "route": [{"stage": node.stage, "node": node.node} for node in item.route],
                    "time_to_first_token_seconds": _rounded(item.time_to_first_token_s),
                    "tokens_per_second": _rounded(item.tokens_per_second),
                }
                for item in done.answers
            ],
        }


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole_choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def begin(self, generation: Generation) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            for number in range(len(generation.job.choices))
        ]


class _CompletionShape(_Shape):
    prefix = "cmpl"
    whole_kind = "text_completion"
    chunk_kind = "text_completion"
    _body: CompletionRequest

    def whole_choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def begin(self, generation: Generation) -> list[dict[str, Any]]:
        if not self._body.echo:
            return []
        return [self.piece(number, self._prompt(number), None) for number in range(len(generation.job.choices))]

    def text_of(self, index: int, answer: Answer) -> str:
        return (self._prompt(index) if self._body.echo else "") + answer.text

    def _prompt(self, index: int) -> str:
        return str(self._body.prompts[index // (self._body.n or 1)])


def _model(item: OfferedModel) -> dict[str, Any]:
    return {
        "id": item.name,
        "object": "model",
        "created": item.created,
        "owned_by": "bsns",
        "bsns": {
            "manifest_hash": "0x" + item.manifest.manifest_hash.hex(),
            "weight_root": "0x" + item.manifest.weight_root.hex(),
            "units": len(item.manifest.units),
            "context_limit": item.manifest.context_limit,
            "task": item.manifest.task,
        },
    }


def _tokenizer(model: OfferedModel) -> Any:
    if model.tokenizer is None:
        raise ApiError(
            400, f"model {model.name!r} takes no text: it classifies images (`bsns request --image`)", param="model",
            code="model_not_supported",
        )  # fmt: skip
    return model.tokenizer


def _usage(generation: Generation, answers: Sequence[Answer]) -> dict[str, Any]:
    # As OpenAI counts: a prompt once, however many answers to it were asked for.
    prompts = {item.prompt for item in generation.job.choices}
    prompt, completion = sum(map(len, prompts)), sum(len(item.token_ids) for item in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _finish_reason(answer: Answer) -> str:
    return _FINISH_REASONS.get(answer.finish_reason, "stop")


def _fingerprint(generation: Generation) -> str:
    """What OpenAI calls the configuration that an answer was made with is the plan here."""
    return "plan_" + generation.quotes[0].plan_id.hex()[:16]


def _identity(prefix: str, request_id: bytes) -> str:
    return f"{prefix}-{request_id.hex()[:32]}"


def _headers(content: dict[str, Any]) -> dict[str, str]:
    first = content["bsns"]["requests"][0]
    return {
        "X-BSNS-Request-Id": first["request_id"],
        "X-BSNS-Record": first["record_url"],
        "X-BSNS-Price-Wei": content["bsns"]["price_wei"],
    }


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
