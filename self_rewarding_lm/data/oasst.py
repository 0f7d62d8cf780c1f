"""Open Assistant message trees: seed data for instruction following and for judging.

A line of the file is a tree: a first prompt, replies to it, replies to those, and so on; people
ranked the replies of a message, 0 best. The files `*.trees.jsonl(.gz)` of the published data sets
(arXiv:2304.07327) have this form. Knows nothing of models or tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from self_rewarding_lm.data.files import UnreadableLine, place_in, read_rows
from self_rewarding_lm.errors import ConfigError, DataError, typed
from self_rewarding_lm.records import RankedReplies, is_number

READY = "ready_for_export"


ROLES = {"prompter": "user", "assistant": "assistant"}


Message = Mapping[str, Any]


Tree = tuple[str, Message]
"""Its id and its first message."""


@dataclass(frozen=True)
class OpenAssistant:
    """Rows that `open_assistant` took from the trees; each tree is in one of the four lists.

    ift: supervised rows `{"prompt", "completion"}`. eft_train, eft_eval: each the ranked replies
    to one prompt; its id is that of the prompt's message, its group the id of its tree. prompts:
    first prompts, `{"prompt"}`, of the trees that the three shares leave over. left_out: how many
    trees and messages were not used, by reason.
    """

    ift: list[dict[str, Any]]
    eft_train: list[RankedReplies]
    eft_eval: list[RankedReplies]
    prompts: list[dict[str, Any]]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class _Turn:
    """The messages up to and including one of the user's, and the replies to that."""

    path: tuple[Message, ...]
    replies: list[Message]

    @property
    def prompt(self) -> str | tuple[Message, ...]:
        """The text of a first message, or the messages if a conversation goes before."""
        if len(self.path) == 1:
            return self.path[0]["text"]
        return tuple({"role": ROLES[m["role"]], "content": m["text"]} for m in self.path)


@dataclass(frozen=True)
class _Filter:
    """Chooses the messages that can be used, and counts the others by reason."""

    lang: str | None
    min_quality: float | None
    left_out: Counter[str] = field(default_factory=Counter)

    def usable(self, messages: Sequence[Message]) -> list[Message]:
        """Messages that can be used; with each of the others, all that follow it are left out."""
        return [message for message in messages if self._keep(self._fault(message))]

    def are_good(self, messages: Sequence[Message]) -> bool:
        """Whether all messages have the least quality."""
        is_poor = any(self._is_poor(message) for message in messages)
        return self._keep("low_quality" if is_poor else None)

    def ranked(self, replies: Sequence[Message]) -> list[Message]:
        """Replies that have a rank, best first."""
        kept = [r for r in replies if self._keep("no_rank" if r.get("rank") is None else None)]
        return sorted(kept, key=lambda reply: reply["rank"])

    def _fault(self, message: Message) -> str | None:
        """Why a message cannot be used; None if it can."""
        if message.get("deleted"):
            return "deleted"
        if message.get("review_result") is False:
            return "rejected_in_review"
        is_other = self.lang is not None and message.get("lang") != self.lang
        return "other_language" if is_other else None

    def _is_poor(self, message: Message) -> bool:
        if self.min_quality is None:
            return False
        quality: Any = message
        for name in ("labels", "quality", "value"):
            quality = quality.get(name) if isinstance(quality, Mapping) else None
        return not is_number(quality) or quality < self.min_quality

    def _keep(self, reason: str | None) -> bool:
        """Whether there is no reason against it; a reason is counted."""
        if reason is not None:
            self.left_out[reason] += 1
        return reason is None


@typed
def open_assistant(
    path: str | Path,
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.6, 0.3, 0.1),
    max_ift: int | None = None,
    max_eft_train: int | None = None,
    max_eft_eval: int | None = None,
    trees: Sequence[int] | None = None,
    lang: str | None = "en",
    depth: Literal["first", "any"] = "first",
    ift_depth: Literal["first", "any"] = "first",
    ift_rank: int = 0,
    min_quality: float | None = None,
) -> OpenAssistant:
    """Supervised rows and ranked replies of message trees, disjoint by tree.

    The trees are put in an order that depends only on `seed` and their ids, then cut by `shares`:
    the first part gives IFT rows, the second EFT rows to train on, the third EFT rows to evaluate
    on; if the shares add up to less than 1, the first prompts of the other trees are `prompts`.
    arXiv:2401.10020, 3.1.1, has 3,200 IFT rows (`max_ift=3200`; English, first turn, rank 0, the
    defaults here) and 1,630 + 541 EFT examples, which are single judged replies: 541 of them are
    some 190 ranked sets. The default shares are ours.

    path: a .jsonl or .jsonl.gz file. seed: of the order of the trees. shares: of the trees, for
    IFT, EFT training and EFT evaluation. max_ift: IFT rows at most. max_eft_train: ranked sets to
    train on at most. max_eft_eval: ranked sets to evaluate on at most. trees: the lines to read,
    from 0: `range(0, 70)`; None: all. lang: of every message used; None takes all. depth: ranked
    replies to first prompts, or to any user's message, then with the conversation before it as
    messages. ift_depth: the same for IFT. ift_rank: the worst rank that is learnt. min_quality:
    from 0 to 1, the least `labels.quality.value` of learnt replies and of all messages of a prompt,
    and a message without that label is left out; ranked replies may be of any quality, to tell
    good from bad.

    Left out, and counted: trees in a state other than ready_for_export (a tree without
    `tree_state` is taken); messages that are deleted, rejected in review or in another language,
    with all that follow them; replies without a rank, which were compared with no other. A ranked
    set has at least two ranks. Raises DataError, naming the line, for anything that is no message
    tree, if no tree is left, and if the file does not have the lines that `trees` names;
    ConfigError for shares that are no shares.
    """
    if min(shares) < 0 or not 0 < sum(shares) <= 1 + 1e-9:
        raise ConfigError(
            f"shares must be three numbers from 0 on, for IFT, EFT training and EFT evaluation, "
            f"with a sum above 0 and at most 1; got {shares}."
        )
    # 1. read the trees, in the order of their seeded digests
    keep = _Filter(lang, min_quality)
    usable = sorted(_read_trees(path, trees, keep), key=lambda tree: _digest(seed, tree[0]))
    if not usable:
        words = ", ".join(f"{n} {reason}" for reason, n in keep.left_out.items()) or "no line"
        raise DataError(f"{path} gives no tree that can be used. Left out: {words}.")
    # 2. divide them by the shares
    ends = [round(sum(shares[: part + 1]) * len(usable)) for part in range(3)]
    bounds = zip((0, *ends), (*ends, len(usable)), strict=True)
    ift, train, evaluation, others = (usable[start:end] for start, end in bounds)
    # 3. take each part's rows
    ift_rows = [row for tree in ift for row in _ift_rows(tree, ift_depth, ift_rank, keep)]
    train_sets = [ranked for tree in train for ranked in _ranked_sets(tree, depth, keep)]
    eval_sets = [ranked for tree in evaluation for ranked in _ranked_sets(tree, depth, keep)]
    return OpenAssistant(
        ift=ift_rows[:max_ift],
        eft_train=train_sets[:max_eft_train],
        eft_eval=eval_sets[:max_eft_eval],
        prompts=[{"prompt": root["text"]} for _, root in others if keep.are_good([root])],
        left_out=dict(keep.left_out),
    )


def _read_trees(path: str | Path, lines: Sequence[int] | None, keep: _Filter) -> Iterator[Tree]:
    """The trees that can be used, each id once."""
    rows, seen = read_rows(path, "open_assistant"), set()
    missing = [line for line in lines or () if not 0 <= line < len(rows)]
    if missing:
        raise DataError(
            f"trees must name lines of {path}, from 0 to {len(rows) - 1}; got {missing[0]}."
        )
    for line in range(len(rows)) if lines is None else lines:
        tree = _checked_tree(rows[line], place_in(path, rows, line))
        root = tree["prompt"]
        name = str(tree.get("message_tree_id") or root["message_id"])
        if (tree.get("tree_state") or READY) != READY:
            keep.left_out["tree_not_ready"] += 1
        elif name not in seen and keep.usable([root]):
            yield name, root
        seen.add(name)


def _checked_tree(tree: Any, where: str) -> Mapping[str, Any]:
    if isinstance(tree, UnreadableLine):
        raise DataError(f"{where}, is not valid JSON: {tree.reason}")
    if not isinstance(tree, Mapping) or not isinstance(tree.get("prompt"), Mapping):
        flat = isinstance(tree, Mapping) and "message_id" in tree
        hint = " That is a single message; take the file *.trees.jsonl." if flat else ""
        raise DataError(
            f'{where}: a message tree is {{"message_tree_id", "prompt": a message}}; got '
            f"{str(tree)[:120]}.{hint}"
        )
    _check_message(tree["prompt"], "prompter", where)
    return tree


def _check_message(message: Any, role: str, where: str) -> None:
    """Raise DataError if a message, or one below it, is malformed or speaks out of turn."""
    texts = ("message_id", "text", "role")
    if not isinstance(message, Mapping) or not all(
        isinstance(message.get(name), str) for name in texts
    ):
        raise DataError(
            f"{where}: a message has message_id, text and role; got {str(message)[:120]}."
        )
    rank, replies = message.get("rank"), message.get("replies") or []
    is_rank = rank is None or is_number(rank)
    if not is_rank or not isinstance(replies, list):
        raise DataError(
            f"{where}: message {message['message_id']} must have a number as rank, if any, and a "
            f"list of replies; got {rank!r} and {str(replies)[:80]}."
        )
    if message["role"] != role:
        raise DataError(
            f"{where}: message {message['message_id']} must have the role {role!r}; it has "
            f"{message['role']!r}."
        )
    for reply in replies:
        _check_message(reply, "assistant" if role == "prompter" else "prompter", where)


def _turns(path: tuple[Message, ...], depth: str, keep: _Filter) -> Iterator[_Turn]:
    """The user's message that ends a path, and with depth "any" all that follow it."""
    replies = keep.usable(path[-1].get("replies") or [])
    yield _Turn(path, replies)
    for reply in replies if depth == "any" else ():
        for following in keep.usable(reply.get("replies") or []):
            yield from _turns((*path, reply, following), depth, keep)


def _ift_rows(tree: Tree, depth: str, worst: int, keep: _Filter) -> Iterator[dict[str, Any]]:
    """A supervised row for each reply of a tree whose rank is `worst` or better."""
    _, root = tree
    for turn in _turns((root,), depth, keep):
        for reply in keep.ranked(turn.replies):
            if reply["rank"] <= worst and keep.are_good([*turn.path, reply]):
                yield {"prompt": turn.prompt, "completion": reply["text"]}


def _ranked_sets(tree: Tree, depth: str, keep: _Filter) -> Iterator[RankedReplies]:
    """The ranked replies to each prompt of a tree, if they have at least two ranks."""
    tree_id, root = tree
    for turn in _turns((root,), depth, keep):
        replies = keep.ranked(turn.replies)
        ranks = tuple(float(reply["rank"]) for reply in replies)
        if len(set(ranks)) > 1 and keep.are_good(turn.path):
            texts = tuple(reply["text"] for reply in replies)
            yield RankedReplies(turn.path[-1]["message_id"], turn.prompt, texts, ranks, tree_id)


def _digest(seed: int, tree_id: str) -> bytes:
    """A sort key that depends on nothing but the seed and the tree."""
    return hashlib.sha256(f"{seed}/{tree_id}".encode("utf-8", "surrogatepass")).digest()
