"""Text to token ids and back, whatever tokenizer the user has.

The one place that turns prompts and responses into ids: what is generated from is what is trained
on. A control token of the tokenizer (`<|im_end|>`) counts where the chat template wrote it; in a
message it is encoded as plain text.
"""

import json
import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from self_rewarding_lm.data.chat import (
    RAW,
    Message,
    Messages,
    Render,
    messages_of,
    renderer,
    template_text,
)
from self_rewarding_lm.data.chat import transcript as transcript_of
from self_rewarding_lm.data.control_tokens import Controls, Filled, Mask
from self_rewarding_lm.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from self_rewarding_lm.errors import ConfigError, DataError, TokenizerError
from self_rewarding_lm.records import Ids

logger = logging.getLogger(__name__)


ANSWER = "An answer."


QUESTION: Message = {"role": "user", "content": "A question."}


SAMPLES: tuple[Messages, ...] = ((QUESTION,), ({"role": "system", "content": "Be."}, QUESTION))
"""Conversations that a template is tried on; some refuse those without a system message."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it. messages: None where the text is taken as it is."""

    ids: Ids
    text: str
    messages: Messages | None = None


class Tokens:
    """A tokenizer, its chat template, its end tokens and the model's vocabulary.

    chat_template: a name, jinja text, or "raw" for texts as they are. None: a Hugging Face
    tokenizer's own (the plain one where it has none), texts as they are for all others.
    end_ids: further ids that end a response, as a model's generation config names them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        eos_id: int | None,
        vocab: int | None,
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        hugging_face = hasattr(tokenizer, "apply_chat_template")
        self.vocab = vocab
        self.source: Any = tokenizer
        self.tokenizer: Any = HuggingFaceTokenizer(tokenizer) if hugging_face else tokenizer
        self.renders = chat_template != RAW and (hugging_face or chat_template is not None)
        """Whether a text is a user's message and goes through the template."""
        self._controls: Controls = getattr(self.tokenizer, "controls", Controls())
        self._render, text = self._renderer(None if chat_template == RAW else chat_template)
        self.template: str | None = None if chat_template == RAW else text
        """The template where it is not the tokenizer's own."""
        self._tail = self._behind_answer()
        if hugging_face:
            self.tokenizer.add_controls(_sample(self._render, (ANSWER, "A question.")))
            self._controls = self.tokenizer.controls
        found = getattr(self.tokenizer, "eos_token_id", None) if eos_id is None else eos_id
        turn = self._turn_end() if hugging_face and self.renders else None
        self.eos_id: int | None = found if turn is None else turn
        """The token that the library puts behind a response."""
        text_ends = getattr(self.tokenizer, "text_ends", ()) if eos_id is None else ()
        ends = [i for i in (self.eos_id, found, *end_ids, *text_ends) if i is not None]
        self.end_ids: Ids = tuple(dict.fromkeys(ends))
        """All tokens that end a response: end of turn and end of text."""
        for end in self.end_ids:
            if vocab is not None and not 0 <= end < vocab:
                raise ConfigError(
                    f"eos_id must be one of the model's {vocab} tokens (0 to {vocab - 1}); "
                    f"got {end}."
                )

    def prompt(self, value: str | Sequence[Message], where: str = "the prompt") -> Rendered:
        """A prompt's ids, those of the generation prompt where a template is used.

        Of a text as it is, control tokens count; of a Filled one, only where they are not data.
        """
        if isinstance(value, str) and not self.renders:
            return Rendered(self._filled(value), str(value))
        messages = messages_of(value, where)
        mask, (masked,) = self._masked(messages)
        text = self._text(masked, True, where)
        return Rendered(self._ids(text, mask), transcript_of(messages), messages)

    def response(
        self, prompt: str | Sequence[Message], completion: str, where: str = "the completion"
    ) -> Ids:
        """The ids of a response to a prompt, up to and including its end token.

        They are the rest of the full rendering behind the generation prompt. Raises DataError
        where the template renders a prompt otherwise once it is answered.
        """
        if isinstance(prompt, str) and not self.renders:
            return self.ended(self.encode_part(completion))
        messages = messages_of(prompt, where)
        mask, (asked, answer) = self._masked(
            messages, ({"role": "assistant", "content": completion},)
        )
        before = self._text(asked, True, where)
        full = self._text([*asked, *answer], False, where)
        if not full.startswith(before):
            raise DataError(
                f"{where}: the chat template does not render the prompt as the beginning of prompt "
                f"and response, so what is generated from would not be what is trained on.\n"
                f"prompt: {before!r}\nboth: {full!r}"
            )
        tail = self._tail
        if not tail or not full.endswith(tail):
            tail = _behind(answer[0]["content"].strip(), full[len(before) :])
        rest = self._ids_behind(before, full, mask)
        first = len(rest) - (len(self._ids(tail, mask)) if tail else 0)
        end = next((i for i in range(max(0, first), len(rest)) if rest[i] in self.end_ids), None)
        if end is not None:
            return rest[: end + 1]
        return self.ended(self._ids_behind(before, full.removesuffix(tail), mask))

    def conversation(self, messages: Sequence[Message], where: str = "the conversation") -> Ids:
        """The ids of a whole conversation, with all that the template writes behind it."""
        mask, (masked,) = self._masked(messages_of(messages, where))
        return self._ids(self._text(masked, False, where), mask)

    def encode(self, text: str) -> Ids:
        """Ids of a text as it is; TokenizerError where they are no ids of the model."""
        return self._checked_text(text, "encode")

    def encode_part(self, text: str) -> Ids:
        """Ids of a piece of a text: no begin token."""
        part = "encode_part" if hasattr(self.tokenizer, "encode_part") else "encode"
        return self._checked_text(text, part)

    def encode_data(self, text: str) -> Ids:
        """Ids of a piece of a text that comes from data: no control token counts in it."""
        mask = self._controls.masks([text])
        return self.encode_part(text) if mask is None else self._ids(mask.hide(text), mask)

    def decode(self, ids: Sequence[int]) -> str | None:
        """The text of ids, without end tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        kept = [i for i in ids if i not in self.end_ids]
        text = self.tokenizer.decode(kept)
        if not isinstance(text, str):
            raise TokenizerError(f"decoding must give a str; got {type(text).__name__}: {text!r}")
        return text

    def ended(self, ids: Ids) -> Ids:
        """The ids with the end token behind them, where one is known."""
        return ids if self.eos_id is None or ids[-1:] == (self.eos_id,) else (*ids, self.eos_id)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer and its chat template into a folder; others stay out."""
        if not hasattr(self.source, "save_pretrained"):
            return
        kept = copy(self.source)
        if self.template is not None:
            kept.chat_template = self.template
        kept.save_pretrained(str(folder))

    def compare_template(self, stage: str, weights: Path) -> None:
        """Warn where a folder of weights was saved with another chat template than this one."""
        own = self.template or getattr(self.source, "chat_template", None)
        loader = getattr(type(self.source), "from_pretrained", None)
        if loader is None or not self.renders or not (weights / "tokenizer_config.json").exists():
            return
        theirs = loader(str(weights)).chat_template
        if None not in (own, theirs) and theirs != own:
            logger.warning(
                "%s: the weights in %s were saved with another chat template than the one in use: "
                "reference and policy will read prompts in a form that these weights were not "
                "trained on. (check template_differs, told in docs/troubleshooting.md.)",
                stage,
                weights,
            )

    def checked(self, ids: Any, whose: str) -> Ids:
        """Ids of any number type as a tuple of ints within the vocabulary."""
        if isinstance(ids, Tensor) or hasattr(ids, "tolist"):
            if getattr(ids, "ndim", 1) != 1:
                raise TokenizerError(
                    f"token ids {whose} must be one-dimensional; got shape {tuple(ids.shape)}."
                )
            ids = ids.tolist()
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
            raise TokenizerError(
                f"token ids {whose} must be a list or 1-D tensor of numbers; got "
                f"{type(ids).__name__}. Does tokenizer_encode return ids?"
            )
        return tuple(self._checked_id(i, whose) for i in ids)

    def _text(self, messages: Sequence[Message], generation: bool, where: str) -> str:
        try:
            return self._render(messages, generation)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _renderer(self, chat_template: str | None) -> tuple[Render, str | None]:
        """The function that renders, and the template's text where it is not the tokenizer's own.

        Begin tokens that the tokenizer leads texts with stand in that text, for whoever loads it.
        """
        if chat_template is None and getattr(self.source, "chat_template", None):
            return renderer(None, tokenizer=self.source), None
        text = template_text(chat_template or "plain")
        assert text is not None
        lead = getattr(self.tokenizer, "lead", ())
        if lead and self.encode_part(_sample(self._make(text)))[: len(lead)] != lead:
            written = "".join(map(str, self.source.convert_ids_to_tokens(list(lead))))
            text = "{{ " + json.dumps(written, ensure_ascii=False) + " }}" + text
        return self._make(text), text

    def _make(self, text: str) -> Render:
        return renderer(
            text,
            tokenizer=self.source,
            bos_token=getattr(self.source, "bos_token", None),
            eos_token=getattr(self.source, "eos_token", None),
        )

    def _masked(self, *parts: Sequence[Message]) -> tuple[Mask | None, list[list[Message]]]:
        """Parts of a conversation with the control tokens in their messages hidden."""
        mask = self._controls.masks(text for part in parts for m in part for text in m.values())
        hide = str if mask is None else mask.hide
        return mask, [[{key: hide(text) for key, text in m.items()} for m in p] for p in parts]

    def _ids(self, text: str, mask: Mask | None) -> Ids:
        """The ids of a piece of a rendering."""
        if mask is None:
            return self.encode_part(text)
        ids = self.tokenizer.encode_pieces(mask.pieces(text))
        return self.checked(ids, f"of the text {text[:60]!r}")

    def _filled(self, text: str) -> Ids:
        """The ids of a text as it is."""
        mask = self._controls.masks([text])
        if mask is None or not isinstance(text, Filled):
            return self.encode(text)
        ids = self.tokenizer.encode_pieces(mask.pieces(mask.hide_data(text)))
        return self.checked(self.tokenizer.led(ids), f"of the text {text[:60]!r}")

    def _ids_behind(self, before: str, full: str, mask: Mask | None) -> Ids:
        """The ids of a text from where the ids of its beginning end."""
        ids, head = self._ids(full, mask), self._ids(before, mask)
        if ids[: len(head)] == head:
            return ids[len(head) :]
        return self._ids(full[len(before) :], mask)

    def _behind_answer(self) -> str:
        """What the template writes behind an answer; nothing where it refuses the trial."""
        return _behind(ANSWER, _sample(self._render, (ANSWER,)))

    def _turn_end(self) -> int | None:
        """The first special token behind an answer: what ends a turn in this template."""
        return next((i for i in self.encode_part(self._tail) if i in self.tokenizer.special), None)

    def _checked_text(self, text: str, method: str) -> Ids:
        if self.tokenizer is None:
            raise ConfigError(
                f"a text needs a tokenizer: {text[:60]!r}. Give the trainer tokenizer_encode and "
                "tokenizer_decode, or tokenizer."
            )
        return self.checked(getattr(self.tokenizer, method)(text), f"of the text {text[:60]!r}")

    def _checked_id(self, value: Any, whose: str) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != value or isinstance(value, bool):
            raise TokenizerError(f"token ids {whose} must be whole numbers; got {value!r}.")
        if number < 0 or (self.vocab is not None and number >= self.vocab):
            limit = "" if self.vocab is None else f" to {self.vocab - 1}"
            raise TokenizerError(
                f"token ids {whose} must be ids of the model, 0{limit}; got {number}. "
                "The tokenizer does not fit the model's vocabulary."
            )
        return number


def _sample(render: Render, more: Sequence[str] = ()) -> str:
    """A rendering of a question, with turns behind it or open; empty where it is refused."""
    roles = ("assistant", "user")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(more)]
    for messages in SAMPLES:
        try:
            return render((*messages, *turns), not turns)
        except DataError:
            continue
    return ""


def _behind(part: str, text: str) -> str:
    """What stands behind the last place of a part of a text; nothing where it is not in it."""
    return text.rpartition(part)[2] if part and part in text else ""
