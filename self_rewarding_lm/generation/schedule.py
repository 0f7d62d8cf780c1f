"""In which order requests are worked, in how many sessions, and how many rows each session has.

Prompts with the same beginning come one after the other, so that it is computed once. Of these
families the one with the longest prompt comes first, so that the last rows to be decoded are short
ones. Knows ids and sizes only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from self_rewarding_lm.models.interface import Plan, TokenModel, device_of
from self_rewarding_lm.models.sessions import common_beginning
from self_rewarding_lm.records import Ids

MIN_ROOT = 16
"""Tokens that all prompts must begin with to have a root: it costs products of its own."""


MIN_SHARED = 8
"""Tokens after the root that prompts of one family begin with, at least."""


@dataclass(frozen=True, slots=True)
class Group:
    """The requests with one prompt. members: their indices."""

    ids: Ids
    members: tuple[int, ...]


def plan_sessions(
    model: TokenModel,
    requests: Sequence[tuple[Ids, int]],
    max_rows: int,
    cache_bytes: int | None,
    *,
    copies: int = 1,
) -> Iterator[tuple[Plan, list[Group]]]:
    """The plan of each session, with its groups in the order in which they are worked.

    requests: ids, and how many new tokens may follow. copies: rows that each request needs at once.
    There is one session, unless the longest prompts leave memory for fewer than max_rows rows: then
    the shorter ones have a session of their own. Raises ConfigError if a single request does not
    fit.
    """
    members: dict[Ids, list[int]] = {}
    for i, (ids, _) in enumerate(requests):
        members.setdefault(ids, []).append(i)
    groups = [Group(ids, tuple(indices)) for ids, indices in sorted(members.items())]

    def plan_for(some: Sequence[Group]) -> Plan:
        plan = _plan_without_memory(some, requests)
        rows = min(max_rows, plan.max_rows * copies)
        plan = replace(plan, max_rows=rows, min_rows=copies, cache_bytes=cache_bytes)
        return plan.fitting(model.bytes_per_token, device_of(model.module))

    # rows that must not be in one forward, now or when they are longer, have sessions of their own
    sides: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        end = len(group.ids) + max(requests[i][1] for i in group.members)
        key = model.side(len(group.ids), padded=False), model.side(end, padded=False)
        sides.setdefault(key, []).append(group)
    for groups in sides.values():
        yield from _sessions(groups, plan_for)


def _sessions(
    groups: Sequence[Group], plan_for: Callable[[Sequence[Group]], Plan]
) -> Iterator[tuple[Plan, list[Group]]]:
    """The sessions of groups that may go together: one, if memory has room for their rows."""
    while groups:
        plan, worked = plan_for(groups), groups
        longer = [group for group in groups if 2 * len(group.ids) > plan.longest]
        if plan.is_cut and len(longer) < len(groups):
            plan, worked = plan_for(longer), longer
        yield plan, _in_order(worked, len(plan.root))
        done = {group.ids for group in worked}
        groups = [group for group in groups if group.ids not in done]


def _plan_without_memory(groups: Sequence[Group], requests: Sequence[tuple[Ids, int]]) -> Plan:
    """What groups, sorted by their ids, need if memory has no bounds."""
    # the last token of each prompt stays outside the root: its logits are wanted
    most = min(len(group.ids) for group in groups) - 1
    shared = min(common_beginning(groups[0].ids, groups[-1].ids), most)
    return Plan(
        root=groups[0].ids[: shared if shared >= MIN_ROOT else 0],
        longest=max(len(group.ids) for group in groups),
        max_new=max(requests[i][1] for group in groups for i in group.members),
        max_rows=sum(len(group.members) for group in groups),
    )


def _in_order(groups: Sequence[Group], root: int) -> list[Group]:
    """Groups, sorted by their ids, family by family, that with the longest prompt first."""
    families: list[list[Group]] = []
    for group in groups:
        before = families[-1][-1] if families else None
        if before is not None and common_beginning(before.ids, group.ids) >= root + MIN_SHARED:
            families[-1].append(group)
        else:
            families.append([group])
    families.sort(key=lambda family: -max(len(group.ids) for group in family))  # a stable sort
    return [group for family in families for group in family]
