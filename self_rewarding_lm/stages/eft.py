"""Evaluation data: replies that people ranked become examples of judging (arXiv:2401.10020, 2.1).

Makes demonstrations and trains nothing; a later SFT stage takes them with `from_stage`. Examples
are judgements of single replies in people's order, scores made of the ranks, or comparisons of
two replies whose verdict is known to be right (rejection sampling, arXiv:2408.02666, 3.3).
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from self_rewarding_lm.config import (
    ComparisonConfig,
    FinetuneConfig,
    Object,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import OnBadRow
from self_rewarding_lm.data.ranked import Asked, as_candidates, ranked_row
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError
from self_rewarding_lm.evaluation.agreement import agreeing, orders_agree
from self_rewarding_lm.judges.asking import FIRST_LOOK, MIN_ANSWER_TOKENS, Asks, Question
from self_rewarding_lm.judges.self_judge import (
    PairwiseJudge,
    SelfJudge,
    check_comparison,
    check_judge_prompt,
    score_parser,
)
from self_rewarding_lm.judges.tally import judge_metrics
from self_rewarding_lm.judges.templates import template_parts
from self_rewarding_lm.records import (
    Candidate,
    Demonstration,
    Judgement,
    Prompt,
    RankedReplies,
    stable_hash,
)
from self_rewarding_lm.runs.lines import batched
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.scores import number_text
from self_rewarding_lm.stages.base import check_rows, read_once
from self_rewarding_lm.stages.lengths import ranked_lengths
from self_rewarding_lm.stages.ranges import UNKNOWN, Range
from self_rewarding_lm.stages.work import Asking, Counting, Work, prompt_tokens

Accept = Literal["instruction", "reply"]


def first_agreeing(
    ranks: Sequence[float], scores_KG: Sequence[Sequence[float | None]], *, accept: Accept
) -> list[int | None]:
    """For each reply the first attempt whose scores agree with the ranks; None where none does.

    scores_KG: for each attempt the scores of all replies. accept: "instruction" takes or leaves
    all replies of an attempt (`agreement.orders_agree`). "reply" leaves out replies without a
    score, and takes each one that stands rightly to all others (`agreement.agreeing`), if there is
    one that people ranked differently.
    """
    picked: list[int | None] = [None] * len(ranks)
    for k, scores in enumerate(scores_KG):
        if accept == "instruction":
            places = list(range(len(ranks))) if orders_agree(ranks, scores) else []
        else:
            places = _standing_rightly(ranks, scores)
        for place in places:
            if picked[place] is None:
                picked[place] = k
    return picked


def _standing_rightly(ranks: Sequence[float], scores: Sequence[float | None]) -> list[int]:
    scored = [place for place, score in enumerate(scores) if score is not None]
    known = [ranks[place] for place in scored]
    if len(set(known)) < 2:  # nothing to compare with
        return []
    flags = agreeing(known, [scores[place] for place in scored])
    return [place for place, flag in zip(scored, flags, strict=True) if flag]


def thinned(
    of_ids: Mapping[str, float],
    *,
    seed: int,
    max_share: float | None,
    max_per_score: int | None,
    scores: Collection[float] = (),
) -> set[str]:
    """The ids that are kept where no score may be over-represented.

    of_ids: the score of each id. scores: such as count though no id may have them. All have one
    cap: the highest with which none has more than `max_share` of what is kept (with n scores that
    cannot be under 1/n, which is taken then), and not over `max_per_score`. Which ids of a score
    stay is a function of the seed and the ids.
    """
    counts = Counter(dict.fromkeys(scores, 0))
    counts.update(of_ids.values())
    cap = max(counts.values(), default=0)
    if max_share is not None and counts:
        share = max(max_share, 1 / len(counts))
        while cap > (fair := int(share * sum(min(n, cap) for n in counts.values()) + 1e-9)):
            cap = fair  # falls to the highest cap that holds
    if max_per_score is not None:
        cap = min(cap, max_per_score)
    by_score: dict[float, list[str]] = {}
    for record_id in sorted(of_ids, key=lambda i: (stable_hash(seed, "thinned", i), i)):
        by_score.setdefault(of_ids[record_id], []).append(record_id)
    return {record_id for ids in by_score.values() for record_id in ids[:cap]}


def scores_of_ranks(ranks: Sequence[float], allowed: Sequence[float]) -> list[float]:
    """Scores made of ranks: the best rank gets the highest allowed score, the worst the lowest.

    The different ranks between them are spread evenly and rounded to the nearest allowed score,
    halves up; equal ranks get equal scores. Of 0 to 5: two ranks 5, 0; three 5, 3, 0; four
    5, 3, 2, 0. With more ranks than scores neighbours share one. Needs two different ranks.
    """
    order = sorted(set(ranks))
    last, low, high = len(order) - 1, min(allowed), max(allowed)

    def score_at(place: int) -> float:
        # compared as multiples of 1/last, so that whole numbers stay exact
        wanted = high * last - place * (high - low)
        return min(allowed, key=lambda score: (abs(score * last - wanted), -score))

    return [score_at(order.index(rank)) for rank in ranks]


def score_targets(reward: RewardConfig, stage: str) -> dict[float, str]:
    """For each allowed score what a judge says to give it: the reward template, filled in.

    Raises ConfigError where the reward prompt does not say its scores (`allowed_numbers`) or has no
    template, and where it reads another score in a text.
    """
    template = reward.reward_regex_template
    allowed = reward.allowed_numbers()
    if template is None or len(allowed) < 2:
        raise ConfigError(
            f"{stage}: method='ranks' writes scores in the form of the reward prompt, which needs "
            "reward_regex_template (for example 'Score: {{ reward }}') and at least two scores, by "
            "allowed_scores or score_range."
        )
    before, after = template_parts(template)
    targets = {score: f"{before}{number_text(score)}{after}" for score in allowed}
    parse = score_parser(reward)
    for score, text in targets.items():
        if parse(text).score != score:
            raise ConfigError(
                f"{stage}: method='ranks' would teach {text!r} for the score {score:g}, but the "
                f"reward prompt reads {parse(text).score} in it."
            )
    return targets


class BuildEFTConfig(FinetuneConfig):
    """Judge prompts with the answers that a judge should give, made of human-ranked replies.

    "judgements" is the paper's way (3.1.1): the current weights, there the SFT baseline, judge
    every reply; judgements whose scores are in the order of the human ranking are kept, and of
    scores that come too often a part is discarded. The target is the judge's text as it wrote it;
    the score is the one it states (`RewardConfig.as_written`).
    "ranks" asks no model and is for models that cannot judge yet: the target is the reward
    template alone with a score made of the rank, see `scores_of_ranks`.
    Of each reply there is one demonstration at most.
    "comparisons" is rejection sampling against known-better replies (Self-Taught Evaluators,
    arXiv:2408.02666, 3): any two that people ranked differently are compared, in one order; the
    first judgement with the right verdict is kept, and A and B are balanced. One demonstration a
    pair at most.

    Trains nothing.
    """

    folder_name: ClassVar[str] = "eft"

    ranked_dataset: Object
    """Replies ranked by people, at least two a row, see `ranked_row`; pairs of an earlier
    stage too."""
    method: Literal["judgements", "ranks", "comparisons"] = "judgements"
    """Whether the model's own judgements are taken, scores are made of the ranks, or two replies
    are compared."""
    num_judgements: int | None = Field(default=None, ge=1)
    """Attempts, of which the first that agrees is taken. "judgements": judgement k of every reply
    of a row makes one order; default 3, what the paper draws to score (3.1.3), for it does not say
    how many it drew here. "comparisons": of each pair; default 15 (arXiv:2408.02666, 3.3)."""
    judging: SamplingConfig = SamplingConfig()
    """How judgements are sampled."""
    self_reward_config_keyname: str = "default"
    """Which of the trainer's reward prompts; "comparisons" asks by none of them."""
    comparison: ComparisonConfig | None = None
    """How two replies are shown and the verdict is said, for "comparisons". None: the library's
    own way."""
    accept: Accept = "instruction"
    """"instruction": an attempt counts where all replies of the row have a score and all that
    people ordered are in that order. "reply": each reply by itself, where it stands rightly to all
    others that have a score. A tie is no agreement. The paper asks that the order of the scores
    agrees with the human ranking, and does not say what a tie is."""
    max_score_share: float | None = Field(default=0.5, gt=0, le=1)
    """No score has more than this share of what is kept; with n different scores never under 1/n.
    The paper discards a part of the commonest score without saying how much; 0.5 is ours. With
    "comparisons" of the two verdicts: 0.5 keeps as many A as B."""
    max_per_score: int | None = Field(default=None, ge=1)
    """No score is kept more often than this."""
    min_kept: int = Field(default=1, ge=0)
    """Fewer demonstrations are an error that says what to try; 0 goes on without any."""
    on_bad_row: OnBadRow = "raise"
    """A row that is no ranking: an error that names it; or "skip", it is left out and counted."""

    def check(self, ctx: Context) -> None:
        if self.method == "comparisons":
            check_comparison(self.written_comparison(), ctx.tokens, ctx.model.max_len)
        else:
            check_judge_prompt(self._reward(ctx), ctx.tokens, ctx.model.max_len)
        if self.method == "ranks":
            score_targets(self._reward(ctx), ctx.stage)
        rows = ctx.rows["ranked_dataset"]
        check_rows(rows, self.on_bad_row, lambda row, where: self.check_row(row, where, ctx))

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        """Raise DataError or TokenizerError where a row is no ranking."""
        ranked_replies(row, where, f"{ctx.stage}/0", ctx)

    def run(self, ctx: Context, out: StageDir) -> None:
        rows = ctx.rows["ranked_dataset"]

        def make(row: int, record_id: str) -> RankedReplies:
            return ranked_replies(rows.read(row), rows.where(row), record_id, ctx)

        ranked = read_once(
            ctx, out, rows, RankedReplies, ctx.stage, make, on_bad_row=self.on_bad_row
        )
        if self.method == "comparisons":
            ComparisonBuilder(self, ctx, out, ranked).build()
        else:
            ReplyBuilder(self, ctx, out, ranked, self._reward(ctx)).build()

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        fewer = {
            "judging": self.judging.shortened(MIN_ANSWER_TOKENS),
            "num_judgements": 1,
            "min_kept": 0,
        }
        self.model_copy(update=fewer).run(ctx, out)

    def work(self, counting: Counting) -> Work:
        data = counting.data(self.ranked_dataset, ranked_lengths)
        lengths, compares = data.lengths, self.method == "comparisons"
        # 1. what is judged: replies, or each two that differ in rank
        count = Range(2 * data.rows.least)  # two replies a row at least
        if compares:
            replies = 2 if lengths is None else lengths.answers
            count = Range(data.rows.least, data.rows.times(replies * (replies - 1) / 2).most)
        elif lengths is not None:  # all rows have as many as those that were looked at
            count = data.rows.times(lengths.answers)
        # 2. what a judge prompt shows
        shown, longest, sides = UNKNOWN, None, 2 if compares else 1
        if lengths is not None:
            shown = Range.of(round(lengths.prompt + sides * lengths.answer))
            longest = lengths.longest_prompt + sides * lengths.longest_answer
        # 3. judgements
        asks = counting.rewards.get(self.self_reward_config_keyname)
        if compares:
            asks = self.written_comparison()
        elif asks is not None and self.method == "judgements":
            asks = asks.as_written()
        judgements, answers = Asking(), Asking(count)
        if self.method != "ranks":
            settings = (asks, self.judging, answers, self.attempts, shown, longest)
            judgements = counting.judgements(*settings)
        rubric, _ = counting.rubric(asks)
        return Work(
            data.rows,
            prompt_tokens(lengths, counting.max_len),
            judgements=judgements,
            made=Range(0, count.most),
            example=UNKNOWN if rubric is None else shown + Range.of(rubric),
        )

    @property
    def attempts(self) -> int:
        """Judgements of a reply, or of a pair."""
        return self.num_judgements or (15 if self.method == "comparisons" else 3)

    def written_comparison(self) -> ComparisonConfig:
        """How two replies are compared, for judgements whose text is what is wanted."""
        written = {"score_mode": "sampled", "forced_ending": False}
        return (self.comparison or ComparisonConfig()).model_copy(update=written)

    def reward_names(self) -> tuple[str, ...]:
        return () if self.method == "comparisons" else (self.self_reward_config_keyname,)

    def _reward(self, ctx: Context) -> RewardConfig:
        name = self.self_reward_config_keyname
        return ctx.rewards_named((name,))[name].as_written()


def ranked_replies(row: Any, where: str, record_id: str, ctx: Context) -> RankedReplies:
    """A row as it is stored; DataError or TokenizerError where it cannot be used."""
    item = replace(ranked_row(row, where), id=record_id)
    as_candidates(item, ctx.tokens, where=where)
    return item


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A demonstration and the score, or verdict, that it teaches."""

    made: Demonstration
    score: float


class Builder(ABC):
    """Makes a stage's demonstrations; what is on disk already is used again."""

    teaches = "Scores"
    """What its demonstrations say."""
    scores: tuple[float, ...] = ()
    """All that they may say, where those that none says count too."""

    def __init__(
        self,
        config: "BuildEFTConfig",
        ctx: Context,
        out: StageDir,
        ranked: Sequence[RankedReplies],
    ) -> None:
        self.config, self.ctx, self.out, self.ranked = config, ctx, out, ranked
        self.asked: list[Asked] = [as_candidates(item, ctx.tokens) for item in ranked]
        self.candidates = [c for _, candidates in self.asked for c in candidates]
        self.judgements: dict[str, Judgement] = {}

    @abstractmethod
    def found(self) -> list[Example]:
        """All that could be learnt."""

    @abstractmethod
    def counts(self, found: Sequence[Example]) -> dict[str, Any]:
        """Metrics of how far the judgements came."""

    @abstractmethod
    def in_words(self, metrics: Mapping[str, Any]) -> str:
        """The same as a sentence's beginning."""

    @abstractmethod
    def too_few(self, words: str) -> Exception:
        """The error where fewer than min_kept are left, with what to change."""

    @abstractmethod
    def score_text(self, score: float) -> str:
        """A score as it is reported."""

    def build(self) -> list[Demonstration]:
        """The stage's demonstrations, all records of their making on disk."""
        config, out = self.config, self.out
        if self.ctx.runtime.is_main:
            out.append([prompt for prompt, _ in self.asked])
            out.append(self.candidates)
        out.merge(Prompt)
        out.merge(Candidate)
        found = self.found()
        limit = self.ctx.limit(None)
        fitting = [e for e in found if limit is None or _length(e.made) <= limit]
        kept = thinned(
            {e.made.id: e.score for e in fitting},
            seed=self.ctx.seed,
            max_share=config.max_score_share,
            max_per_score=config.max_per_score,
            scores=self.scores,
        )
        taken = [e for e in fitting if e.made.id in kept]
        if self.ctx.runtime.is_main:
            out.append([e.made for e in taken])
        out.merge(Demonstration)
        self._report(found, fitting, taken)
        return [e.made for e in taken]

    def ask(self, asker: Asks, groups: Sequence[Sequence[Question]]) -> None:
        """Have judged what is not judged yet, each process a part of the groups."""
        ctx = self.ctx
        known = {j.id for j in self.out.known(Judgement)}
        missing = [[q for q in group if q.id not in known] for group in groups]
        mine = [q for group in ctx.runtime.share([g for g in missing if g]) for q in group]
        found = batched(ctx.runtime.stopping.between(asker.ask(ctx, mine)), FIRST_LOOK)
        with ctx.runtime.progress(len(mine), f"{ctx.stage}: judging", "judgement") as bar:
            for batch in found:
                self.out.append(batch)
                bar.update(len(batch))
        self.out.merge(Judgement)
        self.judgements = {j.id: j for j in self.out.read(Judgement)}

    def example(
        self,
        record_id: str,
        shown: str,
        target: str,
        score: float,
        parents: Sequence[str],
    ) -> Example:
        """What the judge reads, and what it should say."""
        rendered = self.ctx.tokens.prompt(shown)
        made = Demonstration(
            id=record_id,
            prompt_ids=rendered.ids,
            completion_ids=self.ctx.tokens.response(shown, target),
            prompt=rendered.text,
            completion=target,
            parents=tuple(parents),
            messages=rendered.messages,
        )
        return Example(made, score)

    def unread(self) -> str:
        """Texts of the judge without a score, to show in an error."""
        without = [j for j in self.judgements.values() if j.score is None]
        lines = dict.fromkeys(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in without)
        texts = "\n".join(islice(lines, 3))
        return f"Texts without a score:\n{texts}\n" if texts else ""

    def _report(
        self, found: Sequence[Example], fitting: Sequence[Example], taken: Sequence[Example]
    ) -> None:
        """How many came how far, and the scores before and after thinning."""
        metrics: dict[str, Any] = {
            "eft/instructions": len(self.ranked),
            "eft/replies": len(self.candidates),
            **self.counts(found),
        }
        if self.judgements:
            metrics |= judge_metrics(self.candidates, list(self.judgements.values()))
        metrics |= {"eft/too_long": len(found) - len(fitting), "eft/kept": len(taken)}
        metrics |= {
            "eft/scores_before": self._histogram(fitting),
            "eft/scores_after": self._histogram(taken),
        }
        self.out.log({"step": 0, **metrics})
        self.out.summary |= {"demonstrations": len(taken), "metrics": metrics}
        words = self._in_words(metrics)
        if len(taken) < self.config.min_kept:
            raise self.too_few(
                f"{self.ctx.stage}: {words}, and min_kept is {self.config.min_kept}."
            )
        level = logging.INFO if taken else logging.WARNING
        logger.log(level, "%s: %s", self.ctx.stage, words)

    def _in_words(self, metrics: Mapping[str, Any]) -> str:
        words = self.in_words(metrics)
        if metrics["eft/too_long"]:
            words += f", {metrics['eft/too_long']} of them too long for the model"
        before, after = (
            ", ".join(f"{count} x {score}" for score, count in metrics[f"eft/{name}"].items())
            for name in ("scores_before", "scores_after")
        )
        words += f"; {metrics['eft/kept']} kept"
        if not before:
            return words
        return f"{words}. {self.teaches} before thinning: {before}; after: {after or 'none'}"

    def _histogram(self, examples: Sequence[Example]) -> dict[str, int]:
        counts = Counter(example.score for example in examples)
        return {self.score_text(score): count for score, count in sorted(counts.items())}


def _length(made: Demonstration) -> int:
    return len(made.prompt_ids) + len(made.completion_ids)


class ReplyBuilder(Builder):
    """Of each reply one demonstration at most (arXiv:2401.10020, 3.1.1)."""

    def __init__(
        self,
        config: "BuildEFTConfig",
        ctx: Context,
        out: StageDir,
        ranked: Sequence[RankedReplies],
        reward: RewardConfig,
    ) -> None:
        super().__init__(config, ctx, out, ranked)
        self.reward = reward
        self.judge = SelfJudge(reward, config.judging, config.attempts)

    def found(self) -> list[Example]:
        if self.config.method == "ranks":
            return self._from_ranks()
        groups = []
        for prompt, candidates in self.asked:
            for c in candidates:
                text, ids = self._shown(prompt, c), self.judge.judgement_ids([c])
                groups.append([Question(record_id, (c.id,), text) for record_id in ids])
        self.ask(self.judge.asker, groups)
        return self._from_judgements()

    def _shown(self, prompt: Prompt, candidate: Candidate) -> str:
        return self.judge.render(prompt.text or "", candidate.text or "")

    def _from_judgements(self) -> list[Example]:
        """Of every reply the first judgement that agrees with people, if there is one."""
        found = []
        for item, (prompt, candidates) in zip(self.ranked, self.asked, strict=True):
            told_KG = [
                [self.judgements[f"{c.id}/j{k}"] for c in candidates]
                for k in range(self.config.attempts)
            ]
            scores_KG = [[j.score for j in told] for told in told_KG]
            picked = first_agreeing(item.ranks, scores_KG, accept=self.config.accept)
            for place, k in enumerate(picked):
                if k is not None:
                    told = told_KG[k][place]
                    assert told.score is not None and told.text is not None
                    found.append(
                        self._example(item, prompt, candidates[place], told.text, told.score, told)
                    )
        return found

    def _from_ranks(self) -> list[Example]:
        """Of every reply the score that its rank stands for."""
        targets = score_targets(self.reward, self.ctx.stage)
        return [
            self._example(item, prompt, candidate, targets[score], score, None)
            for item, (prompt, candidates) in zip(self.ranked, self.asked, strict=True)
            for candidate, score in zip(
                candidates, scores_of_ranks(item.ranks, tuple(targets)), strict=True
            )
        ]

    def _example(
        self,
        item: RankedReplies,
        prompt: Prompt,
        candidate: Candidate,
        target: str,
        score: float,
        judgement: Judgement | None,
    ) -> Example:
        record_id = f"{item.id}/{candidate.id.rsplit('/', 1)[1]}"
        parents = (item.id, candidate.id, *([judgement.id] if judgement else []))
        return self.example(record_id, self._shown(prompt, candidate), target, score, parents)

    def counts(self, found: Sequence[Example]) -> dict[str, Any]:
        if self.config.method == "ranks":
            return {}
        read = {j.candidate_ids[0] for j in self.judgements.values() if j.score is not None}
        return {"eft/parsed": len(read), "eft/agreed": len(found)}

    def score_text(self, score: float) -> str:
        return number_text(score)

    def in_words(self, metrics: Mapping[str, Any]) -> str:
        words = f"{metrics['eft/replies']} replies to {metrics['eft/instructions']} instructions"
        if "eft/parsed" in metrics:
            words += (
                f", {metrics['eft/parsed']} with a score that could be read, "
                f"{metrics['eft/agreed']} in agreement with people"
            )
        return words

    def too_few(self, words: str) -> Exception:
        where = f"All records made so far are kept in {self.out.path}."
        if self.config.method == "ranks":
            return DataError(
                f"{words} The judge prompt with a reply and its score must have "
                f"room in the model's {self.ctx.limit(None)} tokens; use a shorter reward prompt "
                f"or shorter replies. {where}"
            )
        return JudgeError(
            f"{words}\n{self.unread()}"
            "Change one of these: method='ranks', which makes scores of the ranks and needs no "
            "judge, for a model that cannot judge yet; more num_judgements; accept='reply', which "
            "asks less; judging.max_new_tokens, if the texts are cut off; or the reward prompt's "
            f"reward_regex_template, if they state their scores in another form. {where}"
        )


@dataclass(frozen=True)
class Shown:
    """Two replies of which one is better, in the order in which the judge is shown them."""

    id: str
    item: RankedReplies
    first: Candidate
    second: Candidate
    better_first: bool
    text: str

    def questions(self, attempts: int) -> list[Question]:
        """One for each attempt."""
        ids = (self.first.id, self.second.id)
        return [Question(f"{self.id}/j{k}", ids, self.text) for k in range(attempts)]

    def is_right(self, judgement: Judgement) -> bool:
        """Whether the better one was said to be; a tie is not right."""
        return judgement.score == float(self.better_first)


class ComparisonBuilder(Builder):
    """Of each two replies with different ranks one demonstration at most.

    Half of the pairs, by a hash of the seed and their ids, show the better reply first.
    """

    teaches = "Verdicts"
    scores = (0.0, 1.0)

    def __init__(
        self,
        config: "BuildEFTConfig",
        ctx: Context,
        out: StageDir,
        ranked: Sequence[RankedReplies],
    ) -> None:
        super().__init__(config, ctx, out, ranked)
        self.comparison = config.written_comparison()
        self.judge = PairwiseJudge(self.comparison, config.judging)
        self.pairs = self._in_order()

    def _in_order(self) -> list[Shown]:
        """All pairs, each in its one order."""
        better: dict[str, tuple[RankedReplies, str, Candidate, Candidate]] = {}
        for item, (prompt, candidates) in zip(self.ranked, self.asked, strict=True):
            for i, j in combinations(range(len(candidates)), 2):
                if item.ranks[i] != item.ranks[j]:
                    one, other = sorted((i, j), key=lambda place: item.ranks[place])
                    pair = (item, prompt.text or "", candidates[one], candidates[other])
                    better[f"{prompt.id}/{one}/vs/{other}"] = pair
        by_hash = sorted(better, key=lambda i: (stable_hash(self.ctx.seed, "order", i), i))
        first = set(by_hash[::2])
        found = []
        for pair_id, (item, asked, best, worst) in better.items():
            sides = (best, worst) if pair_id in first else (worst, best)
            text = self.judge.render(asked, *(side.text or "" for side in sides))
            found.append(Shown(pair_id, item, *sides, pair_id in first, text))
        return found

    def found(self) -> list[Example]:
        attempts = self.config.attempts
        self.ask(self.judge.asker, [shown.questions(attempts) for shown in self.pairs])
        found = []
        for shown in self.pairs:
            told = next((j for j in self._told(shown) if shown.is_right(j)), None)
            if told is not None:
                assert told.score is not None and told.text is not None
                parents = (shown.item.id, *told.candidate_ids, told.id)
                found.append(self.example(shown.id, shown.text, told.text, told.score, parents))
        return found

    def _told(self, shown: Shown) -> list[Judgement]:
        """A pair's judgements, in the order of the attempts."""
        return [self.judgements[q.id] for q in shown.questions(self.config.attempts)]

    def counts(self, found: Sequence[Example]) -> dict[str, Any]:
        """eft/right_...: of verdicts that could be read, those that are right, by the place of the
        better reply; a judge without a bias for a place has the same share in both."""
        read = {
            shown.id: [j for j in self._told(shown) if j.score is not None] for shown in self.pairs
        }
        metrics: dict[str, Any] = {
            "eft/pairs": len(self.pairs),
            "eft/parsed": sum(map(bool, read.values())),
            "eft/agreed": len(found),
        }
        for name, place in (("first", True), ("second", False)):
            right = [
                s.is_right(j) for s in self.pairs if s.better_first == place for j in read[s.id]
            ]
            if right:
                metrics[f"eft/right_better_{name}"] = sum(right) / len(right)
        return metrics

    def score_text(self, score: float) -> str:
        return self.comparison.labels[score == 0.0]

    def in_words(self, metrics: Mapping[str, Any]) -> str:
        words = (
            f"{metrics['eft/pairs']} pairs of {metrics['eft/instructions']} instructions, "
            f"{metrics['eft/parsed']} with a verdict that could be read, {metrics['eft/agreed']} "
            "with a right one"
        )
        for name in ("first", "second"):
            share = metrics.get(f"eft/right_better_{name}")
            if share is not None:
                words += f" ({share:.0%} right where the better is shown {name})"
        return words

    def too_few(self, words: str) -> Exception:
        return JudgeError(
            f"{words}\n{self.unread()}"
            "Change one of these: more num_judgements; a higher judging.temperature; "
            "judging.max_new_tokens, if the texts are cut off; comparison.verdict_prefix, if they "
            "state their verdicts in another form; max_score_share=None, which keeps all, if the "
            "judge names one place alone; or train the model on judge examples first "
            f"(method='ranks' needs no judge). All records made so far are kept in {self.out.path}."
        )
