"""In which order requests are worked, and how many rows are in flight.

Prompts that share a beginning come one after the other, so that it is computed once; such families
come longest first, so that the last rows to be decoded are short ones. Knows ids and sizes only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from self_rewarding_lm.models.interface import Plan, TokenModel, device_of
from self_rewarding_lm.models.sessions import common_beginning
from self_rewarding_lm.records import Ids

MIN_ROOT = 16
"""Shorter beginnings of all prompts are left to the prompts: a root costs products of its own."""


MIN_SHARED = 8
"""Prompts that share this many tokens behind the root are one family."""


@dataclass(frozen=True, slots=True)
class Group:
    """Requests with one prompt; members are their indices."""

    ids: Ids
    members: tuple[int, ...]


def plans(
    model: TokenModel,
    requests: Sequence[tuple[Ids, int]],
    max_rows: int,
    cache_bytes: int | None,
    *,
    copies: int = 1,
) -> Iterator[tuple[Plan, list[Group]]]:
    """What each session is for, with its groups in the order in which they are worked.

    requests: ids, and how many are to follow at most; copies: rows that each needs at once. There
    is one session, unless the longest prompts leave memory for fewer than max_rows rows: then
    shorter ones have another. Raises ConfigError where a single request does not fit.
    """
    members: dict[Ids, list[int]] = {}
    for i, (ids, _) in enumerate(requests):
        members.setdefault(ids, []).append(i)
    groups = [Group(ids, tuple(found)) for ids, found in sorted(members.items())]

    def plan_of(some: Sequence[Group]) -> Plan:
        plan = _plan(some, requests)
        wanted = min(max_rows, plan.max_rows * copies)
        plan = replace(plan, max_rows=wanted, min_rows=copies, cache_bytes=cache_bytes)
        return plan.fitting(model.bytes_per_token, device_of(model.module))

    while groups:
        plan, now = plan_of(groups), groups
        longer = [g for g in groups if 2 * len(g.ids) > plan.longest]
        if plan.is_cut and len(longer) < len(groups):
            plan, now = plan_of(longer), longer
        yield plan, _in_order(now, len(plan.root))
        done = {g.ids for g in now}
        groups = [g for g in groups if g.ids not in done]


def _plan(groups: Sequence[Group], requests: Sequence[tuple[Ids, int]]) -> Plan:
    """groups: in the order of their ids."""
    most = min(len(g.ids) for g in groups) - 1  # of each prompt a token is left, for its logits
    shared = min(common_beginning(groups[0].ids, groups[-1].ids), most)
    return Plan(
        root=groups[0].ids[: shared if shared >= MIN_ROOT else 0],
        longest=max(len(g.ids) for g in groups),
        max_new=max(requests[i][1] for g in groups for i in g.members),
        max_rows=sum(len(g.members) for g in groups),
    )


def _in_order(groups: Sequence[Group], root: int) -> list[Group]:
    families: list[list[Group]] = []
    for group in groups:
        before = families[-1][-1] if families else None
        if before is not None and common_beginning(before.ids, group.ids) >= root + MIN_SHARED:
            families[-1].append(group)
        else:
            families.append([group])
    families.sort(key=lambda family: -max(len(g.ids) for g in family))  # stable: no other order
    return [group for family in families for group in family]
