"""Turns replies that people ranked into examples of judging (arXiv:2401.10020, 2.1).

Output: demonstrations; a later SFT stage trains on them with `from_stage`. There are three kinds:
judgements of single replies whose scores agree with people's order; scores computed from the ranks;
comparisons of two replies whose verdict is known to be right (rejection sampling, arXiv:2408.02666,
3.3). Begin with `BuildEFTConfig.run`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
from self_rewarding_lm.data.ranked import as_candidates, ranked_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError, setting
from self_rewarding_lm.evaluation.agreement import agreeing, orders_agree
from self_rewarding_lm.judges.asking import MIN_ANSWER_TOKENS, Asks, Question
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
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.scores import exact, number_text
from self_rewarding_lm.stages.base import check_rows, read_once
from self_rewarding_lm.stages.lengths import ranked_lengths
from self_rewarding_lm.stages.ranges import UNKNOWN, Range
from self_rewarding_lm.stages.work import Asking, Counting, Work, new_tokens, prompt_tokens
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


Accept = Literal["instruction", "reply"]


def first_agreeing(
    ranks: Sequence[float], scores_KG: Sequence[Sequence[float | None]], *, accept: Accept
) -> list[int | None]:
    """For each reply the place of the first attempt whose scores agree with the ranks, else None.

    ranks: of the replies, (G,). scores_KG: the scores of all replies in each of K attempts, (K, G).
    accept: "instruction" takes all replies of an attempt or none (`agreement.orders_agree`).
    "reply" ignores replies without a score and takes each reply that is in the right order with all
    others (`agreement.agreeing`), if at least one of them has another rank.
    """
    attempts: list[int | None] = [None] * len(ranks)
    for k, scores in enumerate(scores_KG):
        if accept == "instruction":
            places = list(range(len(ranks))) if orders_agree(ranks, scores) else []
        else:
            places = _places_in_order(ranks, scores)
        for place in places:
            if attempts[place] is None:
                attempts[place] = k
    return attempts


def _places_in_order(ranks: Sequence[float], scores: Sequence[float | None]) -> list[int]:
    """Places of the replies that are in the right order with all others that have a score."""
    scored = [place for place, score in enumerate(scores) if score is not None]
    scored_ranks = [ranks[place] for place in scored]
    if len(set(scored_ranks)) < 2:  # nothing to compare with
        return []
    flags = agreeing(scored_ranks, [scores[place] for place in scored])
    return [place for place, flag in zip(scored, flags, strict=True) if flag]


def thinned(
    score_of_id: Mapping[str, float],
    *,
    seed: int,
    max_share: float | None,
    max_per_score: int | None,
    scores: Collection[float] = (),
) -> set[str]:
    """The ids to keep so that no score is over-represented.

    score_of_id: the score of each id. scores: scores that count even if no id has them. Each score
    keeps at most `cap` ids, chosen by a hash of the seed and the id. `cap` is the highest number
    with which no score has more than `max_share` of the ids that are kept, and at most
    `max_per_score`. With n scores one has a share of at least 1/n, so a lower max_share counts as
    1/n.
    """
    # 1. the cap
    counts = Counter(dict.fromkeys(scores, 0))
    counts.update(score_of_id.values())
    cap = max(counts.values(), default=0)
    if max_share is not None and counts:
        share = max(max_share, 1 / len(counts))
        # lower the cap until it is at most its share of the ids that it keeps
        while cap > (fair := int(share * sum(min(n, cap) for n in counts.values()) + 1e-9)):
            cap = fair
    if max_per_score is not None:
        cap = min(cap, max_per_score)
    # 2. the first ids of each score, in an order that depends on the seed
    by_score: dict[float, list[str]] = {}
    for record_id in sorted(score_of_id, key=lambda i: (stable_hash(seed, "thinned", i), i)):
        by_score.setdefault(score_of_id[record_id], []).append(record_id)
    return {record_id for ids in by_score.values() for record_id in ids[:cap]}


def scores_of_ranks(ranks: Sequence[float], allowed: Sequence[float]) -> list[float]:
    """Turn ranks into scores: the best rank gets the highest allowed score, the worst the lowest.

    The ranks between them are spread evenly and rounded to the nearest allowed score, halves up;
    equal ranks get equal scores. With scores from 0 to 5 two ranks give 5, 0; three give 5, 3, 0;
    four give 5, 3, 2, 0. If there are more ranks than scores, neighbours share a score. Needs at
    least two different ranks.
    """
    order = sorted(set(ranks))
    last, low, high = len(order) - 1, exact(min(allowed)), exact(max(allowed))

    def score_at(place: int) -> float:
        # distances are compared in units of 1/last, so that whole numbers stay exact
        wanted = high * last - place * (high - low)
        return min(allowed, key=lambda score: (abs(exact(score) * last - wanted), -score))

    return [score_at(order.index(rank)) for rank in ranks]


def score_targets(reward: RewardConfig, stage: str) -> dict[float, str]:
    """For each allowed score the text with which a judge states it: the reward template, filled in.

    Raises ConfigError if the reward prompt has no template, if it does not say which scores it
    allows (`allowed_numbers`), or if its parser reads another score from such a text.
    """
    template = reward.reward_regex_template
    allowed = reward.allowed_numbers()
    if template is None or len(allowed) < 2:
        raise ConfigError(
            f"{stage}: {setting('method', 'ranks')} writes scores in the form of the reward "
            "prompt, which needs "
            "reward_regex_template (for example 'Score: {{ reward }}') and at least two scores, by "
            "allowed_scores or score_range."
        )
    before, after = template_parts(template)
    targets = {score: f"{before}{number_text(score)}{after}" for score in allowed}
    parse = score_parser(reward)
    for score, text in targets.items():
        if parse(text).score != score:
            raise ConfigError(
                f"{stage}: {setting('method', 'ranks')} would teach {text!r} for the score "
                f"{score:g}, but the "
                f"reward prompt reads {parse(text).score} in it."
            )
    return targets


@dataclass(frozen=True)
class RankedPrompt:
    """A row of the dataset, with its prompt and its replies as records."""

    row: RankedReplies
    prompt: Prompt
    candidates: list[Candidate]
    """The replies, in the order of the row."""


@dataclass(frozen=True)
class Example:
    """A demonstration and the score, or verdict, that it teaches."""

    demonstration: Demonstration
    score: float

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.demonstration.prompt_ids) + len(self.demonstration.completion_ids)


@dataclass(frozen=True)
class Examples:
    """All examples that a stage could teach, and the words with which they are reported."""

    examples: list[Example]
    judgements: Mapping[str, Judgement]
    """All judgements by id; empty if no model was asked."""
    metrics: dict[str, Any]
    """How many judgements could be read and how many agree."""
    words: str
    """The metrics as the beginning of a sentence."""
    advice: str
    """What to change if too few examples are left."""
    error: type[JudgeError] | type[DataError] = JudgeError
    label: Callable[[float], str] = number_text
    """How a score is reported."""
    teaches: str = "Scores"
    scores: tuple[float, ...] = ()
    """Scores that count when examples are thinned, even if no example teaches them."""


class BuildEFTConfig(FinetuneConfig):
    """Makes judging examples from human-ranked replies; an SFT stage trains on them (EFT).

    An example is a judge prompt with the text that the judge should write. This stage trains
    nothing itself. There are three methods.
    "judgements" is the paper's (arXiv:2401.10020, 3.1.1): the current weights, there the SFT
    baseline, judge every reply; judgements whose scores agree with the human ranking are kept, and
    a part of those with too frequent scores is discarded. The target is the judge's text as it
    wrote it; the score is the one it states. One example of each reply at most.
    "ranks" uses no model and is for models that cannot judge yet: the target is the reward
    template with a score made from the rank. One example of each reply at most.
    "comparisons" is rejection sampling against known-better replies (Self-Taught Evaluators,
    arXiv:2408.02666, 3): any two that people ranked differently are compared, in one order; the
    first judgement with the right verdict is kept, and verdicts A and B are balanced. One example
    of each pair at most.
    """

    folder_name: ClassVar[str] = "eft"

    ranked_dataset: Object
    """Replies ranked by people, at least two in a row (docs/data.md), or pairs of an earlier
    stage."""
    method: Literal["judgements", "ranks", "comparisons"] = "judgements"
    """Whether examples are the model's own judgements, scores made from the ranks, or the model's
    comparisons of two replies."""
    num_judgements: int | None = Field(default=None, ge=1)
    """Attempts, of which the first that agrees is kept. "judgements": the k-th judgements of all
    replies of a row are one attempt; default 3, as many as the paper draws to score (3.1.3),
    because it does not say how many it drew here. "comparisons": for each pair; default 15
    (arXiv:2408.02666, 3.3)."""
    judging: SamplingConfig = SamplingConfig()
    """How judgements are sampled."""
    self_reward_config_keyname: str = "default"
    """Which of the trainer's reward prompts is used; "comparisons" uses none of them."""
    comparison: ComparisonConfig | None = None
    """For "comparisons": how two replies are shown, and how the verdict is read. None: the
    library's own prompt."""
    accept: Accept = "instruction"
    """"instruction": an attempt is kept if all replies of the row have a score and the scores are
    in the human order. "reply": each reply by itself, if its score is in the human order with all
    others that have a score. A tie is no agreement. The paper requires that the order of the scores
    agrees with the human ranking, and does not say how a tie counts."""
    max_score_share: float | None = Field(default=0.5, gt=0, le=1)
    """Greatest share of one score among the kept examples; with n different scores never under 1/n.
    The paper discards a part of the commonest score without saying how much; 0.5 is ours. With
    "comparisons" it is the share of one verdict: 0.5 keeps as many A as B."""
    max_per_score: int | None = Field(default=None, ge=1)
    """Greatest number of kept examples with one score."""
    min_kept: int = Field(default=1, ge=0)
    """If fewer examples are kept, that is an error that says what to try; 0 allows none."""
    on_bad_row: OnBadRow = "raise"
    """A row that is no ranking: "raise", an error that names it; "skip", it is left out and
    counted."""

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
        """Raise DataError or TokenizerError if a row is no ranking."""
        ranked_replies(row, where, f"{ctx.stage}/0", ctx)

    def shown(
        self, field: str, row: Any, where: str, tokens: Tokens
    ) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
        ranked = replace(ranked_row(row, where), id="shown/0")
        prompt, replies = as_candidates(ranked, tokens, where=where)
        shown = []
        for rank, reply in sorted(zip(ranked.ranks, replies, strict=True), key=lambda it: it[0]):
            ids = (*prompt.ids, *reply.ids)
            shown.append((f"a reply of rank {rank:g} to judge", ids, [False] * len(ids)))
        return shown

    def run(self, ctx: Context, out: StageDir) -> None:
        dataset = ctx.rows["ranked_dataset"]

        def make(place: int, record_id: str) -> RankedReplies:
            return ranked_replies(dataset.read(place), dataset.where(place), record_id, ctx)

        # 1. store prompts and replies, as if the replies had been sampled
        rows = read_once(
            ctx, out, dataset, RankedReplies, ctx.stage, make, on_bad_row=self.on_bad_row
        )
        ranked = [RankedPrompt(row, *as_candidates(row, ctx.tokens)) for row in rows]
        if ctx.runtime.is_main:
            out.append([r.prompt for r in ranked])
            out.append([c for r in ranked for c in r.candidates])
        out.merge(Prompt)
        out.merge(Candidate)
        # 2. make all examples
        if self.method == "comparisons":
            all_examples = examples_of_comparisons(self, ctx, out, ranked)
        elif self.method == "judgements":
            all_examples = examples_of_judgements(self, ctx, out, ranked, self._reward(ctx))
        else:
            all_examples = examples_of_ranks(self, ctx, ranked, self._reward(ctx))
        # 3. keep those that fit into the model, thinned
        limit = ctx.limit(None)
        fitting = [e for e in all_examples.examples if limit is None or e.length <= limit]
        kept_ids = thinned(
            {e.demonstration.id: e.score for e in fitting},
            seed=ctx.seed,
            max_share=self.max_score_share,
            max_per_score=self.max_per_score,
            scores=all_examples.scores,
        )
        kept = [e for e in fitting if e.demonstration.id in kept_ids]
        if ctx.runtime.is_main:
            out.append([e.demonstration for e in kept])
        out.merge(Demonstration)
        # 4. log metrics; raise an error if too few are kept
        self._report(ctx, out, ranked, all_examples, fitting, kept)

    def _report(
        self,
        ctx: Context,
        out: StageDir,
        ranked: Sequence[RankedPrompt],
        all_examples: Examples,
        fitting: Sequence[Example],
        kept: Sequence[Example],
    ) -> None:
        """Log how many examples there were and how many are kept, and their scores before and after
        thinning.

        Raises JudgeError or DataError if fewer than min_kept are kept.
        """
        candidates = [c for r in ranked for c in r.candidates]
        too_long = len(all_examples.examples) - len(fitting)
        before, after = histogram(all_examples, fitting), histogram(all_examples, kept)
        metrics: dict[str, Any] = {
            "eft/instructions": len(ranked),
            "eft/replies": len(candidates),
            **all_examples.metrics,
        }
        if all_examples.judgements:
            metrics |= judge_metrics(candidates, list(all_examples.judgements.values()))
        metrics |= {"eft/too_long": too_long, "eft/kept": len(kept)}
        metrics |= {"eft/scores_before": before, "eft/scores_after": after}
        out.log({"step": 0, **metrics})
        out.summary |= {"demonstrations": len(kept), "metrics": metrics}
        words = all_examples.words
        if too_long:
            words += f", {too_long} of them too long for the model"
        words += f"; {len(kept)} kept"
        if before:
            words += (
                f". {all_examples.teaches} before thinning: {in_words(before)}; "
                f"after: {in_words(after) or 'none'}"
            )
        if len(kept) < self.min_kept:
            raise all_examples.error(
                f"{ctx.stage}: {words}, and min_kept is {self.min_kept}.{all_examples.advice} "
                f"All records made so far are kept in {out.path}."
            )
        logger.log(logging.INFO if kept else logging.WARNING, "%s: %s", ctx.stage, words)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        changes = {
            "judging": self.judging.shortened(MIN_ANSWER_TOKENS),
            "num_judgements": 1,
            "min_kept": 0,
        }
        self.model_copy(update=changes).run(ctx, out)

    def work(self, counting: Counting) -> Work:
        data = counting.data(self.ranked_dataset, ranked_lengths)
        lengths, compares = data.lengths, self.method == "comparisons"
        # 1. what is judged: replies, or pairs of replies with different ranks
        count = Range(2 * data.rows.least)  # each row has at least two replies
        if compares:
            replies = 2 if lengths is None else lengths.answers
            count = Range(data.rows.least, data.rows.times(replies * (replies - 1) / 2).most)
        elif lengths is not None:  # as many in each row as in those measured
            count = data.rows.times(lengths.answers)
        # 2. tokens of the prompt and replies in a judge prompt
        tokens, longest, replies_shown = UNKNOWN, None, 2 if compares else 1
        if lengths is not None:
            tokens = Range.of(round(lengths.prompt + replies_shown * lengths.answer))
            longest = lengths.longest_prompt + replies_shown * lengths.longest_answer
        # 3. judgements
        asks = counting.rewards.get(self.self_reward_config_keyname)
        if compares:
            asks = self.written_comparison()
        elif asks is not None and self.method == "judgements":
            asks = asks.as_written()
        judgements, answers = Asking(), Asking(count)
        if self.method != "ranks":
            settings = (asks, self.judging, answers, self.attempts, tokens, longest)
            judgements = counting.judgements(*settings)
        # 4. what an example teaches: a judgement, or the score alone
        rubric, _ = counting.rubric(asks)
        taught = new_tokens(self.judging)
        if self.method == "ranks" and isinstance(asks, RewardConfig):
            stated = asks.reward_regex_template
            taught = UNKNOWN if stated is None else counting.sizes([stated])
        return Work(
            data.rows,
            prompt_tokens(lengths, counting.max_len),
            judgements=judgements,
            made=Range(0, count.most),
            example=UNKNOWN if rubric is None else tokens + Range.of(rubric) + taught,
        )

    @property
    def attempts(self) -> int:
        """How many judgements each reply, or each pair of replies, gets."""
        return self.num_judgements or (15 if self.method == "comparisons" else 3)

    def written_comparison(self) -> ComparisonConfig:
        """The comparison prompt, set so that the judge writes out its judgement as text."""
        changes = {"score_mode": "sampled", "forced_ending": False}
        return (self.comparison or ComparisonConfig()).model_copy(update=changes)

    def reward_names(self) -> tuple[str, ...]:
        return () if self.method == "comparisons" else (self.self_reward_config_keyname,)

    def _reward(self, ctx: Context) -> RewardConfig:
        """The reward prompt, set so that the judge writes out its judgement as text."""
        name = self.self_reward_config_keyname
        return ctx.rewards_named((name,))[name].as_written()


def ranked_replies(row: Any, where: str, record_id: str, ctx: Context) -> RankedReplies:
    """Read a row of the dataset. Raises DataError or TokenizerError if it is no usable ranking."""
    replies = replace(ranked_row(row, where), id=record_id)
    as_candidates(replies, ctx.tokens, where=where)
    return replies


def examples_of_judgements(
    stage: BuildEFTConfig,
    ctx: Context,
    out: StageDir,
    ranked: Sequence[RankedPrompt],
    reward: RewardConfig,
) -> Examples:
    """For each reply, teach its first judgement that agrees with people (arXiv:2401.10020, 3.1.1).

    Replies without such a judgement give no example.
    """
    # 1. judge each reply several times
    judge = SelfJudge(reward, stage.judging, stage.attempts)
    questions = [
        [Question(i, (c.id,), judge_prompt(judge, r, c)) for i in judge.judgement_ids([c])]
        for r in ranked
        for c in r.candidates
    ]
    judgements = ask(ctx, out, judge.asker, questions)
    # 2. take for each reply the first attempt whose scores are in the human order
    examples: list[Example] = []
    for r in ranked:
        judgements_KG = [
            [judgements[f"{c.id}/j{k}"] for c in r.candidates] for k in range(stage.attempts)
        ]
        scores_KG = [[None if j.is_cut else j.score for j in attempt] for attempt in judgements_KG]
        attempts = first_agreeing(r.row.ranks, scores_KG, accept=stage.accept)
        for place, (candidate, k) in enumerate(zip(r.candidates, attempts, strict=True)):
            if k is not None:
                judgement = judgements_KG[k][place]
                assert judgement.score is not None and judgement.text is not None
                examples.append(
                    example(
                        ctx,
                        reply_id(r, candidate),
                        prompt=judge_prompt(judge, r, candidate),
                        target=judgement.text,
                        score=judgement.score,
                        parents=(r.row.id, candidate.id, judgement.id),
                    )
                )
    # 3. count the judgements that could be read and that agree
    readable = {j.candidate_ids[0] for j in judgements.values() if j.score is not None}
    words = (
        f"{replies_in_words(ranked)}, {len(readable)} with a score that could be read, "
        f"{len(examples)} in agreement with people"
    )
    advice = (
        f"\n{unread_texts(judgements)}"
        f"Change one of these: {setting('method', 'ranks')}, which makes scores of the ranks and "
        "needs no "
        "judge, for a model that cannot judge yet; more num_judgements; "
        f"{setting('accept', 'reply')}, which asks less; judging.max_new_tokens, if the texts are "
        "cut off; or the reward prompt's "
        "reward_regex_template, if they state their scores in another form."
    )
    metrics = {"eft/parsed": len(readable), "eft/agreed": len(examples)}
    return Examples(examples, judgements, metrics, words, advice)


def examples_of_ranks(
    stage: BuildEFTConfig, ctx: Context, ranked: Sequence[RankedPrompt], reward: RewardConfig
) -> Examples:
    """For each reply, teach the score that its rank stands for; no model is asked."""
    judge, targets = SelfJudge(reward, stage.judging, 1), score_targets(reward, ctx.stage)
    examples: list[Example] = []
    for r in ranked:
        scores = scores_of_ranks(r.row.ranks, tuple(targets))
        for candidate, score in zip(r.candidates, scores, strict=True):
            examples.append(
                example(
                    ctx,
                    reply_id(r, candidate),
                    prompt=judge_prompt(judge, r, candidate),
                    target=targets[score],
                    score=score,
                    parents=(r.row.id, candidate.id),
                )
            )
    advice = (
        " The judge prompt with a reply and its score must have "
        f"room in the model's {ctx.limit(None)} tokens; use a shorter reward prompt "
        "or shorter replies."
    )
    return Examples(examples, {}, {}, replies_in_words(ranked), advice, DataError)


@dataclass(frozen=True)
class RankedPair:
    """Two replies of which people prefer one, in the order in which the judge sees them."""

    id: str
    of: RankedPrompt
    first: Candidate
    second: Candidate
    better_first: bool

    def questions(self, judge: PairwiseJudge, attempts: int) -> list[Question]:
        """The questions to the judge: the same one for each attempt."""
        ids, text = (self.first.id, self.second.id), self.judge_prompt(judge)
        return [Question(f"{self.id}/j{k}", ids, text) for k in range(attempts)]

    def judge_prompt(self, judge: PairwiseJudge) -> str:
        """The text that the judge reads."""
        prompt = self.of.prompt.text or ""
        return judge.render(prompt, self.first.text or "", self.second.text or "")

    def is_right(self, judgement: Judgement) -> bool:
        """Whether the judge names the better reply, in a whole text; a tie is not right."""
        return not judgement.is_cut and judgement.score == float(self.better_first)


def examples_of_comparisons(
    stage: BuildEFTConfig, ctx: Context, out: StageDir, ranked: Sequence[RankedPrompt]
) -> Examples:
    """For each pair of replies with different ranks, teach the first judgement with the right
    verdict (rejection sampling, arXiv:2408.02666, 3.3).

    Pairs without such a judgement give no example.
    """
    # 1. judge each pair several times, always in the same order
    comparison, attempts = stage.written_comparison(), stage.attempts
    judge = PairwiseJudge(comparison, stage.judging)
    pairs = ranked_pairs(ranked, ctx.seed)
    judgements = ask(ctx, out, judge.asker, [p.questions(judge, attempts) for p in pairs])
    # 2. take for each pair the first right verdict
    examples: list[Example] = []
    readable: dict[str, list[Judgement]] = {}
    for pair in pairs:
        pair_judgements = [judgements[f"{pair.id}/j{k}"] for k in range(attempts)]
        readable[pair.id] = [j for j in pair_judgements if j.score is not None]
        right = next((j for j in pair_judgements if pair.is_right(j)), None)
        if right is not None:
            assert right.score is not None and right.text is not None
            examples.append(
                example(
                    ctx,
                    pair.id,
                    prompt=pair.judge_prompt(judge),
                    target=right.text,
                    score=right.score,
                    parents=(pair.of.row.id, *right.candidate_ids, right.id),
                )
            )
    # 3. count the pairs with a readable and with a right verdict
    metrics: dict[str, Any] = {
        "eft/pairs": len(pairs),
        "eft/parsed": sum(map(bool, readable.values())),
        "eft/agreed": len(examples),
    }
    words = (
        f"{amount(len(pairs), 'pair')} of {amount(len(ranked), 'instruction')}, "
        f"{metrics['eft/parsed']} with a verdict that could be read, "
        f"{len(examples)} with a right one"
    )
    # 4. a judge that does not prefer a place is right equally often in both
    for place, better_first in (("first", True), ("second", False)):
        are_right = [
            pair.is_right(judgement)
            for pair in pairs
            if pair.better_first == better_first
            for judgement in readable[pair.id]
        ]
        if are_right:
            share = sum(are_right) / len(are_right)
            metrics[f"eft/right_better_{place}"] = share
            words += f" ({share:.0%} right where the better is shown {place})"
    advice = (
        f"\n{unread_texts(judgements)}"
        "Change one of these: more num_judgements; a higher judging.temperature; "
        "judging.max_new_tokens, if the texts are cut off; comparison.verdict_prefix, if they "
        f"state their verdicts in another form; {setting('max_score_share', None)}, which keeps "
        "all, if the "
        "judge names one place alone; or train the model on judge examples first "
        f"({setting('method', 'ranks')} needs no judge)."
    )
    return Examples(
        examples,
        judgements,
        metrics,
        words,
        advice,
        label=lambda score: comparison.labels[score == 0.0],
        teaches="Verdicts",
        scores=(0.0, 1.0),
    )


def ranked_pairs(ranked: Sequence[RankedPrompt], seed: int) -> list[RankedPair]:
    """All pairs of replies to one prompt with different ranks.

    Half of the pairs, chosen by a hash of the seed and their ids, show the better reply first.
    """
    pairs: dict[str, tuple[RankedPrompt, Candidate, Candidate]] = {}
    for r in ranked:
        for i, j in combinations(range(len(r.candidates)), 2):
            if r.row.ranks[i] != r.row.ranks[j]:
                better, worse = sorted((i, j), key=lambda place: r.row.ranks[place])
                pair = (r, r.candidates[better], r.candidates[worse])
                pairs[f"{r.prompt.id}/{better}/vs/{worse}"] = pair
    by_hash = sorted(pairs, key=lambda i: (stable_hash(seed, "order", i), i))
    better_first = set(by_hash[::2])
    return [
        RankedPair(pair_id, r, better, worse, True)
        if pair_id in better_first
        else RankedPair(pair_id, r, worse, better, False)
        for pair_id, (r, better, worse) in pairs.items()
    ]


def ask(
    ctx: Context, out: StageDir, asker: Asks, questions: Sequence[Sequence[Question]]
) -> dict[str, Judgement]:
    """Ask the judge what is not on disk yet; returns all judgements by id.

    questions: in groups that read the same judge prompt; each process asks a part of the groups.
    """
    missing_ids = set(out.missing(Judgement, (q.id for group in questions for q in group)))
    missing = [[q for q in group if q.id in missing_ids] for group in questions]
    share = [q for group in ctx.runtime.share([g for g in missing if g]) for q in group]
    label = f"{ctx.stage}: judging"
    with ctx.runtime.progress(len(share), label, "judgement", is_share=True) as bar:
        for _ in out.keep(bar.counting(asker.ask(ctx, share))):
            pass
    out.merge(Judgement)
    return {judgement.id: judgement for judgement in out.read(Judgement)}


def judge_prompt(judge: SelfJudge, ranked: RankedPrompt, candidate: Candidate) -> str:
    """The text that the judge reads to score one reply."""
    return judge.render(ranked.prompt.text or "", candidate.text or "")


def reply_id(ranked: RankedPrompt, candidate: Candidate) -> str:
    """The id of a reply's demonstration: the row's id and the reply's place in the row."""
    return f"{ranked.row.id}/{candidate.id.rsplit('/', 1)[1]}"


def example(
    ctx: Context,
    record_id: str,
    *,
    prompt: str,
    target: str,
    score: float,
    parents: tuple[str, ...],
) -> Example:
    """Build an example.

    prompt: the text that the judge reads. target: the text that it should write. score: the score
    or verdict that the target states. parents: ids of the records that the example is made of.
    """
    rendered = ctx.tokens.prompt(prompt)
    demonstration = Demonstration(
        id=record_id,
        prompt_ids=rendered.ids,
        completion_ids=ctx.tokens.response(prompt, target),
        prompt=rendered.text,
        completion=target,
        parents=parents,
        messages=rendered.messages,
    )
    return Example(demonstration, score)


def replies_in_words(ranked: Sequence[RankedPrompt]) -> str:
    """How many replies and instructions there are, in words."""
    replies = sum(len(r.candidates) for r in ranked)
    return f"{amount(replies, 'reply', 'replies')} to {amount(len(ranked), 'instruction')}"


def unread_texts(judgements: Mapping[str, Judgement]) -> str:
    """Up to three texts of the judge from which no score could be read, to show in an error."""
    unread = [j for j in judgements.values() if j.score is None]
    lines = dict.fromkeys(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in unread)
    texts = "\n".join(islice(lines, 3))
    return f"Texts without a score:\n{texts}\n" if texts else ""


def histogram(all_examples: Examples, examples: Sequence[Example]) -> dict[str, int]:
    """How many of the examples teach each score, by the score's label, lowest score first."""
    counts = Counter(e.score for e in examples)
    return {all_examples.label(score): count for score, count in sorted(counts.items())}


def in_words(counts: Mapping[str, int]) -> str:
    """Counts of scores in words: '3 x 5, 1 x 4'."""
    return ", ".join(f"{count} x {score}" for score, count in counts.items())
