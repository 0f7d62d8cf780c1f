"""Meta-Rewarding: the model answers, judges, and judges its judgements (arXiv:2407.19594).

Pairs of responses train it to answer, pairs of judgements to judge, in one DPO. Compared judgements
become strengths by the paper's position weights and battles (section 2.2).
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from statistics import pvariance
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
from self_rewarding_lm.context import Context, Need
from self_rewarding_lm.data.control_tokens import Filled
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.judges.asking import FIRST_LOOK, MIN_ANSWER_TOKENS, Asker, Question
from self_rewarding_lm.judges.self_judge import SelfJudge, form_of_comparison
from self_rewarding_lm.judges.tally import Share
from self_rewarding_lm.judges.templates import compile_meta_template
from self_rewarding_lm.records import (
    Candidate,
    Judgement,
    MetaJudgement,
    PreferencePair,
    Prompt,
    prompt_id_of,
)
from self_rewarding_lm.rubrics import META_JUDGE_PROMPT
from self_rewarding_lm.runs.lines import Joined
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.stages.pair_maker import PairMaker
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Counting, Work

logger = logging.getLogger(__name__)

NAME = "self:meta"

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)

COMPARING = "comparing judgements is not counted, nor are their pairs; see docs/meta_rewarding.md"

ADVICE = (
    "Change one of these: train the model on examples of comparing first; make meta_judging's "
    "prompt_template, labels or verdict_prefix fit what it writes, or set its forced_ending; raise "
    "meta_judging.sampling.max_new_tokens if its texts are cut off; lower min_parse_rate; or set "
    "train_judge=False."
)

EQUAL = 1e-9
"""Strengths nearer to each other than this are equal: what is left are rounding errors."""

STEPS = 100  # of Newton's method at most; ten are usual

Verdicts = Mapping[tuple[int, int], int]
"""r_mn for (m shown first, n shown second): 1 the first is better, -1 the second, 0 neither."""


class MetaJudgingConfig(ComparisonConfig):
    """How the model compares two of its judgements; each two are shown in both orders."""

    prompt_template: str = META_JUDGE_PROMPT
    """jinja2 text with {{ judge_prompt }} (what the judge was asked, with the rubric, the request
    and the response in it), {{ judgement_a }} and {{ judgement_b }}."""
    sampling: SamplingConfig = SAMPLING
    """How comparisons are sampled; as judgements are."""


class MetaRewardDPOConfig(SelfRewardDPOConfig):
    """Self-rewarding DPO that trains the judge too (arXiv:2407.19594).

    Of each prompt the response whose judgements differ most is taken, its judgements are compared
    by the same model as a meta-judge, and the best and the worst become a pair whose prompt is the
    judge prompt. Wins count by the place in which they are rarer in the whole stage. Defaults of
    the paper: 7 responses, 11 judgements each, temperature 0.8, top-p 0.95, beta 0.1, learning
    rate 5e-6 (its last value, a tenth, is ours). docs/meta_rewarding.md has the rest.
    """

    folder_name: ClassVar[str] = "meta_reward"
    default_learning_rates: ClassVar[tuple[float, float]] = (5e-6, 5e-7)

    num_candidate_responses: int = Field(default=7, ge=2)
    """K of the paper."""
    num_sampled_reward_responses: int = Field(default=11, ge=1)
    """N of the paper: judgements of each candidate; their mean is its score."""
    generation: SamplingConfig = SAMPLING
    """How responses are sampled: the paper's temperature 0.8 and top-p 0.95."""
    judging: SamplingConfig = SAMPLING
    """How judgements are sampled: as responses are."""
    train_judge: bool = True
    """Whether judgements are compared and trained on. The paper: in its first two iterations of
    four; one stage is one iteration."""
    meta_judging: MetaJudgingConfig = MetaJudgingConfig()
    """How two judgements are compared."""
    max_judgements_compared: int | None = Field(default=None, ge=2)
    """Of a response's judgements so many are compared, the first that differ. Each two are compared
    twice, so 11 take 110 comparisons a prompt. None: all."""
    max_judgement_length: int | None = Field(default=None, ge=1)
    """Characters of a chosen judgement at most; a longer one drops its pair. The paper: 1,100 in
    the first, 1,000 in the second iteration."""
    drop_equal_scores: bool = False
    """Drop pairs of judgements that give the same score, as NeMo-Aligner's implementation does."""
    judge_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of judge pairs among all pairs of the stage at most; those of the first prompts stay.
    None: no limit (the paper names none)."""

    @model_validator(mode="after")
    def _judges_itself(self) -> "MetaRewardDPOConfig":
        if not self.train_judge:
            return self
        foreign = ("judge", "rewarding_model", "comparison")
        given = [name for name in foreign if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: train_judge compares what the trained model itself wrote "
                "as a judge with a reward prompt; leave it out, or set train_judge=False"
            )
        if len(self.reward_names()) > 1 or self.num_sampled_reward_responses < 2:
            raise ValueError(
                "train_judge compares judgements of one candidate by one reward prompt: give one "
                "self_reward_config_keyname and num_sampled_reward_responses of 2 or more, or set "
                "train_judge=False"
            )
        if self.rounds > 1:
            raise ValueError(
                "rounds: positions are weighted over a whole stage; with train_judge give one "
                "stage for each round"
            )
        return self

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if not self.train_judge:
            return
        (name,) = self.reward_names()
        reward = self._rewards(ctx)[name]
        if reward.score_mode != "sampled" or reward.forced_ending:
            raise ConfigError(
                f"{ctx.stage}: train_judge trains on judgements as the model wrote them, and the "
                f"reward prompt {name!r} has score_mode={reward.score_mode!r} and forced_ending="
                f"{reward.forced_ending!r}, whose scores are not (all) in the texts. Use "
                "score_mode='sampled' without forced_ending, or set train_judge=False."
            )
        how, judge = self.meta_judging, self.build_judge(ctx)
        assert isinstance(judge, SelfJudge)
        render = compile_meta_template(how.prompt_template, auto_dedent=how.auto_dedent)
        empty = render(judge.render("", ""), "", "")
        meta_asker(how).check(empty, ctx.tokens, ctx.model.max_len)

    def needs(self, ctx: Context) -> list[Need]:
        found, how = super().needs(ctx), self.meta_judging
        if self.train_judge:
            counts = how.score_mode == "expected" or bool(how.forced_ending)
            found.append((decoding_of(how.sampling, ctx.tokens), counts))
        return found

    def trained(
        self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]
    ) -> Sequence[PreferencePair]:
        if not self.train_judge:
            return super().trained(ctx, out, pairs)
        actor_ids = [pair.id for pair in pairs]  # merging judge pairs with them closes their file
        with ctx.serving(self.needs(ctx)):
            judge_ids = JudgePairMaker(self, ctx, out).make(len(actor_ids))
        stored = Groups(out.known(PreferencePair))
        actor_pairs = super().trained(ctx, out, stored.in_order(actor_ids))
        return Joined(actor_pairs, stored.in_order(judge_ids))

    def work(self, counting: Counting) -> Work:
        work = super().work(counting)
        return replace(work, notes=(*work.notes, COMPARING)) if self.train_judge else work

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        if not self.train_judge:
            super().rehearse(ctx, out)
            return
        pair = self.for_rehearsal(JudgePairMaker, ctx, out).rehearse()
        self.try_pair(ctx, out, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)

    def shortened(self, changes: dict[str, Any]) -> SampledPreferenceConfig:
        sampling = self.meta_judging.sampling.shortened(MIN_ANSWER_TOKENS)
        fewer = self.meta_judging.model_copy(update={"sampling": sampling})
        return super().shortened({**changes, "meta_judging": fewer})


@dataclass(frozen=True)
class ComparedJudgements:
    """The judgements of one candidate that are compared with each other, each text once."""

    prompt: Prompt
    candidate: Candidate
    judgements: list[Judgement]


class JudgePairMaker:
    """Compares the judgements of a stage whose responses are judged, and makes pairs of them.

    What is on disk already is used again. All processes make the same pairs.
    """

    def __init__(self, config: "MetaRewardDPOConfig", ctx: Context, out: StageDir) -> None:
        self.config, self.ctx, self.out = config, ctx, out
        self.responses = PairMaker(config, ctx, out)
        """What was made of the stage's responses before."""
        self.asker = meta_asker(config.meta_judging)
        self.render_meta = compile_meta_template(
            config.meta_judging.prompt_template, auto_dedent=config.meta_judging.auto_dedent
        )
        self.known_comparisons = Groups(out.known(MetaJudgement), lambda c: prompt_id_of(c.id))
        self.dropped: Counter[str] = Counter()
        self.followed = Share()
        """Of verdicts on judgements with different scores those for the higher one."""

    def make(self, actor_pairs: int) -> list[str]:
        """Ids of the stage's judge pairs, on disk with the comparisons that they are made of.

        actor_pairs: how many pairs of responses they are trained with. Raises JudgeError if too
        few comparisons can be read.
        """
        prompt_ids, out = list(self.responses.known_prompts.records.ids()), self.out
        # 1. compare all judgements that are not compared yet
        self._compare_all(prompt_ids)
        out.merge(MetaJudgement)
        self.known_comparisons = Groups(out.known(MetaJudgement), lambda c: prompt_id_of(c.id))
        # 2. weight the two places by how often each wins in the whole stage
        verdicts = Counter(
            None if comparison.score is None else verdict(comparison.score)
            for comparison in self.known_comparisons.records
        )
        weights = position_weights(verdicts[1], verdicts[-1])
        # 3. pair the best and the worst judgement of each prompt
        kept_ids, share = list[str](), self.config.judge_share
        most = None if share is None else int(share * actor_pairs / (1 - share) + 1e-9)
        pairs = self._pairs(prompt_ids, weights, most, kept_ids)
        new = (pair for pair in pairs if pair.id not in self.responses.known_records)
        if self.ctx.runtime.is_main:
            out.append(new)
        else:
            deque(new, maxlen=0)
        out.merge(PreferencePair)
        self._report(verdicts, len(kept_ids))
        return kept_ids

    def rehearse(self) -> PreferencePair:
        """The pair of a judgement that is compared with itself and is both sides."""
        judged, _ = self.responses.rehearse()
        judgement = judged.judgements[0]
        candidate = next(c for c in judged.candidates if c.id == judgement.candidate_ids[0])
        compared = ComparedJudgements(judged.prompt, candidate, [judgement, judgement])
        (answer,) = self.asker.ask(self.ctx, list(self._questions(compared))[:1])
        if answer.reason == "too_long":
            raise JudgeError(
                f"{self.ctx.stage}: the meta-judge's prompt with the shortest prompt "
                f"({len(judged.prompt.ids)} tokens) and two judgements of at most "
                f"{self.config.judging.max_new_tokens} tokens leaves no room to answer. Use a "
                "shorter meta_judging.prompt_template or reward prompt."
            )
        return self._judge_pair(compared, (0, 0), (0.0, 0.0))

    def _compare_all(self, prompt_ids: Sequence[str]) -> None:
        """Have all judgements compared that are not, block by block."""
        config, ctx = self.config, self.ctx
        made = config.num_sampled_reward_responses
        compared = min(made, config.max_judgements_compared or made)
        most = len(prompt_ids) * compared * (compared - 1)
        words = "%s: judgements of %d prompts are compared, in up to %d comparisons"
        logger.info(words, ctx.stage, len(prompt_ids), most)
        with ctx.runtime.progress(len(prompt_ids), f"{ctx.stage}: comparing", "prompt") as bar:
            for start in range(0, len(prompt_ids), config.prompts_per_block):
                block = list(prompt_ids[start : start + config.prompts_per_block])
                failure = self._compare(ctx.runtime.share(block))
                failures = [text for text in ctx.runtime.gather([failure]) if text]
                if failures:
                    raise JudgeError(failures[0])
                bar.update(len(block))

    def _compare(self, prompt_ids: Sequence[str]) -> str | None:
        """Compare what is not compared of some prompts.

        Returns the words of an error if too few verdicts can be read, else None.
        """
        watcher, questions = self.responses.watcher, list[Question]()
        for prompt_id in prompt_ids:
            compared, known = self._compared(prompt_id), self.known_comparisons[prompt_id]
            watcher.count(known)
            known_ids = {comparison.id for comparison in known}
            if compared is not None:
                questions += [q for q in self._questions(compared) if q.id not in known_ids]
        answers = self.asker.ask(self.ctx, questions) if questions else ()
        for comparisons in self.out.keep(map(_as_comparison, answers)):
            watcher.count(comparisons)
            if (failure := self._see_parsed()) is not None:
                return failure
        return self._see_parsed()

    def _see_parsed(self) -> str | None:
        return self.responses.watcher.see_parsed(
            self.ctx.stage, self.out.path, noun="comparisons of judgements", advice=ADVICE
        )

    def _compared(self, prompt_id: str) -> ComparedJudgements | None:
        """What is compared of a prompt; None if no response's judgements differ."""
        responses = self.responses
        # 1. the response whose judgements differ most
        by_candidate: dict[str, list[Judgement]] = {}
        for judgement in sorted(responses.known_judgements[prompt_id], key=_number):
            by_candidate.setdefault(judgement.candidate_ids[0], []).append(judgement)
        candidates = sorted(responses.known_candidates[prompt_id], key=lambda c: _last(c.id))
        scores = [[j.score for j in by_candidate.get(c.id, ())] for c in candidates]
        picked = most_varied(scores)
        if picked is None:
            return None
        # 2. the first of its judgements that can be read and differ
        by_text: dict[str, Judgement] = {}
        for judgement in by_candidate[candidates[picked].id]:
            if judgement.score is not None and judgement.text is not None:
                by_text.setdefault(judgement.text.strip(), judgement)
        judgements = list(by_text.values())[: self.config.max_judgements_compared]
        prompt = responses.known_prompts[prompt_id][0]
        return ComparedJudgements(prompt, candidates[picked], judgements)

    def _judge_prompt(self, compared: ComparedJudgements) -> Filled:
        """What the judge was asked."""
        judge, shown = self.responses.judge, self.responses.as_judged(compared.candidate)
        assert isinstance(judge, SelfJudge)
        return judge.render(compared.prompt.text or "", shown.text or "")

    def _questions(self, compared: ComparedJudgements) -> Iterator[Question]:
        judge_prompt = self._judge_prompt(compared)
        for one, other in permutations(compared.judgements, 2):
            text = self.render_meta(judge_prompt, one.text or "", other.text or "")
            yield Question(_id(one, other), (one.id, other.id), text)

    def _pairs(
        self,
        prompt_ids: Sequence[str],
        weights: tuple[float, float],
        most: int | None,
        kept_ids: list[str],
    ) -> Iterator[PreferencePair]:
        """The judge pairs of prompts, `most` at most; their ids are put into `kept_ids`."""
        for prompt_id in prompt_ids:
            pair = self._pair(prompt_id, weights)
            if pair is not None and len(kept_ids) == most:
                self._drop("surplus")
            elif pair is not None:
                kept_ids.append(pair.id)
                yield pair

    def _pair(self, prompt_id: str, weights: tuple[float, float]) -> PreferencePair | None:
        """A prompt's judge pair; None, counted by its reason, if it is dropped."""
        compared = self._compared(prompt_id)
        if compared is None:
            return self._drop("unvaried")
        # 1. who won in which order
        judgements = compared.judgements
        comparisons = {
            comparison.id: comparison for comparison in self.known_comparisons[prompt_id]
        }
        verdicts = {
            (m, n): verdict(comparisons[_id(judgements[m], judgements[n])].score)
            for m, n in permutations(range(len(judgements)), 2)
        }
        self._count_followed(judgements, verdicts)
        # 2. the strongest judgement against the weakest
        strength = strengths(battles(verdicts, len(judgements), weights))
        picked = best_and_worst(strength)
        if picked is None:
            return self._drop("tie")
        # 3. leave out what the settings and the length limit do not allow
        chosen, rejected = (judgements[i] for i in picked)
        if self.config.drop_equal_scores and chosen.score == rejected.score:
            return self._drop("equal_scores")
        longest = self.config.max_judgement_length
        if longest is not None and len(chosen.text or "") > longest:
            return self._drop("long")
        pair = self._judge_pair(compared, picked, (strength[picked[0]], strength[picked[1]]))
        limit = self.ctx.limit(self.config.max_seq_len)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        return self._drop("no_room") if limit is not None and length > limit else pair

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _count_followed(
        self, judgements: Sequence[Judgement], verdicts: dict[tuple[int, int], int]
    ) -> None:
        for (m, n), said in verdicts.items():
            one, other = judgements[m].score, judgements[n].score
            assert one is not None and other is not None
            if said and one != other:
                self.followed.add(int((one > other) == (said > 0)), 1)

    def _judge_pair(
        self, compared: ComparedJudgements, picked: tuple[int, int], strength: tuple[float, float]
    ) -> PreferencePair:
        """The pair as it is trained: what the judge was asked, and two of its answers.

        Judgements are kept as texts, so their ids are those of the text and its end token.
        """
        judge_prompt, tokens = self._judge_prompt(compared), self.ctx.tokens
        chosen, rejected = (compared.judgements[i] for i in picked)
        rendered = tokens.prompt(judge_prompt)
        return PreferencePair(
            id=f"{compared.prompt.id}/judge",
            prompt_ids=rendered.ids,
            chosen_ids=tokens.response(judge_prompt, chosen.text or ""),
            rejected_ids=tokens.response(judge_prompt, rejected.text or ""),
            prompt=rendered.text,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_id=chosen.id,
            rejected_id=rejected.id,
            chosen_score=strength[0],
            rejected_score=strength[1],
            messages=rendered.messages,
        )

    def _report(self, verdicts: Counter[int | None], kept: int) -> None:
        """Log metrics of the comparisons and the pairs; warn if they show something wrong."""
        total, wins = verdicts.total(), verdicts[1] + verdicts[-1]
        read = total - verdicts[None]
        shares = {
            "meta/parse_rate": (read, total),
            "meta/tie_rate": (verdicts[0], read),
            "meta/position_bias": (verdicts[1], wins),
            "meta/prefers_higher_score": (self.followed.part, self.followed.whole),
        }
        metrics: dict[str, Any] = {n: part / whole for n, (part, whole) in shares.items() if whole}
        metrics |= {"meta/comparisons": total, "pairs/judge_kept": kept}
        metrics |= {f"pairs/judge_dropped_{k}": n for k, n in sorted(self.dropped.items()) if n}
        stage, summary = self.ctx.stage, self.out.summary
        self.out.log({"step": 0, **metrics})
        summary["metrics"] = {**summary.get("metrics", {}), **metrics}
        summary["judge_pairs"] = kept
        dropped = ", ".join(f"{n} {k}" for k, n in self.dropped.most_common() if n) or "none"
        level = logging.INFO if kept else logging.WARNING
        words = "%s: %d comparisons of judgements, %d judge pairs; dropped: %s"
        logger.log(level, words, stage, total, kept, dropped)
        if self.followed.whole >= FIRST_LOOK:
            self.responses.checker.see(
                "meta_follows_scores",
                metrics["meta/prefers_higher_score"],
                f"of {self.followed.whole} comparisons of judgements with different scores "
                f"{metrics['meta/prefers_higher_score']:.0%} were won by the higher score: the "
                "meta-judge reads the score and not the judgement, so training on it only makes "
                "the judge generous. Train the judge no further (train_judge=False).",
            )


def meta_asker(how: "MetaJudgingConfig") -> Asker:
    """Who compares judgements: the stage's own model."""
    return Asker(
        form_of_comparison(how),
        how.sampling,
        name=NAME,
        score_mode=how.score_mode,
        forced_ending=how.forced_ending,
        source="compared",
    )


def _as_comparison(judgement: Judgement) -> MetaJudgement:
    return MetaJudgement(
        id=judgement.id,
        judgement_ids=judgement.candidate_ids,
        judge=judgement.judge,
        score=judgement.score,
        reason=judgement.reason,
        text=judgement.text,
        source=judgement.source,
        score_mass=judgement.score_mass,
    )


def _id(one: Judgement, other: Judgement) -> str:
    return f"{one.id}/vs/{other.id.rsplit('/', 1)[1]}"


def _number(judgement: Judgement) -> int:
    return int(judgement.id.rsplit("/j", 1)[1])


def _last(record_id: str) -> int:
    return int(record_id.rsplit("/", 1)[1])


def most_varied(scores: Sequence[Sequence[float | None]]) -> int | None:
    """Which response's judgements differ most: the highest variance of their scores.

    scores: of each response those of its judgements, None where none could be read; these do not
    count. Of equals the first; None where no response has two different scores.
    """
    known = [[score for score in own if score is not None] for own in scores]
    variances = [pvariance(own) if own else 0.0 for own in known]  # exact sums: in any order alike
    best = max(range(len(scores)), key=lambda i: (variances[i], -i), default=None)
    return best if best is not None and variances[best] > 0 else None


def verdict(score: float | None) -> int:
    """1, -1 or 0 of a comparison's score: over a half, under it, or neither (None included)."""
    return 0 if score is None else (score > 0.5) - (score < 0.5)


def position_weights(wins_first: int, wins_second: int) -> tuple[float, float]:
    """What a win counts in the first and in the second place: o1 = w2 / (w1 + w2), o2 = 1 - o1.

    w1, w2: how often the judgement shown first, or second, won in the whole data set. The place
    that wins more often counts less. Without any win both are 1/2.
    """
    wins = wins_first + wins_second
    return (wins_second / wins, wins_first / wins) if wins else (0.5, 0.5)


def battles(verdicts: Verdicts, count: int, weights: tuple[float, float]) -> np.ndarray:
    """B (count, count): B_mn = o1 [r_mn = 1] + o2 [r_nm = -1], what m won over n.

    An order that is not in `verdicts` counts as 0. weights: (o1, o2) of `position_weights`.
    """
    first, second = weights
    won = np.zeros((count, count))
    for m, n in permutations(range(count), 2):
        won[m, n] = first * (verdicts.get((m, n)) == 1) + second * (verdicts.get((n, m)) == -1)
    return won


def strengths(won: np.ndarray, *, l2: float = 0.01) -> list[float]:
    """argmax over e of sum_mn B_mn log sigma(e_m - e_n) - l2/2 |e|^2; Elo is 400 e / ln 10.

    won: B (n, n), see `battles`; its diagonal does not count. l2 > 0: without it, judgements that
    win every battle have infinite strength. The default is ours: a normal prior of standard
    deviation 10, in which a single battle, won once in each order, gives a difference of 3.9. It
    does not grow with the number of battles, so that these decide where there are many.

    Newton's method. A step is shortened to log(1 + b)/b of itself, b the spread of its entries;
    as |g'''| <= g'' for g(t) = log(1 + e^-t), the sum rises with every such step.
    """
    won = np.where(np.eye(len(won), dtype=bool), 0.0, won)
    found = np.zeros(len(won))
    for _ in range(STEPS):
        losing = 1 / (1 + np.exp(found[:, None] - found[None, :]))  # sigma(e_n - e_m) at (m, n)
        flow = won * losing
        gradient = flow.sum(axis=1) - flow.sum(axis=0) - l2 * found
        bend = flow * (1 - losing)
        bend = bend + bend.T
        hessian = np.diag(bend.sum(axis=1) + l2) - bend
        step = np.linalg.solve(hessian, gradient)
        spread = float(np.ptp(step))
        if spread < 1e-15:
            break
        found = found + step * (np.log1p(spread) / spread)
    return found.tolist()


def best_and_worst(strengths: Sequence[float]) -> tuple[int, int] | None:
    """Places of the highest and the lowest strength, the first of equals; None where all are."""
    if not strengths or max(strengths) - min(strengths) <= EQUAL:
        return None
    high, low = max(strengths), min(strengths)
    best = next(i for i, e in enumerate(strengths) if e >= high - EQUAL)
    return best, next(i for i, e in enumerate(strengths) if e <= low + EQUAL)
