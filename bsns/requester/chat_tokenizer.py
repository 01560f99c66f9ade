"""Text to token ids and back for a chat model, without torch or transformers.

Owns the chat template, the tokenizer and the incremental decoding of an answer. Promises ids equal to transformers'
`apply_chat_template(..., add_generation_prompt=True)`, whole characters only, and text that ends before a stop string.
The template comes with the model, from strangers: it runs in a sandbox. Does not fetch files; the folder is a prepared
model (`bsns.runtime.prepare`).

Text like `<|im_end|>` in a message becomes the control token, as it does in transformers: callers that join texts of
several people must decide whether to refuse it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

TOKENIZER_FILE: Final = "tokenizer.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
MAXIMUM_STOP_STRINGS: Final = 8
MAXIMUM_STOP_BYTES: Final = 256
_REPLACEMENT: Final = "\ufffd"
# A character is at most four bytes, so at most this many byte-level tokens can be one unfinished character.
_MAXIMUM_HELD_TOKENS: Final = 8


class ChatTokenizerError(ValueError):
    """Tokenizer files or messages cannot be used. The message says what to do."""


class ChatTokenizer:
    """Tokenizer and chat template of the prepared model in `folder`. Raises `ChatTokenizerError` for missing or broken
    files.
    """

    def __init__(self, folder: Path) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._tokenizer = Tokenizer.from_str((folder / TOKENIZER_FILE).read_text("utf-8"))
            self._template = environment.from_string((folder / CHAT_TEMPLATE_FILE).read_text("utf-8"))
        except OSError as error:
            raise ChatTokenizerError(
                f"cannot read {error.filename}: {error.strerror}; prepare the model first"
            ) from error
        except TemplateError as error:
            raise ChatTokenizerError(
                f"the chat template in {folder} is broken: {error}; prepare the model again"
            ) from error
        except Exception as error:  # tokenizers raises plain Exception for a malformed file
            raise ChatTokenizerError(
                f"{TOKENIZER_FILE} in {folder} is broken: {error}; prepare the model again"
            ) from error

        added = self._tokenizer.get_added_tokens_decoder().values()
        self._control_texts = sorted((item.content for item in added if item.special), key=len, reverse=True)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation: each message has `role` and `content`. Ends where the assistant begins to
        speak.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ChatTokenizerError("each message needs a role and a content, both text")
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True)
        except TemplateError as error:
            raise ChatTokenizerError(f"the chat template refuses these messages: {error}") from error

    def conversation_token_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, as the model takes them."""
        return list(self._tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def prompt_token_ids(self, user_message: str) -> list[int]:
        """Token ids of a conversation with one user message."""
        return self.conversation_token_ids([{"role": "user", "content": user_message}])

    def text_token_ids(self, text: str) -> list[int]:
        """Token ids of a text as it is, without a conversation around it: the model goes on with it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def control_text(self, text: str) -> str | None:
        """The first control token that `text` spells out, such as `<|im_end|>`; None where it is nothing but text."""
        return next((item for item in self._control_texts if item in text), None)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream_decoder(self, stop_strings: Sequence[str] = ()) -> "StreamDecoder":
        """A decoder for one answer that ends before the first of `stop_strings`."""
        return StreamDecoder(self, stop_strings)


class StreamDecoder:
    """Decodes one answer token by token.

    The pieces that `push` and `finish` return, joined, are the decoded answer up to the first stop string (which is
    left out). A piece never ends within a character; text that could be the beginning of a stop string is held back
    until it is clear.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop_strings: Sequence[str] = ()) -> None:
        if len(stop_strings) > MAXIMUM_STOP_STRINGS:
            raise ChatTokenizerError(f"{len(stop_strings)} stop strings given, at most {MAXIMUM_STOP_STRINGS}")
        for text in stop_strings:
            if not 1 <= len(text.encode()) <= MAXIMUM_STOP_BYTES:
                raise ChatTokenizerError(
                    f"a stop string has {len(text.encode())} bytes, expected 1 to {MAXIMUM_STOP_BYTES}"
                )
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        # Decoding from the last clean point, with what came before it as context, gives the text of the whole at
        # constant cost.
        self._context: list[int] = []
        self._fresh: list[int] = []
        self._held = ""
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, or None."""
        return self._stopped_by

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now, perhaps none. Nothing more once `stopped_by` is
        set.
        """
        if self._stopped_by is not None:
            return ""
        self._fresh.append(token_id)
        before = self._tokenizer.decode(self._context)
        now = self._tokenizer.decode(self._context + self._fresh)
        if now.endswith(_REPLACEMENT) and len(self._fresh) < _MAXIMUM_HELD_TOKENS:
            return ""
        self._context, self._fresh = self._fresh, []
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if self._stopped_by is not None:
            return ""
        rest = ""
        if self._fresh:
            rest = self._tokenizer.decode(self._context + self._fresh)[len(self._tokenizer.decode(self._context)) :]
            self._fresh = []
        released = self._release(rest)
        # Empty where a stop string was found just now.
        held, self._held = self._held, ""
        return released + held

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at, stop) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            at, self._stopped_by = min(found, key=lambda item: (item[0], -len(item[1])))
            released, self._held = self._held[:at], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
