"""Pairs of judgements: those of a stage compared by its own model, the best against the worst.

The arithmetic is in `meta`, what the settings mean in `stages.meta`. Knows nothing of training.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.asking import FIRST_LOOK, Asker, Question
from self_rewarding_lm.batching import batched
from self_rewarding_lm.comparing import form_of_comparison
from self_rewarding_lm.context import Context
from self_rewarding_lm.controls import Filled
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges import SelfJudge
from self_rewarding_lm.judging import compile_meta_template
from self_rewarding_lm.meta import (
    battles,
    best_and_worst,
    most_varied,
    position_weights,
    strengths,
    verdict,
)
from self_rewarding_lm.records import Candidate, Judgement, MetaJudgement, PreferencePair, Prompt
from self_rewarding_lm.stages.pair_maker import PairMaker
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.stored import Groups
from self_rewarding_lm.tally import Share

if TYPE_CHECKING:
    from self_rewarding_lm.stages.meta import MetaJudgingConfig, MetaRewardDPOConfig

logger = logging.getLogger(__name__)

NAME = "self:meta"
ADVICE = (
    "Change one of these: train the model on examples of comparing first; make meta_judging's "
    "prompt_template, labels or verdict_prefix fit what it writes, or set its forced_ending; raise "
    "meta_judging.sampling.max_new_tokens if its texts are cut off; lower min_parse_rate; or set "
    "train_judge=False."
)


@dataclass(frozen=True)
class _Compared:
    """What is compared of a prompt: judgements of one candidate, each text once."""

    prompt: Prompt
    candidate: Candidate
    judgements: list[Judgement]


class JudgePairMaker(PairMaker):
    """Compares the judgements of a stage whose responses are judged, and makes pairs of them.

    What is on disk already is used again. All processes make the same pairs.
    """

    config: "MetaRewardDPOConfig"

    def __init__(self, config: "MetaRewardDPOConfig", ctx: Context, out: StageDir) -> None:
        super().__init__(config, ctx, out)
        self.asker = meta_asker(config.meta_judging)
        self.render_meta = compile_meta_template(
            config.meta_judging.prompt_template, auto_dedent=config.meta_judging.auto_dedent
        )
        self.known_meta = Groups(out.known(MetaJudgement), _prompt_of)
        self.dropped: Counter[str] = Counter()
        self.followed = Share()
        """Of verdicts on judgements with different scores those for the higher one."""

    def make_beside(self, actor_pairs: int) -> list[str]:
        """Ids of the stage's judge pairs, on disk with the comparisons that they are made of.

        actor_pairs: how many pairs of responses they are trained with. Raises JudgeError where too
        few comparisons can be read.
        """
        prompts, out = list(self.known_prompts.records.ids()), self.out
        self._compare_all(prompts)
        out.merge(MetaJudgement)
        self.known_meta = Groups(out.known(MetaJudgement), _prompt_of)
        verdicts = Counter(
            None if told.score is None else verdict(told.score) for told in self.known_meta.records
        )
        weights = position_weights(verdicts[1], verdicts[-1])
        kept, share = list[str](), self.config.judge_share
        most = None if share is None else int(share * actor_pairs / (1 - share) + 1e-9)
        new = (p for p in self._pairs(prompts, weights, most, kept) if p.id not in self.known_made)
        if self.ctx.runtime.is_main:
            out.append(new)
        else:
            deque(new, maxlen=0)
        out.merge(PreferencePair)
        self._tell(verdicts, len(kept))
        return kept

    def rehearse(self) -> tuple[Prompt, list[Candidate], list[Any]]:
        """The same of a judgement, which is compared with itself and would be both sides."""
        prompt, candidates, _ = super().rehearse()
        told = self.judgements[prompt.id][0]
        judged = next(c for c in candidates if c.id == told.candidate_ids[0])
        compared = _Compared(prompt, judged, [told, told])
        (answer,) = self.asker.ask(self.ctx, list(self._questions(compared))[:1])
        if answer.reason == "too_long":
            raise JudgeError(
                f"{self.ctx.stage}: the meta-judge's prompt with the shortest prompt "
                f"({len(prompt.ids)} tokens) and two judgements of at most "
                f"{self.config.judging.max_new_tokens} tokens leaves no room to answer. Use a "
                "shorter meta_judging.prompt_template or reward prompt."
            )
        return prompt, candidates, [self._judge_pair(compared, (0, 0), (0.0, 0.0))]

    def _compare_all(self, prompts: Sequence[str]) -> None:
        """Have all judgements compared that are not, block by block."""
        config, ctx = self.config, self.ctx
        told = config.num_sampled_reward_responses
        each = min(told, config.max_judgements_compared or told)
        words = "%s: judgements of %d prompts are compared, in up to %d comparisons"
        logger.info(words, ctx.stage, len(prompts), len(prompts) * each * (each - 1))
        with ctx.runtime.progress(len(prompts), f"{ctx.stage}: comparing", "prompt") as bar:
            for start in range(0, len(prompts), config.prompts_per_block):
                block = list(prompts[start : start + config.prompts_per_block])
                failure = self._compare(ctx.runtime.share(block))
                failures = [text for text in ctx.runtime.gather([failure]) if text]
                if failures:
                    raise JudgeError(failures[0])
                bar.update(len(block))

    def _compare(self, prompts: Sequence[str]) -> str | None:
        """Compare what is not compared of some prompts; words on verdicts that cannot be read."""
        questions: list[Question] = []
        for prompt_id in prompts:
            compared, known = self._compared(prompt_id), self.known_meta[prompt_id]
            self.watcher.count(known)
            ids = {told.id for told in known}
            if compared is not None:
                questions += [q for q in self._questions(compared) if q.id not in ids]
        answers = self.asker.ask(self.ctx, questions) if questions else ()
        for batch in batched(self.ctx.runtime.stopping.between(answers), FIRST_LOOK):
            new = [_as_meta(told) for told in batch]
            self.out.append(new)
            self.watcher.count(new)
            if (failure := self._see_parsed()) is not None:
                return failure
        return self._see_parsed()

    def _see_parsed(self) -> str | None:
        return self.watcher.see_parsed(
            self.ctx.stage, self.out.path, noun="comparisons of judgements", advice=ADVICE
        )

    def _compared(self, prompt_id: str) -> _Compared | None:
        """What is compared of a prompt; None where no response's judgements differ."""
        told: dict[str, list[Judgement]] = {}
        for judgement in sorted(self.known_judgements[prompt_id], key=_number):
            told.setdefault(judgement.candidate_ids[0], []).append(judgement)
        candidates = sorted(self.known_candidates[prompt_id], key=lambda c: _last(c.id))
        scores = [[j.score for j in told.get(c.id, ())] for c in candidates]
        picked = most_varied(scores)
        if picked is None:
            return None
        texts: dict[str, Judgement] = {}
        for judgement in told[candidates[picked].id]:
            if judgement.score is not None and judgement.text is not None:
                texts.setdefault(judgement.text.strip(), judgement)
        found = list(texts.values())[: self.config.max_judgements_compared]
        return _Compared(self.known_prompts[prompt_id][0], candidates[picked], found)

    def _asked(self, compared: _Compared) -> Filled:
        """What the judge was asked."""
        assert isinstance(self.judge, SelfJudge)
        shown = self._shown(compared.candidate)
        return self.judge.render(compared.prompt.text or "", shown.text or "")

    def _questions(self, compared: _Compared) -> Iterator[Question]:
        asked = self._asked(compared)
        for one, other in permutations(compared.judgements, 2):
            text = self.render_meta(asked, one.text or "", other.text or "")
            yield Question(_id(one, other), (one.id, other.id), text)

    def _pairs(
        self,
        prompts: Sequence[str],
        weights: tuple[float, float],
        most: int | None,
        kept: list[str],
    ) -> Iterator[PreferencePair]:
        """The judge pairs of prompts, at most so many; their ids are put into `kept`."""
        for prompt_id in prompts:
            pair = self._pair(prompt_id, weights)
            if pair is not None and len(kept) == most:
                self._drop("surplus")
            elif pair is not None:
                kept.append(pair.id)
                yield pair

    def _pair(self, prompt_id: str, weights: tuple[float, float]) -> PreferencePair | None:
        """A prompt's judge pair; None where it is dropped, which is counted by its reason."""
        compared = self._compared(prompt_id)
        if compared is None:
            return self._drop("unvaried")
        own, found = compared.judgements, {j.id: j for j in self.known_meta[prompt_id]}
        verdicts = {
            (m, n): verdict(found[_id(own[m], own[n])].score)
            for m, n in permutations(range(len(own)), 2)
        }
        self._count_followed(own, verdicts)
        strong = strengths(battles(verdicts, len(own), weights))
        picked = best_and_worst(strong)
        if picked is None:
            return self._drop("tie")
        chosen, rejected = (own[i] for i in picked)
        if self.config.drop_equal_scores and chosen.score == rejected.score:
            return self._drop("equal_scores")
        longest = self.config.max_judgement_length
        if longest is not None and len(chosen.text or "") > longest:
            return self._drop("long")
        pair = self._judge_pair(compared, picked, (strong[picked[0]], strong[picked[1]]))
        limit = self.ctx.limit(self.config.max_seq_len)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        return self._drop("no_room") if limit is not None and length > limit else pair

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _count_followed(
        self, own: Sequence[Judgement], verdicts: dict[tuple[int, int], int]
    ) -> None:
        for (m, n), said in verdicts.items():
            one, other = own[m].score, own[n].score
            assert one is not None and other is not None
            if said and one != other:
                self.followed.add(int((one > other) == (said > 0)), 1)

    def _judge_pair(
        self, compared: _Compared, picked: tuple[int, int], strong: tuple[float, float]
    ) -> PreferencePair:
        """The pair as it is trained: what the judge was asked, and two of its answers.

        Judgements are kept as texts, so their ids are those of the text and its end token.
        """
        asked, tokens = self._asked(compared), self.ctx.tokens
        chosen, rejected = (compared.judgements[i] for i in picked)
        rendered = tokens.prompt(asked)
        return PreferencePair(
            id=f"{compared.prompt.id}/judge",
            prompt_ids=rendered.ids,
            chosen_ids=tokens.response(asked, chosen.text or ""),
            rejected_ids=tokens.response(asked, rejected.text or ""),
            prompt=rendered.text,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_id=chosen.id,
            rejected_id=rejected.id,
            chosen_score=strong[0],
            rejected_score=strong[1],
            messages=rendered.messages,
        )

    def _tell(self, verdicts: Counter[int | None], kept: int) -> None:
        """Metrics of the comparisons and the pairs, and a word where they show something wrong."""
        whole, wins = verdicts.total(), verdicts[1] + verdicts[-1]
        read = whole - verdicts[None]
        shares = {
            "meta/parse_rate": (read, whole),
            "meta/tie_rate": (verdicts[0], read),
            "meta/position_bias": (verdicts[1], wins),
            "meta/prefers_higher_score": (self.followed.part, self.followed.whole),
        }
        metrics: dict[str, Any] = {name: part / of for name, (part, of) in shares.items() if of}
        metrics |= {"meta/comparisons": whole, "pairs/judge_kept": kept}
        metrics |= {f"pairs/judge_dropped_{k}": n for k, n in sorted(self.dropped.items()) if n}
        stage, summary = self.ctx.stage, self.out.summary
        self.out.log({"step": 0, **metrics})
        summary["metrics"] = {**summary.get("metrics", {}), **metrics}
        summary["judge_pairs"] = kept
        dropped = ", ".join(f"{n} {k}" for k, n in self.dropped.most_common() if n) or "none"
        level = logging.INFO if kept else logging.WARNING
        words = "%s: %d comparisons of judgements, %d judge pairs; dropped: %s"
        logger.log(level, words, stage, whole, kept, dropped)
        if self.followed.whole >= FIRST_LOOK:
            self.checker.see(
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


def _as_meta(told: Judgement) -> MetaJudgement:
    return MetaJudgement(
        id=told.id,
        judgement_ids=told.candidate_ids,
        judge=told.judge,
        score=told.score,
        reason=told.reason,
        text=told.text,
        source=told.source,
        score_mass=told.score_mass,
    )


def _id(one: Judgement, other: Judgement) -> str:
    return f"{one.id}/vs/{other.id.rsplit('/', 1)[1]}"


def _prompt_of(told: MetaJudgement) -> str:
    """The prompt's id, stage/row/pass, with which a comparison's begins."""
    return "/".join(told.id.split("/")[:3])


def _number(judgement: Judgement) -> int:
    return int(judgement.id.rsplit("/j", 1)[1])


def _last(record_id: str) -> int:
    return int(record_id.rsplit("/", 1)[1])
