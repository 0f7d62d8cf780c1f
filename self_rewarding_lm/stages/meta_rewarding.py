"""Meta-Rewarding: the model answers, judges, and judges its judgements (arXiv:2407.19594).

Pairs of responses train it to answer, pairs of judgements train it to judge, in one DPO. Compared
judgements get strengths by the paper's position weights and battles (section 2.2). This file holds,
in this order: the settings and the stage, what makes its pairs of judgements, and the arithmetic.
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
from self_rewarding_lm.errors import ConfigError, JudgeError, setting
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
from self_rewarding_lm.scores import exact
from self_rewarding_lm.stages.pair_maker import PairMaker
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Counting, Work
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)

NAME = "self:meta"
"""The judge in records of comparisons."""

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)
"""The sampling of the paper."""

COMPARING = "comparing judgements is not counted, nor are their pairs; see docs/meta_rewarding.md"
"""The note in a plan that has a stage of this kind."""


def _advice() -> str:
    return (
        "Change one of these: train the model on examples of comparing first; make meta_judging's "
        "prompt_template, labels or verdict_prefix fit what it writes, or set its forced_ending; "
        "raise "
        "meta_judging.sampling.max_new_tokens if its texts are cut off; lower min_parse_rate; or "
        "set "
        f"{setting('train_judge', False)}."
    )


"""What to do if too few comparisons can be read."""

EQUAL = 1e-9
"""Strengths that differ by at most this are equal: such a difference is a rounding error."""

STEPS = 100  # of Newton's method at most; ten are usual

Verdicts = Mapping[tuple[int, int], int]
"""r_mn by (m, n), m shown first and n second: 1 if m is better, -1 if n is better, 0 if neither."""


class MetaJudgingConfig(ComparisonConfig):
    """How the model compares two of its judgements; every two are shown in both orders."""

    template_variables: ClassVar[tuple[str, ...]] = ("judge_prompt", "judgement_a", "judgement_b")

    prompt_template: str = META_JUDGE_PROMPT
    """jinja2 text with {{ judge_prompt }} (what the judge was asked, with the rubric, the request
    and the response in it), {{ judgement_a }} and {{ judgement_b }}."""
    sampling: SamplingConfig = SAMPLING
    """How comparisons are sampled; default: as judgements."""


class MetaRewardDPOConfig(SelfRewardDPOConfig):
    """Self-rewarding DPO that trains the judge too (arXiv:2407.19594).

    For each prompt, the same model as a meta-judge compares the judgements of the response whose
    judgements differ most; the best and the worst become a pair whose prompt is the judge prompt.
    Wins in the position that wins less often in the whole stage count more. Defaults of the paper:
    7 responses, 11 judgements each, temperature 0.8, top-p 0.95, beta 0.1, learning rate 5e-6 (its
    last value, a tenth, is our choice). docs/meta_rewarding.md has the rest.
    """

    folder_name: ClassVar[str] = "meta_reward"
    default_learning_rates: ClassVar[tuple[float, float]] = (5e-6, 5e-7)

    num_candidate_responses: int = Field(default=7, ge=2)
    """Responses sampled to each prompt, K of the paper."""
    num_sampled_reward_responses: int = Field(default=11, ge=1)
    """Judgements of each candidate, N of the paper; their mean is its score."""
    generation: SamplingConfig = SAMPLING
    """How responses are sampled: the paper's temperature 0.8 and top-p 0.95."""
    judging: SamplingConfig = SAMPLING
    """How judgements are sampled; default: as responses."""
    train_judge: bool = True
    """Whether judgements are compared and trained on. In the paper this is so in the first two of
    four iterations; a stage is one iteration."""
    meta_judging: MetaJudgingConfig = MetaJudgingConfig()
    """How two judgements are compared."""
    max_judgements_compared: int | None = Field(default=None, ge=2)
    """How many of a response's judgements are compared, the first that differ. Every two are
    compared twice, so 11 take 110 comparisons per prompt. None: all."""
    max_judgement_length: int | None = Field(default=None, ge=1)
    """Characters of a chosen judgement at most; a longer one drops its pair. The paper: 1,100 in
    the first, 1,000 in the second iteration."""
    drop_equal_scores: bool = False
    """Drop pairs of judgements that give the same score, as NeMo-Aligner's implementation does."""
    judge_share: float | None = Field(default=None, gt=0, lt=1)
    """Greatest share of judge pairs among all pairs of the stage; those of the first prompts are
    kept. None: no limit (the paper names none)."""

    @model_validator(mode="after")
    def _judges_itself(self) -> "MetaRewardDPOConfig":
        if not self.train_judge:
            return self
        judges = ("judge", "rewarding_model", "comparison", "candidates_from")
        refused = [name for name in judges if getattr(self, name) is not None]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: train_judge compares what the trained model itself wrote "
                "as a judge with a reward prompt; leave it out, or set "
                f"{setting('train_judge', False)}"
            )
        if len(self.reward_names()) > 1 or self.num_sampled_reward_responses < 2:
            raise ValueError(
                "train_judge compares judgements of one candidate by one reward prompt: give one "
                "self_reward_config_keyname and num_sampled_reward_responses of 2 or more, or set "
                f"{setting('train_judge', False)}"
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
                f"reward prompt {name!r} has {setting('score_mode', reward.score_mode)} and "
                f"{setting('forced_ending', reward.forced_ending)}, whose scores are not (all) in "
                "the texts. Use "
                f"{setting('score_mode', 'sampled')} without forced_ending, or set "
                f"{setting('train_judge', False)}."
            )
        settings, judge = self.meta_judging, self.build_judge(ctx)
        assert isinstance(judge, SelfJudge)
        render = compile_meta_template(settings.prompt_template, auto_dedent=settings.auto_dedent)
        empty = render(judge.render("", ""), "", "")
        meta_asker(settings).check(empty, ctx.tokens, ctx.model.max_len)

    def judges_all(self, run_format: int) -> bool:
        """Also if judgements are trained on, which may be those of any response."""
        return self.train_judge or super().judges_all(run_format)

    def needs(self, ctx: Context) -> list[Need]:
        needs, settings = super().needs(ctx), self.meta_judging
        if self.train_judge:
            probabilities = settings.score_mode == "expected" or bool(settings.forced_ending)
            needs.append((decoding_of(settings.sampling, ctx.tokens), probabilities))
        return needs

    def trained(
        self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]
    ) -> Sequence[PreferencePair]:
        if not self.train_judge:
            return super().trained(ctx, out, pairs)
        actor_ids = [pair.id for pair in pairs]  # read now: merging judge pairs closes the file
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
        meta_judging = self.meta_judging.model_copy(update={"sampling": sampling})
        return super().shortened({**changes, "meta_judging": meta_judging})


@dataclass(frozen=True)
class ComparedJudgements:
    """The judgements of one candidate that are compared with each other; no two have one text."""

    prompt: Prompt
    candidate: Candidate
    judgements: list[Judgement]


class JudgePairMaker:
    """Compares the judgements of a stage that has its pairs of responses, and makes judge pairs.

    Comparisons and pairs that are on disk already are used again. All processes make the same
    pairs. Settings are those of MetaRewardDPOConfig.
    """

    def __init__(self, config: MetaRewardDPOConfig, ctx: Context, out: StageDir) -> None:
        self.config, self.ctx, self.out = config, ctx, out
        self.pair_maker = PairMaker(config, ctx, out)
        """Reads the stage's prompts, candidates and judgements."""
        self.asker = meta_asker(config.meta_judging)
        self.render_meta = compile_meta_template(
            config.meta_judging.prompt_template, auto_dedent=config.meta_judging.auto_dedent
        )
        self.known_comparisons = Groups(out.known(MetaJudgement), lambda c: prompt_id_of(c.id))
        self.dropped: Counter[str] = Counter()
        self.followed = Share()
        """How many verdicts on judgements with different scores are for the higher score."""

    def make(self, actor_pairs: int) -> list[str]:
        """Store the stage's judge pairs and their comparisons, and return the pairs' ids.

        actor_pairs: the number of pairs of responses that are trained on with them. Raises
        JudgeError if too few comparisons can be read.
        """
        prompt_ids, out = list(self.pair_maker.known_prompts.records.ids()), self.out
        # 1. compare the judgements that are not compared yet
        self._compare_all(prompt_ids)
        out.merge(MetaJudgement)
        self.known_comparisons = Groups(out.known(MetaJudgement), lambda c: prompt_id_of(c.id))
        # 2. weight the two places in a comparison by how often each wins in the whole stage
        verdicts = Counter(
            None if comparison.score is None else verdict(comparison.score)
            for comparison in self.known_comparisons.records
        )
        weights = position_weights(verdicts[1], verdicts[-1])
        # 3. pair the best and the worst judgement of each prompt
        kept_ids, share = list[str](), self.config.judge_share
        most = None if share is None else int(share * actor_pairs / (1 - share) + 1e-9)
        pairs = self._make_pairs(prompt_ids, weights, most, kept_ids)
        new = (pair for pair in pairs if pair.id not in self.pair_maker.known_records)
        if self.ctx.runtime.is_main:
            out.append(new)
        else:
            deque(new, maxlen=0)
        out.merge(PreferencePair)
        self._report(verdicts, len(kept_ids))
        return kept_ids

    def rehearse(self) -> PreferencePair:
        """A pair whose two sides are one judgement, which is compared with itself.

        Raises JudgeError if the meta-judge has no room to answer.
        """
        judged, _ = self.pair_maker.rehearse()
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
        return self._as_pair(compared, (0, 0), (0.0, 0.0))

    def _compare_all(self, prompt_ids: Sequence[str]) -> None:
        """Compare all judgements that are not compared yet, block by block.

        Raises JudgeError on every process if too few comparisons can be read.
        """
        config, ctx = self.config, self.ctx
        sampled = config.num_sampled_reward_responses
        compared = min(sampled, config.max_judgements_compared or sampled)
        most = len(prompt_ids) * compared * (compared - 1)
        prompts, comparisons = amount(len(prompt_ids), "prompt"), amount(most, "comparison")
        message = "%s: judgements of %s are compared, in up to %s"
        logger.info(message, ctx.stage, prompts, comparisons)
        with ctx.runtime.progress(len(prompt_ids), f"{ctx.stage}: comparing", "prompt") as bar:
            for start in range(0, len(prompt_ids), config.prompts_per_block):
                block = list(prompt_ids[start : start + config.prompts_per_block])
                failure = self._compare(ctx.runtime.share(block))
                failures = [text for text in ctx.runtime.gather([failure]) if text]
                if failures:
                    raise JudgeError(failures[0])
                bar.update(len(block))

    def _compare(self, prompt_ids: Sequence[str]) -> str | None:
        """Compare the judgements of some prompts that are not compared yet, and store the results.

        Returns the text of an error if too few verdicts can be read, else None.
        """
        watcher, questions = self.pair_maker.watcher, list[Question]()
        for prompt_id in prompt_ids:
            compared, known = self._pick_judgements(prompt_id), self.known_comparisons[prompt_id]
            watcher.count(known)
            known_ids = {comparison.id for comparison in known}
            if compared is not None:
                questions += [q for q in self._questions(compared) if q.id not in known_ids]
        asked = self.asker.ask(self.ctx, questions) if questions else ()
        answers = self.ctx.runtime.counted(asked, len(questions), "comparison")
        for comparisons in self.out.keep(map(_as_comparison, answers)):
            watcher.count(comparisons)
            if (failure := self._parse_failure()) is not None:
                return failure
        return self._parse_failure()

    def _parse_failure(self) -> str | None:
        """The text of an error if too few verdicts could be read so far, else None."""
        return self.pair_maker.watcher.see_parsed(
            self.ctx.stage, self.out.path, noun="comparisons of judgements", advice=_advice()
        )

    def _pick_judgements(self, prompt_id: str) -> ComparedJudgements | None:
        """The judgements of a prompt that are compared; None if no response's judgements differ."""
        maker = self.pair_maker
        # 1. pick the response whose judgements differ most
        by_candidate: dict[str, list[Judgement]] = {}
        for judgement in sorted(maker.known_judgements[prompt_id], key=_judgement_number):
            by_candidate.setdefault(judgement.candidate_ids[0], []).append(judgement)
        candidates = sorted(maker.known_candidates[prompt_id], key=lambda c: _last_number(c.id))
        scores = [[j.score for j in by_candidate.get(c.id, ())] for c in candidates]
        picked = most_varied(scores)
        if picked is None:
            return None
        # 2. take the first of its whole judgements that can be read, each text once
        by_text: dict[str, Judgement] = {}
        for judgement in by_candidate[candidates[picked].id]:
            if judgement.is_cut or judgement.score is None or judgement.text is None:
                continue
            by_text.setdefault(judgement.text.strip(), judgement)
        judgements = list(by_text.values())[: self.config.max_judgements_compared]
        prompt = maker.known_prompts[prompt_id][0]
        return ComparedJudgements(prompt, candidates[picked], judgements)

    def _judge_prompt(self, compared: ComparedJudgements) -> Filled:
        """The prompt with which the judge was asked about the compared candidate."""
        judge, candidate = self.pair_maker.judge, self.pair_maker.as_judged(compared.candidate)
        assert isinstance(judge, SelfJudge)
        return judge.render(compared.prompt.text or "", candidate.text or "")

    def _questions(self, compared: ComparedJudgements) -> Iterator[Question]:
        """The questions to the meta-judge: each two judgements in both orders."""
        judge_prompt = self._judge_prompt(compared)
        for first, second in permutations(compared.judgements, 2):
            text = self.render_meta(judge_prompt, first.text or "", second.text or "")
            yield Question(_comparison_id(first, second), (first.id, second.id), text)

    def _make_pairs(
        self,
        prompt_ids: Sequence[str],
        weights: tuple[float, float],
        most: int | None,
        kept_ids: list[str],
    ) -> Iterator[PreferencePair]:
        """Yields the prompts' judge pairs, at most `most`, and adds their ids to `kept_ids`."""
        for prompt_id in prompt_ids:
            pair = self._make_pair(prompt_id, weights)
            if pair is not None and len(kept_ids) == most:
                self._drop("surplus")
            elif pair is not None:
                kept_ids.append(pair.id)
                yield pair

    def _make_pair(self, prompt_id: str, weights: tuple[float, float]) -> PreferencePair | None:
        """The judge pair of a prompt; None if it is dropped, which is counted by its reason."""
        compared = self._pick_judgements(prompt_id)
        if compared is None:
            return self._drop("unvaried")
        # 1. read who won in each order
        judgements = compared.judgements
        comparisons = {
            comparison.id: comparison for comparison in self.known_comparisons[prompt_id]
        }
        verdicts = {
            (m, n): verdict(comparisons[_comparison_id(judgements[m], judgements[n])].score)
            for m, n in permutations(range(len(judgements)), 2)
        }
        self._count_followed(judgements, verdicts)
        # 2. pick the strongest and the weakest judgement
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
        pair = self._as_pair(compared, picked, (strength[picked[0]], strength[picked[1]]))
        limit = self.ctx.limit(self.config.max_seq_len)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        return self._drop("no_room") if limit is not None and length > limit else pair

    def _drop(self, reason: str) -> None:
        """Count a prompt that gives no judge pair; returns None in place of the pair."""
        self.dropped[reason] += 1

    def _count_followed(
        self, judgements: Sequence[Judgement], verdicts: dict[tuple[int, int], int]
    ) -> None:
        """Count how often the judgement with the higher score won."""
        for (m, n), winner in verdicts.items():
            first, second = judgements[m].score, judgements[n].score
            assert first is not None and second is not None
            if winner and first != second:
                self.followed.add(int((first > second) == (winner > 0)), 1)

    def _as_pair(
        self, compared: ComparedJudgements, picked: tuple[int, int], strength: tuple[float, float]
    ) -> PreferencePair:
        """The pair that is trained on: the prompt to the judge, and two of its judgements.

        picked: places of the chosen and the rejected judgement; strength: theirs. Judgements are
        stored as texts, so the ids are those of the text and its end token.
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
        comparisons, judge_pairs = amount(total, "comparison"), amount(kept, "judge pair")
        message = "%s: %s of judgements, %s; dropped: %s"
        logger.log(level, message, stage, comparisons, judge_pairs, dropped)
        if self.followed.whole >= FIRST_LOOK:
            self.pair_maker.checker.see(
                "meta_follows_scores",
                metrics["meta/prefers_higher_score"],
                f"of {self.followed.whole} comparisons of judgements with different scores "
                f"{metrics['meta/prefers_higher_score']:.0%} were won by the higher score: the "
                "meta-judge reads the score and not the judgement, so training on it only makes "
                "the judge generous. Train the judge no further "
                f"({setting('train_judge', False)}).",
            )


def meta_asker(settings: MetaJudgingConfig) -> Asker:
    """Asks the stage's own model to compare judgements."""
    return Asker(
        form_of_comparison(settings),
        settings.sampling,
        name=NAME,
        score_mode=settings.score_mode,
        forced_ending=settings.forced_ending,
        source="compared",
    )


def _as_comparison(judgement: Judgement) -> MetaJudgement:
    """The record of a comparison, from the answer to a question about two judgements."""
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


def _comparison_id(first: Judgement, second: Judgement) -> str:
    """The id of the comparison that shows these two judgements in this order."""
    return f"{first.id}/vs/{second.id.rsplit('/', 1)[1]}"


def _judgement_number(judgement: Judgement) -> int:
    return int(judgement.id.rsplit("/j", 1)[1])


def _last_number(record_id: str) -> int:
    return int(record_id.rsplit("/", 1)[1])


def most_varied(scores: Sequence[Sequence[float | None]]) -> int | None:
    """The place of the response whose judgements have the highest variance of scores.

    scores: for each response the scores of its judgements, None if a judgement could not be read;
    those do not count. Returns the first of equals, and None if no response has two different
    scores.
    """
    known = [[exact(score) for score in row if score is not None] for row in scores]
    variances = [pvariance(row) if row else 0 for row in known]  # type: ignore[type-var]
    best = max(range(len(scores)), key=lambda i: (variances[i], -i), default=None)
    return best if best is not None and variances[best] > 0 else None


def verdict(score: float | None) -> int:
    """1 if a comparison's score is over 0.5, -1 if it is under 0.5, else 0 (also for None)."""
    return 0 if score is None else (score > 0.5) - (score < 0.5)


def position_weights(wins_first: int, wins_second: int) -> tuple[float, float]:
    """The weights of a win in the first and in the second place (arXiv:2407.19594, section 2.2).

    o1 = w2 / (w1 + w2) and o2 = 1 - o1, with w1, w2 how often the judgement shown first, or second,
    won in the whole data set: the place that wins more often counts less. Without any win both are
    1/2.
    """
    wins = wins_first + wins_second
    return (wins_second / wins, wins_first / wins) if wins else (0.5, 0.5)


def battles(verdicts: Verdicts, count: int, weights: tuple[float, float]) -> np.ndarray:
    """B (count, count): B_mn = o1 [r_mn = 1] + o2 [r_nm = -1], the weight of m's wins over n.

    count: the number of judgements. weights: (o1, o2) of `position_weights`. An order that is not
    in `verdicts` counts as 0.
    """
    first, second = weights
    won = np.zeros((count, count))
    for m, n in permutations(range(count), 2):
        won[m, n] = first * (verdicts.get((m, n)) == 1) + second * (verdicts.get((n, m)) == -1)
    return won


def strengths(won: np.ndarray, *, l2: float = 0.01) -> list[float]:
    """Strengths e (n,) of n judgements: argmax of sum_mn B_mn log sigma(e_m - e_n) - l2/2 |e|^2.

    won: B (n, n), see `battles`; its diagonal does not count. Elo is 400 e / ln 10. l2 > 0: without
    it, judgements that win every battle have infinite strength. Its default is our choice: a normal
    prior of standard deviation 10, in which a single battle, won once in each order, gives a
    difference of 3.9. It does not grow with the number of battles, so if there are many, they
    decide.

    Newton's method. Each step is shortened to log(1 + b)/b of itself, with b the spread of its
    entries; because |g'''| <= g'' for g(t) = log(1 + e^-t), each such step raises the sum.
    """
    won = np.where(np.eye(len(won), dtype=bool), 0.0, won)  # (n, n)
    strength = np.zeros(len(won))  # (n,)
    for _ in range(STEPS):
        # 1. the gradient of the sum (n,)
        losing = 1 / (1 + np.exp(strength[:, None] - strength[None, :]))  # sigma(e_n - e_m) (n, n)
        flow = won * losing  # (n, n)
        gradient = flow.sum(axis=1) - flow.sum(axis=0) - l2 * strength
        # 2. its Hessian, with the sign changed (n, n)
        bend = flow * (1 - losing)
        bend = bend + bend.T
        hessian = np.diag(bend.sum(axis=1) + l2) - bend
        # 3. a shortened step
        step = np.linalg.solve(hessian, gradient)  # (n,)
        spread = float(np.ptp(step))
        if spread < 1e-15:
            break
        strength = strength + step * (np.log1p(spread) / spread)
    return strength.tolist()


def best_and_worst(strengths: Sequence[float]) -> tuple[int, int] | None:
    """Places of the highest and the lowest strength, the first of equals; None if all are equal."""
    if not strengths or max(strengths) - min(strengths) <= EQUAL:
        return None
    high, low = max(strengths), min(strengths)
    best = next(i for i, e in enumerate(strengths) if e >= high - EQUAL)
    return best, next(i for i, e in enumerate(strengths) if e <= low + EQUAL)
