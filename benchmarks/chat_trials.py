"""SmolLM2's trials: candidates, judgements in words, expected scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import peers
from floors import Least, least_work
from plans import BARS, JUDGEMENTS, OVER_OWN, SAMPLES, WARM_TOKENS, Plan, trials_of
from timing import Comparison, Side, Trial, Work, run_timed
from workloads import Chat, decoding_of

from self_rewarding_lm import PAPER_REWARD_CONFIG, LocalEngine, SamplingConfig, generate
from self_rewarding_lm.context import Context
from self_rewarding_lm.generation.engine import Request
from self_rewarding_lm.judges.expected import VerdictReader
from self_rewarding_lm.judges.self_judge import SelfJudge, form_of, score_parser
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import Candidate, Prompt, stable_hash
from self_rewarding_lm.runtime import Runtime

EXPECTED = PAPER_REWARD_CONFIG.model_copy(
    update={"score_mode": "expected", "forced_ending": "at_once"}
)
BATCH_PROMPTS = 4
BATCH_TOKENS = 48


@dataclass(frozen=True)
class Candidates:
    """Several candidates of each prompt, through the public `generate`."""

    plan: Plan
    chat: Chat
    texts: list[str]

    @cached_property
    def ids(self) -> list[tuple[int, ...]]:
        return [self.chat.tokens.prompt(text).ids for text in self.texts]

    def ours(self, rows: int, seed: int, *, count: int | None = None, new: int) -> Work:
        found = generate(
            self.chat.model,
            self.texts[:count],
            sampling=self.plan.sampler.config(new),
            num_samples=SAMPLES,
            tokenizer=self.chat.tokenizer,
            seed=seed,
            engine=LocalEngine(max_rows=rows),
        )
        return Work([len(c.ids) for group in found for c in group], len(found) * SAMPLES)

    def peer(self, rows: int, seed: int, *, count: int | None = None, new: int) -> Work:
        lengths = peers.hugging_face(
            self.chat,
            self.ids[:count],
            SAMPLES,
            self.plan.sampler,
            new_tokens=new,
            rows=rows,
            seed=seed,
        )
        return Work(lengths, len(lengths))

    def least(self, lengths: Sequence[int]) -> Least:
        rows = [own for own in self.ids for _ in range(SAMPLES)]
        return least_work(rows, lengths, rows=self.plan.rows, sizes=self.chat.sizes)


@dataclass(frozen=True)
class Judging:
    """Judgements in words of the first candidate of each prompt, rendered, sampled and read.

    The peer is given the judge prompts' ids and its answers are not read.
    """

    plan: Plan
    chat: Chat
    pairs: list[tuple[str, str]]

    @cached_property
    def judge(self) -> SelfJudge:
        return SelfJudge(PAPER_REWARD_CONFIG, SamplingConfig(), JUDGEMENTS)

    @cached_property
    def model(self) -> Any:
        return adapt(self.chat.model)

    @cached_property
    def ids(self) -> list[tuple[int, ...]]:
        return [self.rendered(pair) for pair in self.pairs]

    def rendered(self, pair: tuple[str, str]) -> tuple[int, ...]:
        return self.chat.tokens.prompt(self.judge.render(*pair)).ids

    def ours(self, rows: int, seed: int, *, count: int | None = None, new: int) -> Work:
        prompts = [self.rendered(pair) for pair in self.pairs[:count]]
        requests = [
            Request(ids, stable_hash(seed, f"{place}/{k}"), new)
            for place, ids in enumerate(prompts)
            for k in range(JUDGEMENTS)
        ]
        decoding = decoding_of(self.plan.sampler, self.chat.tokens.end_ids)
        lengths, read = [0] * len(requests), score_parser(PAPER_REWARD_CONFIG)
        for index, done in LocalEngine(max_rows=rows).generate(self.model, requests, decoding):
            lengths[index] = len(done.ids)
            read(self.chat.tokens.decode(done.ids) or "")
        return Work(lengths, len(prompts))

    def peer(self, rows: int, seed: int, *, count: int | None = None, new: int) -> Work:
        prompts = self.ids[:count]
        lengths = peers.hugging_face(
            self.chat,
            prompts,
            JUDGEMENTS,
            self.plan.sampler,
            new_tokens=new,
            rows=rows,
            seed=seed,
        )
        return Work(lengths, len(prompts))

    def least(self, lengths: Sequence[int]) -> Least:
        rows = [own for own in self.ids for _ in range(JUDGEMENTS)]
        return least_work(rows, lengths, rows=self.plan.rows, sizes=self.chat.sizes)


@dataclass(frozen=True)
class Expected:
    """Expected scores of the same candidates, by the library's judge: texts in, scores out."""

    plan: Plan
    chat: Chat
    pairs: list[tuple[str, str]]

    def ours(self, rows: int, seed: int, *, count: int | None = None) -> Work:
        prompts, replies = self.asked
        judge = self.judge()
        found = list(judge.judge(self.context(rows, seed), prompts[:count], replies[:count]))
        unknown = [judgement.reason for judgement in found if judgement.score is None]
        if unknown:
            raise SystemExit(f"expected scores are missing: {unknown[0]}")
        return Work([1] * len(found), len(found))

    def least(self, lengths: Sequence[int]) -> Least:
        judge, tokens = self.judge(), self.chat.tokens
        reader = VerdictReader(form_of(EXPECTED), tokens)
        prompts = [tokens.prompt(judge.render(*pair)) for pair in self.pairs]
        ids = [reader.forced(prompt, ()).ids for prompt in prompts]
        return least_work(ids, [1] * len(ids), rows=self.plan.rows, sizes=self.chat.sizes)

    def judge(self) -> SelfJudge:
        return SelfJudge(EXPECTED, SamplingConfig(), 1)

    def context(self, rows: int, seed: int) -> Context:
        return Context(
            stage="benchmark",
            seed=seed,
            model=self.model,
            policy=self.chat.model,
            engine=LocalEngine(max_rows=rows),
            tokens=self.chat.tokens,
            runtime=self.runtime,
            rewards={},
            adapt=adapt,
        )

    @cached_property
    def model(self) -> Any:
        return adapt(self.chat.model)

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime({"cpu": True}, quiet=True)

    @cached_property
    def asked(self) -> tuple[list[Prompt], list[list[Candidate]]]:
        prompts = [Prompt(f"{i}/0", i, (), text) for i, (text, _) in enumerate(self.pairs)]
        replies = [
            [Candidate(f"{i}/0/0", f"{i}/0", (), reply, None, 0)]
            for i, (_, reply) in enumerate(self.pairs)
        ]
        return prompts, replies


def candidates_trial(plan: Plan, dtype: str) -> Trial:
    name, chat = f"candidates_{dtype}", plan.chat(dtype)
    count, new = plan.counts[name], plan.new_tokens
    work = Candidates(plan, chat, plan.prompts[:count])
    return Trial(
        name,
        dtype,
        _two_sides(work, plan.rows, new, BARS[name]),
        (Comparison(name, "ours", "generate", bar=BARS[name]),),
        {"ours": work.least},
        plan.recording.lengths(count),
        count * SAMPLES,
        {"prompts": count, "samples": SAMPLES, "new_tokens": new},
        extra=partial(batch_entry, work, name, SAMPLES, new),
    )


def judging_trial(plan: Plan, dtype: str) -> Trial:
    name, chat = f"judging_{dtype}", plan.chat(dtype)
    count, new = plan.counts[name], plan.judge_tokens
    pairs = [(plan.prompts[i], plan.recording.texts[i][0]) for i in range(count)]
    work, expected = Judging(plan, chat, pairs), Expected(plan, chat, pairs)
    own, scored, over_own = trials_of([dtype])[name]
    assert over_own.endswith(OVER_OWN)
    warm = partial(expected.ours, plan.rows, 0, count=1)
    return Trial(
        name,
        dtype,
        {
            **_two_sides(work, plan.rows, new, BARS[own]),
            "expected": Side(expected.ours, warm, slower=0.3),
        },
        (
            Comparison(own, "ours", "generate", bar=BARS[own]),
            Comparison(scored, "expected", "generate", "candidates/s", BARS[scored]),
            Comparison(over_own, "expected", "ours", "candidates/s"),
        ),
        {"ours": work.least, "expected": expected.least},
        [new // 2 or 1] * (count * JUDGEMENTS),
        count * JUDGEMENTS,
        {"candidates": count, "judgements": JUDGEMENTS, "new_tokens": new},
        extra=partial(batch_entry, work, name, JUDGEMENTS, new),
    )


def _two_sides(work: Candidates | Judging, rows: int, new: int, bar: float) -> dict[str, Side]:
    warm = {"count": 1, "new": WARM_TOKENS}
    return {
        "ours": Side(partial(work.ours, new=new), partial(work.ours, rows, 0, **warm)),
        "generate": Side(partial(work.peer, new=new), partial(work.peer, rows, 0, **warm), bar),
    }


def batch_entry(work: Candidates | Judging, name: str, samples: int, new: int) -> dict | None:
    """A little of the work by `generate_batch` in its own process, and by ours."""
    plan, new = work.plan, min(new, BATCH_TOKENS)
    if not plan.batch_seconds:
        return None
    ids = work.ids[:BATCH_PROMPTS]
    found = peers.generate_batch(
        work.chat,
        ids,
        samples,
        plan.sampler,
        new_tokens=new,
        rows=plan.rows,
        limit=plan.batch_seconds,
    )
    small = partial(work.ours, count=BATCH_PROMPTS, new=new)
    ours, _ = run_timed(Side(small, partial(small, plan.rows, 0)), plan.rows, 0, 0)
    fine = "failure" not in found
    peer = sum(found["lengths"]) / found["seconds"] if fine else None
    return {
        "name": f"{name}_generate_batch",
        "ours": ours.rate("tokens/s"),
        "peer": peer,
        "ratio": ours.rate("tokens/s") / peer if peer else None,
        "unit": "tokens/s",
        "bar": None,
        "failure": found.get("failure"),
        "disturbed": int(ours.disturbed),
        "work": {"prompts": len(ids), "samples": samples, "new_tokens": new},
    }
