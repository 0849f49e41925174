"""Text of tokens that arrive one by one, without half characters."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from rollout_server.engine.stop_strings import StopFinder

SHORTEST_CONTEXT, LONGEST_CONTEXT = 4, 24
MOST_CONTEXT = 256
"""Tokens of a prompt that are given to a stream if none of its ends is a text."""
_INVALID_PREFIX = "Invalid prefix encountered"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text, and what ends it: vLLM's parameters of these names.

    `silent`: tokens without text, those that end a response. `min_tokens`: no stop string ends within so many tokens.
    """

    stops: tuple[str, ...] = ()
    silent: frozenset[int] = frozenset()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    min_tokens: int = 0


class TextCursor:
    """A place in a response: decodes the tokens that follow and looks for stop strings.

    Characters whose bytes are not complete are held back, also over segment boundaries; bytes that never become a
    character at the very end of a response are left out, as vLLM does. `prompt` gives the tokenizer its context.
    `characters`: shown so far. `stopped`: the stop string that was found; nothing is taken after it.
    """

    __slots__ = ("_added", "_options", "_special", "_stream", "_taken", "_tokenizer", "characters", "finder", "stopped")

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], options: TextOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        context = _context(tokenizer, prompt, options)
        self._stream = DecodeStream(ids=context, skip_special_tokens=options.skip_special_tokens)
        self._taken = 0
        text_between = options.skip_special_tokens or options.spaces_between_special_tokens
        self._added: dict[int, Any] = {} if text_between else tokenizer.get_added_tokens_decoder()
        """Special tokens and their like, if no spaces may come between them."""
        self._special = False
        """Whether the last token was one of `_added`."""
        self.finder = StopFinder(options.stops, options.include_stop_str_in_output) if options.stops else None
        self.characters = 0
        self.stopped: str | None = None

    def copy(self) -> "TextCursor":
        """A cursor at the same place that moves independently."""
        other: TextCursor = object.__new__(TextCursor)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other._stream = copy.copy(self._stream)
        other.finder = copy.copy(self.finder)
        return other

    def feed(self, token_ids: list[int]) -> tuple[str, int]:
        """Take tokens: the text that can be shown now, and how many were taken before a stop string was complete."""
        silent = self._options.silent
        if self.finder is None:
            text = self._decode_all([token_id for token_id in token_ids if token_id not in silent])
            self.characters += len(text)
            return text, len(token_ids)
        if len(token_ids) > 1 and self.stopped is None and self._taken >= self._options.min_tokens:
            text_of_all = self._without_stop(token_ids)
            if text_of_all is not None:
                return text_of_all, len(token_ids)
        pieces = []
        taken = 0
        for token_id in token_ids:
            if self.stopped is not None:
                break
            taken += 1
            self._taken += 1
            if token_id in silent:
                continue
            piece = self._decode(token_id)
            if piece is None:
                continue
            if self._taken <= self._options.min_tokens:
                piece = self.finder.let_pass(piece)
            else:
                piece, self.stopped = self.finder.push(piece)
            if piece:
                pieces.append(piece)
        text = "".join(pieces)
        self.characters += len(text)
        return text, taken

    def _without_stop(self, token_ids: list[int]) -> str | None:
        """As `feed`, in one go; None, and nothing has happened, if there is a stop string in the text.

        Token by token takes so long that the responses of one group would hold the event loop.
        """
        ahead = self.copy()
        if ahead.finder is None:
            return None
        text = ahead._decode_all([token_id for token_id in token_ids if token_id not in self._options.silent])
        shown, stop = ahead.finder.push(text)
        if stop is not None:
            return None
        self._stream, self._special, self.finder = ahead._stream, ahead._special, ahead.finder
        self._taken += len(token_ids)
        self.characters += len(shown)
        return shown

    def finish(self) -> str:
        """Text that was held back in case it began a stop string."""
        if self.finder is None or self.stopped is not None:
            return ""
        text = self.finder.flush()
        self.characters += len(text)
        return text

    def _decode_all(self, token_ids: list[int]) -> str:
        """As one after the other, but in one call where the last of them completes its character."""
        if len(token_ids) > 1 and not self._added:
            stream: Any = copy.copy(self._stream)
            try:
                text: str | None = stream.step(self._tokenizer, token_ids)
            except Exception as error:
                if not str(error).startswith(_INVALID_PREFIX):
                    raise
                text = None
            if text is not None:
                self._stream = stream
                return text
        return "".join(filter(None, map(self._decode, token_ids)))

    def _decode(self, token_id: int) -> str | None:
        piece = self._step(token_id)
        if self._added:
            added = self._added.get(token_id)
            if added is not None and self._special:
                piece = added.content
            self._special = added is not None
        return piece

    def _step(self, token_id: int) -> str | None:
        stream: Any = self._stream
        try:
            piece: str | None = stream.step(self._tokenizer, token_id)
            return piece
        except Exception as error:
            # Some byte sequences decode differently once more follow; the stream then has to start afresh.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
        self._stream = DecodeStream(skip_special_tokens=self._options.skip_special_tokens)
        return self._stream.step(self._tokenizer, token_id)


def _context(tokenizer: Tokenizer, prompt: list[int], options: TextOptions) -> list[int]:
    """The end of a prompt that tells how the next token is written: it has a text, in whole characters.

    A stream that is given more decodes all of it with the first token. Without such an end the next text begins with
    what was given, as vLLM's does.
    """
    for length in range(SHORTEST_CONTEXT, LONGEST_CONTEXT):
        text = tokenizer.decode(prompt[-length:], skip_special_tokens=options.skip_special_tokens)
        if text and "\ufffd" not in text:
            return prompt[-length:]
    return prompt[-MOST_CONTEXT:]


class Texts(Protocol):
    """How single tokens are called in log-probs."""

    def __getitem__(self, token_id: int) -> str: ...


class TokenNumbers:
    """Tokens as `token_id:N`."""

    def __getitem__(self, token_id: int) -> str:
        return f"token_id:{token_id}"


class TokenTexts:
    """The text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text
