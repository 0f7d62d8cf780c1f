"""Stages that make their own pairs: sample, judge, pair, then train."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field

from self_rewarding_lm.config import Object, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import check_prompt, prompt_of, read_prompt
from self_rewarding_lm.errors import ConfigError, JudgeError, PairingError
from self_rewarding_lm.judges import FIRST_LOOK, Judge
from self_rewarding_lm.judging import judge_metrics, mean_score
from self_rewarding_lm.pairing import DropCounts, PickPair, best_against_worst, make_pair
from self_rewarding_lm.records import Candidate, Judgement, PreferencePair, Prompt
from self_rewarding_lm.rollout import rollout
from self_rewarding_lm.stages.base import PreferenceConfig
from self_rewarding_lm.store import StageDir

logger = logging.getLogger(__name__)


class SampledPreferenceConfig(PreferenceConfig):
    """DPO on pairs of the model's own responses, ranked by a judge.

    Prompts are worked in blocks of `prompts_per_block`, in their order, until
    `num_generated_preference_pairs` are kept; those are trained on. A later stage with the same
    prompt dataset goes on behind them unless it sets `reuse_prompts`.
    """

    prompt_dataset: Object
    """Texts, `{"prompt": ...}` rows or ids."""
    num_generated_preference_pairs: int | None = Field(default=None, ge=1)
    """None: all that one pass over the prompts gives."""
    num_candidate_responses: int = Field(default=4, ge=2)
    """N of arXiv:2401.10020, 3.1.3."""
    generation: SamplingConfig = SamplingConfig()
    judge: Object = None
    """A Judge of your own in place of the stage's."""
    prompts_per_block: int = Field(default=32, ge=1)
    max_prompt_passes: int | None = Field(default=None, ge=1)
    """Passes over the prompts at most. Default: four times what the pairs need."""
    reuse_prompts: bool = False
    """Begin at the first prompt though an earlier stage used it."""
    min_parse_rate: float = Field(default=0.2, ge=0, le=1)
    """Least share of judgements with a score, checked from the 64th on; 0 turns it off."""
    min_margin: float = Field(default=0.0, ge=0)
    """Least difference of the two scores of a pair."""
    is_valid_reward: Object = None
    """float -> bool; a candidate whose mean score is not valid is left out."""
    is_valid_reward_pair: Object = None
    """(chosen, rejected) scores as scalar tensors -> bool."""
    pick_paired_rewards_fn: Object = None
    """Scores (n,) as a tensor -> indices (2,) of chosen and rejected. Default: best and worst."""

    def build_judge(self, ctx: Context) -> Judge:
        """The stage's judge; `judge=` where that is given."""
        if self.judge is None:
            raise ConfigError(f"{ctx.stage}: give judge=, an object with a judge method.")
        return self.judge

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.judge is not None and not hasattr(self.judge, "judge"):
            raise ConfigError(
                f"{ctx.stage}: judge must have a method judge(ctx, prompts, candidates_PG); got "
                f"{type(self.judge).__name__}."
            )

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        check_prompt(prompt_of(row, where, ctx.tokens)[1], where, ctx.limit(self.max_seq_len))

    def run(self, ctx: Context, out: StageDir) -> None:
        pairs = PairMaker(self, ctx, out).make()
        out.summary["pairs"] = len(pairs)
        out.summary["steps"] = self.fit(ctx, out, self.objective(ctx, out, pairs))

    def picker(self) -> PickPair:
        """How a pair is picked from scores, a user's tensor function as a plain one."""
        function = self.pick_paired_rewards_fn
        if function is None:
            return best_against_worst

        def pick(scores: Sequence[float | None]) -> tuple[int, int]:
            values = [math.nan if score is None else score for score in scores]
            picked = torch.as_tensor(function(torch.tensor(values))).flatten().tolist()
            if len(picked) != 2 or not all(0 <= i < len(scores) for i in picked):
                raise ConfigError(
                    "pick_paired_rewards_fn must return two indices, of the chosen and the "
                    f"rejected of {len(scores)} candidates; got {picked}."
                )
            return int(picked[0]), int(picked[1])

        return pick

    def pair_check(self) -> Callable[[float, float], bool] | None:
        """A user's function of two scalar tensors as one of two floats."""
        function = self.is_valid_reward_pair
        if function is None:
            return None
        return lambda chosen, rejected: bool(function(torch.tensor(chosen), torch.tensor(rejected)))


class PairMaker:
    """Works a stage's prompts block by block; what is on disk already is used again."""

    def __init__(self, config: SampledPreferenceConfig, ctx: Context, out: StageDir) -> None:
        self.config, self.ctx, self.out = config, ctx, out
        self.judge = config.build_judge(ctx)
        self.prompts = {p.id: p for p in out.known(Prompt)}
        self.candidates = _grouped(out.known(Candidate), lambda c: c.prompt_id)
        self.judgements = _grouped(out.known(Judgement), lambda j: j.candidate_ids[0])
        self.scored = self.judged = 0

    def make(self) -> list[PreferencePair]:
        """The stage's pairs, all records of their making on disk."""
        config, ctx, out = self.config, self.ctx, self.out
        wanted = config.num_generated_preference_pairs
        drops, kept, position = DropCounts(), [], ctx.first_prompt
        total = len(ctx.rows["prompt_dataset"])
        passes = config.max_prompt_passes or (4 * math.ceil(wanted / total) if wanted else 1)
        end = position + passes * total
        label = f"{ctx.stage}: pairs"
        with ctx.runtime.progress(wanted or passes * total, label, "pair") as bar:
            while position < end and (wanted is None or len(kept) < wanted):
                block = range(position, min(position + config.prompts_per_block, end))
                found, dropped = self._block(block)
                kept += found
                drops.add(dropped)
                position = block.stop
                bar.update(len(found) if wanted else len(block))
        drops.prompts["surplus"] = drops.kept - len(kept[:wanted])
        kept = kept[:wanted]
        drops.kept = len(kept)
        if ctx.runtime.is_main:
            out.append(kept)
        for record_type in (Prompt, Candidate, Judgement, PreferencePair):
            out.merge(record_type)
        out.summary["next_prompt"] = position
        self._report(drops, wanted)
        return kept

    def _block(self, block: range) -> tuple[list[PreferencePair], DropCounts]:
        """Pairs of a block's prompts in their order, the same list on every process."""
        mine = [self._prompt(place) for place in self.ctx.runtime.share(list(block))]
        self._sample(mine)
        unreadable = self._judge(mine)
        drops, pairs = DropCounts(), []
        for prompt in mine:
            pair = self._pair(prompt, drops)
            pairs += [pair] if pair is not None else []
        failures = [text for text in self.ctx.runtime.gather([unreadable]) if text]
        if failures:
            raise JudgeError(failures[0])
        found = self.ctx.runtime.gather([(pairs, drops)])
        merged = DropCounts()
        for _, part in found:
            merged.add(part)
        order = {self._prompt_id(place): place for place in block}
        return sorted((p for part, _ in found for p in part), key=lambda p: order[p.id]), merged

    def _prompt_id(self, place: int) -> str:
        passed, row = divmod(place, len(self.ctx.rows["prompt_dataset"]))
        return f"{self.ctx.stage}/{row}/{passed}"

    def _prompt(self, place: int) -> Prompt:
        prompt_id = self._prompt_id(place)
        if prompt_id not in self.prompts:
            rows, row = self.ctx.rows["prompt_dataset"], int(prompt_id.split("/")[-2])
            limit = self.ctx.limit(self.config.max_seq_len)
            self.prompts[prompt_id] = read_prompt(rows, row, prompt_id, self.ctx.tokens, limit)
            self.out.append([self.prompts[prompt_id]])
        return self.prompts[prompt_id]

    def _sample(self, prompts: Sequence[Prompt]) -> None:
        count = self.config.num_candidate_responses
        missing = [p for p in prompts if len(self.candidates.get(p.id, ())) < count]
        for prompt in missing:
            self.candidates[prompt.id] = []
        limit = self.config.max_seq_len
        sampled = rollout(self.ctx, missing, self.config.generation, count, max_seq_len=limit)
        for batch in _batched(sampled):
            self.out.append(batch)
            for candidate in batch:
                self.candidates[candidate.prompt_id].append(candidate)
        for prompt in missing:
            self.candidates[prompt.id].sort(key=lambda c: int(c.id.rsplit("/", 1)[1]))

    def _judge(self, prompts: Sequence[Prompt]) -> str | None:
        """Judge what is not judged; words about an unreadable judge, else None."""
        for prompt in prompts:
            for candidate in self.candidates[prompt.id]:
                self._count(self.judgements.get(candidate.id, ()))
        wanted = getattr(self.judge, "num_judgements", 1)
        missing = [
            p
            for p in prompts
            if any(len(self.judgements.get(c.id, ())) < wanted for c in self.candidates[p.id])
        ]
        groups = [self.candidates[p.id] for p in missing]
        unreadable = self._unreadable()
        if unreadable is not None or not missing:
            return unreadable
        known = {j.id for group in groups for c in group for j in self.judgements.get(c.id, ())}
        for batch in _batched(self.judge.judge(self.ctx, missing, groups)):
            new = [j for j in batch if j.id not in known]
            self.out.append(new)
            for judgement in new:
                self.judgements.setdefault(judgement.candidate_ids[0], []).append(judgement)
            self._count(new)
            unreadable = self._unreadable()
            if unreadable is not None:
                return unreadable
        return None

    def _count(self, judgements: Sequence[Judgement]) -> None:
        self.judged += len(judgements)
        self.scored += sum(j.score is not None for j in judgements)

    def _unreadable(self) -> str | None:
        look = math.ceil(FIRST_LOOK / self.ctx.runtime.world)
        if self.judged < look or self.scored >= self.config.min_parse_rate * self.judged:
            return None
        latest = [j for group in self.judgements.values() for j in group if j.score is None]
        texts = "\n".join(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in latest[:3])
        return (
            f"{self.ctx.stage}: only {self.scored} of {self.judged} judgements "
            f"({self.scored / self.judged:.0%}) gave a score; at least "
            f"{self.config.min_parse_rate:.0%} must. Three of the judge's texts:\n{texts}\n"
            "Change one of these: train the model on judge examples first (an SFT stage); make the "
            "reward prompt's reward_regex_template, score_range or parse_reward fit what the judge "
            "writes; raise judging.max_new_tokens if its texts are cut off; use another "
            "rewarding_model; or lower min_parse_rate. All records made so far are kept in "
            f"{self.out.path}."
        )

    def _pair(self, prompt: Prompt, drops: DropCounts) -> PreferencePair | None:
        candidates = self.candidates[prompt.id]
        scores = {
            c.id: mean_score(j.score for j in self.judgements.get(c.id, ())) for c in candidates
        }
        return make_pair(
            prompt,
            candidates,
            scores,
            drops,
            pick=self.config.picker(),
            is_valid_score=self.config.is_valid_reward,
            is_valid_pair=self.config.pair_check(),
            min_margin=self.config.min_margin,
        )

    def _report(self, drops: DropCounts, wanted: int | None) -> None:
        """Metrics of the arrows, and a word where there are too few pairs."""
        kept = drops.kept
        prompts, candidates = self.out.read(Prompt), self.out.read(Candidate)
        judgements = self.out.read(Judgement)
        lengths = [len(c.ids) for c in candidates]
        metrics: dict[str, Any] = {
            "completions/mean_length": sum(lengths) / max(1, len(lengths)),
            "completions/clipped_ratio": sum(c.finished is False for c in candidates)
            / max(1, len(candidates)),
            **judge_metrics(candidates, judgements),
            **drops.metrics(),
        }
        self.out.log({"step": 0, **metrics})
        self.ctx.runtime.log({f"{self.ctx.stage}/{k}": v for k, v in metrics.items()}, 0)
        self.out.summary["metrics"] = metrics
        logger.info(
            "%s: %d prompts, %d candidates, %d judgements, %d pairs; dropped: %s",
            self.ctx.stage,
            len(prompts),
            len(candidates),
            len(judgements),
            kept,
            drops.in_words(),
        )
        if kept == 0:
            raise PairingError(
                f"{self.ctx.stage}: no preference pair could be made from {len(prompts)} prompts. "
                f"Dropped: {drops.in_words()}. 'unfinished' asks for more max_new_tokens; 'tie' "
                "and 'identical' for a higher temperature or more judgements, 'unscored' for a "
                f"judge that can be read. The records are in {self.out.path}."
            )
        if wanted is not None and kept < wanted:
            logger.warning(
                "%s: %d pairs instead of %d after max_prompt_passes over the prompts; training "
                "goes on with these.",
                self.ctx.stage,
                kept,
                wanted,
            )


def _grouped(records: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _batched(records: Any, size: int = FIRST_LOOK) -> Iterator[list[Any]]:
    """Records in lists of `size`, so that the disk is not opened for each."""
    batch = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
