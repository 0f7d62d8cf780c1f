"""Text to token ids and back, whatever tokenizer the user has.

The one place that turns prompts and responses into ids: what is generated from is what is trained
on. A control token of the tokenizer (`<|im_end|>`) counts as one if the chat template wrote it; in
a message it is encoded as plain text.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
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
    variables_of,
)
from self_rewarding_lm.data.chat import transcript as transcript_of
from self_rewarding_lm.data.control_tokens import Controls, Filled, FindSpans, Mask
from self_rewarding_lm.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from self_rewarding_lm.errors import (
    ConfigError,
    DataError,
    TokenizerError,
    give_tokenizer,
    said,
    setting,
)
from self_rewarding_lm.records import VARIABLES, Ids
from self_rewarding_lm.runs.pretrained import name_ends, name_eos
from self_rewarding_lm.runs.stage_files import FORMAT

logger = logging.getLogger(__name__)


ANSWER = "An answer."


QUESTION: Message = {"role": "user", "content": "A question."}


SAMPLES: tuple[Messages, ...] = ((QUESTION,), ({"role": "system", "content": "Be."}, QUESTION))
"""Conversations that a template is tried on; some refuse those without a system message."""


class _UnwrittenError(Exception):
    """Ids have control tokens that no template wrote."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it. messages: None if no chat template was used."""

    ids: Ids
    text: str
    messages: Messages | None = None


class Tokens:
    """A tokenizer, its chat template, its end tokens and the size of the model's vocabulary.

    chat_template: a name, jinja text, or "raw" for texts as they are. None means a Hugging Face
    tokenizer's own (the plain one if it has none), and texts as they are for all others.
    eos_id: the token that ends a response; None asks the tokenizer and the template. end_ids:
    further ids that end a response, as a model's generation config names them. rules: those of the
    run, `Run.format`. date: what templates that ask for it take for today.

    Of its attributes, `renders` says whether a text is a user's message and goes through the
    template, `template` is that template's text (None if it is the tokenizer's own), `eos_id` the
    token that is put after a response (None if none is known), and `end_ids` are all tokens that
    end a response: end of turn and end of text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        eos_id: int | None,
        vocab: int | None,
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
        rules: int = FORMAT,
        date: datetime | None = None,
    ) -> None:
        # 1. the tokenizer: one of transformers is wrapped
        is_hugging_face = hasattr(tokenizer, "apply_chat_template")
        self.source: Any = tokenizer
        self.rules, self.date = rules, date or datetime.now()
        self._options = {"eos_id": eos_id, "chat_template": chat_template, "end_ids": end_ids}
        self.tokenizer: Any = (
            HuggingFaceTokenizer(tokenizer, thoughts_count=rules == 1)
            if is_hugging_face
            else tokenizer
        )
        self.vocab = vocab
        # 2. the chat template, and what it writes after an answer
        is_raw = chat_template == RAW
        self.renders = not is_raw and (is_hugging_face or chat_template is not None)
        self._render, text = self._choose_template(None if is_raw else chat_template)
        self.template: str | None = None if is_raw else text
        self._render = self._that_shows_texts(self._render)
        self._variables = variables_of(text, tokenizer)
        self._reads: dict[tuple[str, str], bool] = {}  # (role, key of a message)
        self._named: set[str] = set()  # what a warning has said that nothing reads
        self._answer_end = _text_behind(ANSWER, _render_sample(self._render, (ANSWER,)))
        # 3. control tokens, those that the template writes between turns included
        if is_hugging_face:
            between_turns = _render_sample(self._render, (ANSWER, "A question."))
            self.tokenizer.add_controls(between_turns)
        self._controls: Controls = getattr(self.tokenizer, "controls", Controls())
        # 4. end tokens: of a turn in this template, of a text, and those given
        text_end = getattr(self.tokenizer, "eos_token_id", None) if eos_id is None else eos_id
        turn_end = self._turn_end_id() if is_hugging_face and self.renders else None
        self.eos_id: int | None = text_end if turn_end is None else turn_end
        text_ends = getattr(self.tokenizer, "text_ends", ()) if eos_id is None else ()
        text_ends = (i for i in text_ends if vocab is None or i < vocab)  # a converter may add some
        ends = (self.eos_id, text_end, *end_ids, *text_ends)
        self.end_ids: Ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        # 5. all of them must be tokens of the model
        for end in self.end_ids:
            if vocab is not None and not 0 <= end < vocab:
                raise ConfigError(
                    f"eos_id must be one of the model's {vocab} tokens (0 to {vocab - 1}); "
                    f"got {end}."
                )

    def follow(self, rules: int, date: datetime) -> bool:
        """Render as a run that goes on: by the rules that it began with, as of the date of then.

        Returns whether a prompt may have other ids now.
        """
        template = self.template or getattr(self.source, "chat_template", None)
        differs = rules != self.rules or "strftime_now" in str(template)
        self.date = date
        if rules != self.rules:
            options = {**self._options, "rules": rules, "date": date}
            self.__init__(self.source, vocab=self.vocab, **options)
        return differs

    def prompt(self, value: str | Sequence[Message], where: str = "the prompt") -> Rendered:
        """A prompt's ids; with a chat template, up to where the assistant begins to answer.

        In a text without a template control tokens count; in a Filled one, except those from data.
        """
        if isinstance(value, str) and not self.renders:
            return Rendered(self._encode_prompt_text(value), str(value))
        messages = messages_of(value, where)
        self._look_for_unread(messages, where)

        def encode(mask: Mask | None, asked: list[Message]) -> Ids:
            return self._encode_masked(self._render_text(asked, True, where), mask)

        ids = self._with_controls_hidden(encode, [messages], where)
        return Rendered(ids, transcript_of(messages), messages)

    def response(
        self,
        prompt: str | Sequence[Message],
        completion: str | Message,
        where: str = "the completion",
    ) -> Ids:
        """The ids of a response to a prompt, up to and including its end token.

        completion: a text, or a message of the assistant that says more than a text (calls of
        tools, a thought). With a chat template the ids are what it renders after the prompt once
        that is answered. Raises DataError if it then renders the prompt itself in another way, and
        if it shows nothing of the message.
        """
        if isinstance(prompt, str) and not self.renders:
            text = completion if isinstance(completion, str) else str(completion["content"])
            if not isinstance(completion, str):
                self.name_unread(completion.keys() - {"role", "content"}, where)
            return self.ended(self.encode_part(text))
        messages = messages_of(prompt, where)

        def encode(mask: Mask | None, asked: list[Message], answer: list[Message]) -> Ids:
            return self._encode_response(mask, asked, answer, where)

        if isinstance(completion, str):
            completion = {"role": "assistant", "content": completion}
        answer = messages_of([completion], where)
        self._look_for_unread((*messages, *answer), where)
        (said,) = answer
        keys = said.keys() - {"role", "content"}
        if keys and not said["content"].strip():
            if not any(self._reads.get(("assistant", key), True) for key in keys):
                raise DataError(
                    f"{where}: its content is empty, and the chat template does not read its "
                    f"{', '.join(map(repr, sorted(keys)))}, so an empty answer would be learnt. "
                    f"Give {_template_setting()} one that does, or leave the row out "
                    f"({setting('on_bad_row', 'skip')})."
                )
        return self._with_controls_hidden(encode, [messages, answer], where)

    def _encode_response(
        self, mask: Mask | None, asked: list[Message], answer: list[Message], where: str
    ) -> Ids:
        # 1. render the prompt, and the prompt with its answer
        before = self._render_text(asked, True, where)
        full = self._render_text([*asked, *answer], False, where)
        if not full.startswith(before):
            raise DataError(
                f"{where}: the chat template does not render the prompt as the beginning of prompt "
                f"and response, so the model would generate from one text and train on another.\n"
                f"prompt: {before!r}\nboth: {full!r}\n{self._remedy(asked, before, full)}"
            )
        # 2. encode what stands after the prompt
        ids = self._encode_behind(before, full, mask)
        # 3. cut it after the first end token that the template wrote after the answer
        tail = self._answer_end
        if not tail or not full.endswith(tail):
            tail = _text_behind(answer[0]["content"].strip(), full[len(before) :])
        tail_length = len(self._encode_masked(tail, mask)) if tail else 0
        places = range(max(0, len(ids) - tail_length), len(ids))
        if not tail and isinstance(self.tokenizer, HuggingFaceTokenizer):
            places = reversed(range(len(ids)))  # no message can hold one: the template wrote it
        end = next((i for i in places if ids[i] in self.end_ids), None)
        if end is not None:
            return ids[: end + 1]
        # 4. if it wrote none, put the end token after the answer
        return self.ended(self._encode_behind(before, full.removesuffix(tail), mask))

    def conversation(self, messages: Sequence[Message], where: str = "the conversation") -> Ids:
        """The ids of a whole conversation, with all that the template writes after it."""

        def encode(mask: Mask | None, said: list[Message]) -> Ids:
            return self._encode_masked(self._render_text(said, False, where), mask)

        return self._with_controls_hidden(encode, [messages_of(messages, where)], where)

    def encode(self, text: str) -> Ids:
        """The ids of a text. Raises TokenizerError if they are no ids of the model."""
        return self._encode_checked(text, "encode")

    def encode_part(self, text: str) -> Ids:
        """The ids of a piece of a text, without a begin token."""
        part = "encode_part" if hasattr(self.tokenizer, "encode_part") else "encode"
        return self._encode_checked(text, part)

    def encode_data(self, text: str) -> Ids:
        """The ids of a piece of a text that comes from data; no control token counts in it."""

        def encode(find: FindSpans) -> Ids:
            mask = self._controls.mask_for([text], find)
            return self._encode_masked(text if mask is None else mask.hide(text), mask)

        return self._tried(encode, f"the text {text[:60]!r}")

    def decode(self, ids: Sequence[int]) -> str | None:
        """The text of ids, without end tokens; None if there is no tokenizer."""
        if self.tokenizer is None:
            return None
        kept = [i for i in ids if i not in self.end_ids]
        text = self.tokenizer.decode(kept)
        if not isinstance(text, str):
            raise TokenizerError(f"decoding must give a str; got {type(text).__name__}: {text!r}")
        return text

    def ended(self, ids: Ids) -> Ids:
        """The ids with the end token after them, if one is known."""
        return ids if self.eos_id is None or ids[-1:] == (self.eos_id,) else (*ids, self.eos_id)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer and its chat template into a folder; other kinds not.

        A generation config that is there, and the tokenizer, then name the end tokens in use:
        whoever loads the folder generates until the end of a turn.
        """
        if self.vocab is not None:
            pad_id = getattr(self.source, "pad_token_id", None)
            name_ends(folder, self.end_ids, pad_id, self.vocab)
        if not hasattr(self.source, "save_pretrained"):
            return
        tokenizer = copy(self.source)
        if self.template is not None:
            tokenizer.chat_template = self.template
        tokenizer.save_pretrained(str(folder))
        if self._is_named_end(tokenizer.chat_template):
            name_eos(folder, str(tokenizer.convert_ids_to_tokens(self.eos_id)))

    def compare_template(self, stage: str, weights: Path) -> None:
        """Warn if a folder of weights was saved with another chat template than this one."""
        template = self.template or getattr(self.source, "chat_template", None)
        loader = getattr(type(self.source), "from_pretrained", None)
        if loader is None or not self.renders or not (weights / "tokenizer_config.json").exists():
            return
        saved_template = loader(str(weights)).chat_template
        if None not in (template, saved_template) and saved_template != template:
            logger.warning(
                "%s: the weights in %s were saved with another chat template than the one in use: "
                "reference and policy will read prompts in a form that these weights were not "
                "trained on. (check template_differs, explained in docs/troubleshooting.md.)",
                stage,
                weights,
            )

    def checked(self, ids: Any, whose: str) -> Ids:
        """Ids of any number type as a tuple of ints within the vocabulary.

        whose: words for the error. Raises TokenizerError if they are no such ids.
        """
        if isinstance(ids, Tensor) or hasattr(ids, "tolist"):
            if getattr(ids, "ndim", 1) != 1:
                raise TokenizerError(
                    f"token ids {whose} must be one-dimensional; got shape {tuple(ids.shape)}."
                )
            ids = ids.tolist()
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
            raise TokenizerError(
                f"token ids {whose} must be a list or 1-D tensor of numbers; got "
                f"{type(ids).__name__} {str(ids)[:80]!r}."
            )
        return tuple(self._checked_id(i, whose) for i in ids)

    def name_unread(self, columns: Iterable[str], where: str) -> None:
        """Warn of columns that nothing reads, of each once. where: the first row with them."""
        new = sorted(set(columns) - self._named)
        self._named.update(new)
        if new:
            names = ", ".join(map(repr, new))
            logger.warning("%s: nothing reads %s; this is said once.", where, names)

    def _look_for_unread(self, messages: Messages, where: str) -> None:
        """Name the keys of messages that change nothing in what the template writes."""
        for place, message in enumerate(messages):
            for key in sorted(message.keys() - {"role", "content", VARIABLES}):
                kind = (message["role"], key)
                if kind not in self._reads:
                    self._reads[kind] = self._has_effect(messages, place, key)
                if not self._reads[kind]:
                    self.name_unread([key], f"{where}: of messages of the role {kind[0]}")
            self.name_unread(message.get(VARIABLES, {}).keys() - self._variables, where)

    def _has_effect(self, messages: Messages, place: int, key: str) -> bool:
        """Whether a key changes what the template writes, here or in a last answer."""
        message = messages[place]
        without = {name: value for name, value in message.items() if name != key}
        talks = [
            (messages, (*messages[:place], without, *messages[place + 1 :])),
            ((QUESTION, message), (QUESTION, without)),
        ]
        try:
            return any(
                self._render(one, False) != self._render(other, False) for one, other in talks
            )
        except DataError:  # it refuses one of them, so it has read it
            return True

    def _that_shows_texts(self, render: Render) -> Render:
        """The same function, or one that gives texts as parts, where the template wants those.

        Raises ConfigError if a message's text does not stand in what the template writes.
        """
        answered = ""
        for shows in (render, _with_parts(render)):
            answered = answered or _render_sample(shows, (ANSWER,))
            text = _render_sample(shows, (ANSWER,)).casefold()
            if all(part.casefold() in text for part in (QUESTION["content"], ANSWER)):
                return shows
        if not answered or not self.renders:
            return render  # it refuses the samples: rows will show
        raise ConfigError(
            f"the chat template does not show what messages say: it renders "
            f"{QUESTION['content']!r}, answered by {ANSWER!r}, as {answered!r}. Give "
            f"{_template_setting()} a name or jinja text, or 'raw' for texts as they are."
        )

    def _remedy(self, asked: Sequence[Message], before: str, full: str) -> str:
        """What can be done about a template that writes an answered prompt in another way."""
        shared = (i for i, (a, b) in enumerate(zip(before, full, strict=False)) if a != b)
        lead = before[next(shared, len(full)) :]
        closed = self._render_text(asked, False, "the prompt")
        begun = before[len(closed) :] if before.startswith(closed) else ""
        if lead and begun.endswith(lead):
            words = (
                f"The template puts {lead!r} before an answer that is to be written, and not "
                f"before one that is there. Give {_template_setting()} its own text "
                f"(tokenizer.chat_template), changed so that {lead!r} stands before the last "
                "answer too and all of that answer after it, its thought included"
            )
        else:
            words = (
                f"Give {_template_setting()} another name or text, such as its own, changed so "
                "that a prompt stays the same when an answer follows it"
            )
        words += "; or give such rows as token ids, {'prompt': ids, 'completion': ids}."
        switches = sorted(name for name in self._variables if "think" in name)
        if switches:
            words += (
                f" Or set the template's {' or '.join(switches)} by a column {VARIABLES!r}, such "
                f'as {{"{switches[0]}": false}}.'
            )
        return words

    def _render_text(
        self, messages: Sequence[Message], add_generation_prompt: bool, where: str
    ) -> str:
        try:
            return self._render(messages, add_generation_prompt)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _choose_template(self, chat_template: str | None) -> tuple[Render, str | None]:
        """The function that renders, and the template's text unless it is the tokenizer's own.

        A begin token that the tokenizer puts before texts becomes a part of that text, so that
        whoever loads the saved template renders the same.
        """
        if chat_template is None and getattr(self.source, "chat_template", None):
            return renderer(None, tokenizer=self.source, now=lambda: self.date), None
        text = template_text(chat_template or "plain")
        assert text is not None
        begin_ids = getattr(self.tokenizer, "begin_ids", ())
        if begin_ids:
            sample = self.encode_part(_render_sample(self._make_renderer(text)))
            if sample[: len(begin_ids)] != begin_ids:
                tokens = self.source.convert_ids_to_tokens(list(begin_ids))
                begin_text = json.dumps("".join(map(str, tokens)), ensure_ascii=False)
                text = "{{ " + begin_text + " }}" + text
        return self._make_renderer(text), text

    def _make_renderer(self, text: str) -> Render:
        return renderer(
            text,
            tokenizer=self.source,
            bos_token=getattr(self.source, "bos_token", None),
            eos_token=getattr(self.source, "eos_token", None),
            now=lambda: self.date,
        )

    def _with_controls_hidden(
        self, encode: Callable[..., Ids], parts: Sequence[Sequence[Message]], where: str
    ) -> Ids:
        """`encode(mask, *parts)` of parts of a conversation, control tokens in messages hidden."""

        def masked(find: FindSpans) -> Ids:
            texts = _texts_in([message.values() for part in parts for message in part])
            mask = self._controls.mask_for(texts, find)
            if mask is None:
                return encode(None, *map(list, parts))
            hidden = (
                [{k: _with_texts(v, mask.hide) for k, v in message.items()} for message in part]
                for part in parts
            )
            return encode(mask, *hidden)

        return self._tried(masked, where)

    def _tried(self, encode: Callable[[FindSpans], Ids], where: str) -> Ids:
        """`encode(find)`, where `find` says which control tokens stand in a text.

        If ids have more of them than the template wrote, the tokenizer has made some of other
        characters; `find` then asks the tokenizer. Raises DataError if that does not help.
        """
        try:
            return encode(self._controls.spans)
        except _UnwrittenError:
            pass
        try:
            return encode(self.tokenizer.control_spans)
        except _UnwrittenError as error:
            raise DataError(
                f"{where}: the tokenizer makes control tokens ({error}) of a text that does not "
                "hold them, together with what the chat template writes beside it."
            ) from error

    def _encode_masked(self, text: str, mask: Mask | None) -> Ids:
        """The ids of a piece of a rendering in which control tokens of messages are hidden.

        Raises _UnwrittenError if they have control tokens that the template did not write.
        """
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.encode_part(text)
        pieces = [(text, False)] if mask is None else mask.pieces(text)
        ids = self.checked(self.tokenizer.encode_pieces(pieces), f"of the text {text[:60]!r}")
        unwritten = self.tokenizer.unwritten(pieces, ids)
        if unwritten:
            raise _UnwrittenError(", ".join(unwritten))
        return ids

    def _encode_prompt_text(self, text: str) -> Ids:
        """The ids of a prompt without a template; its begin token before them."""
        if not isinstance(text, Filled) or not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.encode(text)

        def encode(find: FindSpans) -> Ids:
            mask = self._controls.mask_for([text], find)
            return self._encode_masked(str(text) if mask is None else mask.hide_data(text), mask)

        ids = self._tried(encode, f"the text {text[:60]!r}")
        return self.checked(self.tokenizer.with_begin(list(ids)), "with a begin token")

    def _encode_behind(self, before: str, full: str, mask: Mask | None) -> Ids:
        """The ids of what stands in `full` after `before`, its beginning."""
        ids, head = self._encode_masked(full, mask), self._encode_masked(before, mask)
        if ids[: len(head)] == head:
            return ids[len(head) :]
        return self._encode_masked(full[len(before) :], mask)

    def _is_named_end(self, template: Any) -> bool:
        """Whether the end token in use can be the tokenizer's own without other consequences.

        It must be special, or texts would lose it, and the template must not write the tokenizer's.
        """
        own = getattr(self.tokenizer, "eos_token_id", None)
        is_special = self.eos_id in getattr(self.tokenizer, "special", ())
        return is_special and self.eos_id != own and "eos_token" not in str(template)

    def _turn_end_id(self) -> int | None:
        """The first special token that the template writes after an answer, if any."""
        ids = self.encode_part(self._answer_end)
        return next((i for i in ids if i in self.tokenizer.special), None)

    def _encode_checked(self, text: str, method: str) -> Ids:
        if self.tokenizer is None:
            raise ConfigError(f"a text needs a tokenizer: {text[:60]!r}. {give_tokenizer()}")
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


def _template_setting() -> str:
    return said("chat_template=", "--chat-template (`chat_template` of the recipe)")


def _render_sample(render: Render, more: Sequence[str] = ()) -> str:
    """A question with `more` turns after it, rendered; "" if the template refuses it.

    Without them the assistant's answer is begun.
    """
    roles = ("assistant", "user")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(more)]
    for messages in SAMPLES:
        try:
            return render((*messages, *turns), not turns)
        except DataError:
            continue
    return ""


def _text_behind(part: str, text: str) -> str:
    """What stands after the last occurrence of a part in a text; "" if there is none."""
    return text.rpartition(part)[2] if part and part in text else ""


def _with_parts(render: Render) -> Render:
    """The same function, that gives the template each text as a list of one part."""

    def render_parts(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        parted = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return render(parted, add_generation_prompt)

    return render_parts


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of plain data, the keys of dicts included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in([*value.keys(), *value.values()])
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts_in(item)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _with_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    return value
