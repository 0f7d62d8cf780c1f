"""Prompts become pairs: sampled, judged and paired, block by block, each record on disk.

Knows nothing of training; what the settings mean is in `sampled.py`.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import Object, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import BadRows, read_prompt
from self_rewarding_lm.errors import ConfigError, JudgeError, NoPairError
from self_rewarding_lm.judges.asking import FIRST_LOOK
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.consistency import ComparingJudge, ConsistencyConfig
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.tally import JudgeWatcher, StageTally, together
from self_rewarding_lm.records import (
    Candidate,
    Judgement,
    PreferencePair,
    Prompt,
    prompt_id_of,
    stable_hash,
)
from self_rewarding_lm.runs.lines import batched
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups, IdOrder, id_order
from self_rewarding_lm.stages.pairing import (
    DropCounts,
    PairingConfig,
    Picker,
    Rated,
    make_pairs,
    score_variances,
)
from self_rewarding_lm.stages.preference import PreferenceConfig


class PairSettings(PreferenceConfig):
    """How a stage makes its pairs: from prompts to judged candidates, and from these to pairs."""

    prompt_dataset: Object
    """Texts, message lists, ids, `{"prompt": ...}` rows or any row with a prompt part
    (rows.prompt_of); or SelfInstruct(...), which has new prompts written."""
    num_generated_preference_pairs: int | None = Field(default=None, ge=1)
    """None: all that one pass over the prompts gives. With `rounds`: of each."""
    rounds: int = Field(default=1, ge=1)
    """Times that pairs are made and trained on; optimiser and schedule go through all of them."""
    prompts_per_round: int | None = Field(default=None, ge=1)
    """Prompts of each round. None: as many as its pairs need."""
    num_candidate_responses: int = Field(default=4, ge=2)
    """N of arXiv:2401.10020, 3.1.3."""
    generation: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    postprocess_response: Object = None
    """A function str -> str: what judges see of a response in place of its text; what is trained
    stays as it was sampled. Without thoughts, for example:
    `lambda text: re.sub(r"(?s)<think>.*?</think>\\s*", "", text)`."""
    judge: Object = None
    """A Judge of your own in place of the stage's."""
    prompts_per_block: int = Field(default=32, ge=1)
    """Prompts that are worked between two looks at how many pairs there are."""
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
    """Scores (n,) as a tensor -> indices (2,) of chosen and rejected. None: `pairing` picks."""
    pairing: PairingConfig = PairingConfig()
    """Which candidates become pairs. Default: the best against the worst."""
    mix_pairs: tuple[str, ...] = ()
    """Names of earlier stages whose pairs are trained on beside the stage's own."""
    consistency: ConsistencyConfig | None = None
    """Pairs count by how far an earlier model ranks the candidates alike (arXiv:2410.12735)."""

    @model_validator(mode="after")
    def _one_picker(self) -> "PairSettings":
        if self.pick_paired_rewards_fn is not None and self.pairing.picks_otherwise:
            raise ValueError(
                "pick_paired_rewards_fn picks a pair itself; leave it out, or those of pairing's "
                "pick, pairs_per_prompt, length_control, length_penalty and tie_break that are set"
            )
        return self

    def build_judge(self, ctx: Context) -> Judge:
        """The stage's judge; `judge=` where that is given."""
        if self.judge is None:
            raise ConfigError(f"{ctx.stage}: give judge=, an object with a judge method.")
        return make_judge(self.judge)

    def score_scale(self, ctx: Context) -> tuple[float, float] | None:
        """The lowest and the highest score that the judge may give; None where not known."""
        return None

    def picker(self) -> Picker | None:
        """A user's function of scores as a picker; None where the settings pick."""
        function = self.pick_paired_rewards_fn
        if function is None:
            return None

        def pick(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
            scores = torch.tensor([one.score for one in rated])
            picked = torch.as_tensor(function(scores)).flatten().tolist()
            if len(picked) != 2 or not all(0 <= i < len(rated) for i in picked):
                raise ConfigError(
                    "pick_paired_rewards_fn must return two indices, of the chosen and the "
                    f"rejected of {len(rated)} candidates; got {picked}."
                )
            return [(rated[int(picked[0])], rated[int(picked[1])])]

        return pick

    def pair_check(self) -> Callable[[float, float], bool] | None:
        """A user's function of two scalar tensors as one of two floats."""
        function = self.is_valid_reward_pair
        if function is None:
            return None
        return lambda chosen, rejected: bool(function(torch.tensor(chosen), torch.tensor(rejected)))


class PairMaker:
    """Works a stage's prompts block by block; what is on disk already is used again.

    Of a block that is done nothing but counts and ids is kept in memory.
    """

    record_type: ClassVar[type[Any]] = PreferencePair
    noun: ClassVar[str] = "pair"
    """What the prompts give."""

    def __init__(self, config: PairSettings, ctx: Context, out: StageDir) -> None:
        self.config, self.ctx, self.out = config, ctx, out
        self.judge = make_judge(config.build_judge(ctx))
        if config.consistency is not None:
            self.judge = ComparingJudge(self.judge, config.consistency)
        self.known_prompts = Groups(out.known(Prompt))
        self.known_candidates = Groups(out.known(Candidate), lambda c: c.prompt_id)
        self.known_judgements = Groups(out.known(Judgement), _prompt_id_of)
        self.known_made = Groups(out.known(self.record_type))
        self.candidates: dict[str, list[Candidate]] = {}
        """Of the prompts of the block, as are the judgements."""
        self.judgements: dict[str, list[Judgement]] = {}
        self.checker = Checker(config.checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
        self.watcher = JudgeWatcher(
            self.checker, min_parse_rate=config.min_parse_rate, world=ctx.runtime.world
        )
        self.bad = BadRows(config.on_bad_row)
        self.tally = StageTally()

    def make(self) -> Sequence[Any]:
        """The stage's pairs, all records of their making on disk."""
        config, ctx, out = self.config, self.ctx, self.out
        wanted = config.num_generated_preference_pairs
        drops, kept, position = DropCounts(), list[str](), ctx.first_prompt
        total = len(ctx.rows["prompt_dataset"])
        passes = config.max_prompt_passes or (4 * math.ceil(wanted / total) if wanted else 1)
        end = position + (config.prompts_per_round or passes * total)
        label, unit = f"{ctx.stage}: sampling and judging", self.noun if wanted else "prompt"
        with ctx.runtime.progress(wanted or end - position, label, unit) as bar:
            while position < end and (wanted is None or len(kept) < wanted):
                block = range(position, min(position + config.prompts_per_block, end))
                found, dropped = self._block(block)
                drops.add(dropped)
                found = found if wanted is None else found[: wanted - len(kept)]
                if ctx.runtime.is_main:
                    out.append([r for r in found if r.id not in self.known_made])
                kept += [record.id for record in found]
                position = block.stop
                bar.update(len(found) if wanted else len(block))
        bad = self.bad.together(ctx.runtime.gather([self.bad]))
        bad.report(f"{ctx.stage}: prompts", position - ctx.first_prompt, warn=ctx.runtime.is_main)
        drops.prompts["surplus"] = drops.kept - len(kept)
        drops.kept = len(kept)
        for record_type in (Prompt, Candidate, Judgement, self.record_type):
            out.merge(record_type)
        out.summary["next_prompt"] = position
        report_made(self, drops, wanted)
        return Groups(out.known(self.record_type)).in_order(kept)

    def _block(self, block: range) -> tuple[list[Any], DropCounts]:
        """What a block's prompts give, in their order, the same list on every process."""
        asked = self.ctx.runtime.share(list(block))
        mine = self._prompts(asked)
        found, drops = self._worked(mine, len(asked) - len(mine))
        in_order = [found.get(self._prompt_id(place), []) for place in block]
        return [record for records in in_order for record in records], drops

    def _worked(
        self, mine: Sequence[Prompt], bad_rows: int = 0
    ) -> tuple[dict[str, list[Any]], DropCounts]:
        """What prompts of all processes give, by their ids. mine: those of this process."""
        self.candidates = {p.id: sorted(self.known_candidates[p.id], key=_place_of) for p in mine}
        self.judgements = {p.id: self.known_judgements[p.id] for p in mine}
        self._sample(mine)
        unreadable = self._judge(mine)
        drops = DropCounts()
        drops.prompts["bad_row"] += bad_rows
        made = {prompt.id: self._made(prompt, drops) for prompt in mine}
        for prompt in mine:
            candidates, own = self.candidates[prompt.id], self._own(prompt.id)
            self.tally.add(candidates, own, self.judge.scores(candidates, own))
        failure = unreadable or self.watcher.see_scores(self.tally.judge)
        failures = [text for text in self.ctx.runtime.gather([failure]) if text]
        if failures:
            raise JudgeError(failures[0])
        found, merged = dict[str, list[Any]](), DropCounts()
        for part, dropped in self.ctx.runtime.gather([(made, drops)]):
            found |= part
            merged.add(dropped)
        return found, merged

    def rehearse(self) -> tuple[Prompt, list[Candidate], list[Any]]:
        """The shortest prompt, its candidates, and what is made of them where it can be.

        Judgements that cannot be read have scores of the judge's scale instead, if that is known.
        """
        prompts = self._prompts(range(len(self.ctx.rows["prompt_dataset"])))
        if not prompts:  # seeds of new prompts may be longer than a prompt
            prompts = [Prompt(self._prompt_id(0), 0, (0,), self.ctx.tokens.decode((0,)))]
        prompt = min(prompts, key=lambda p: len(p.ids))
        self.candidates, self.judgements = {prompt.id: []}, {prompt.id: []}
        self._sample([prompt])
        failure = self._judge([prompt])
        if failure is not None:
            raise JudgeError(failure)
        told, scale = self.judgements[prompt.id], self.config.score_scale(self.ctx)
        if told and all(j.reason == "too_long" for j in told):
            raise JudgeError(
                f"{self.ctx.stage}: the judge's prompt with the shortest of the first "
                f"{len(prompts)} prompts ({len(prompt.ids)} tokens) and an answer of two tokens "
                "leaves the judge no room to answer. Use a shorter reward prompt."
            )
        found = [replace(c, finished=None) for c in self.candidates[prompt.id]]
        self.candidates[prompt.id] = found
        if scale is not None:
            self.judgements[prompt.id] = [
                replace(j, score=scale[j.candidate_ids[0] == found[0].id], reason=None)
                if j.score is None
                else j
                for j in told
            ]
        return prompt, found, self._made(prompt, DropCounts())

    def _prompt_id(self, place: int) -> str:
        passed, row = divmod(place, len(self.ctx.rows["prompt_dataset"]))
        return f"{self.ctx.stage}/{row}/{passed}"

    def _prompts(self, places: Sequence[int]) -> list[Prompt]:
        """The prompts at some places, without those of bad rows where these are skipped."""
        rows, limit = self.ctx.rows["prompt_dataset"], self.ctx.limit(self.config.max_seq_len)
        found, new = [], []
        for place in places:
            prompt_id = self._prompt_id(place)
            known, row = self.known_prompts[prompt_id], place % len(rows)
            if not known:
                with self.bad.tolerated(rows.where(row)):
                    known = [read_prompt(rows, row, prompt_id, self.ctx.tokens, limit)]
                    new += known
            found += known
        self.out.append(new)
        return found

    def _sample(self, prompts: Sequence[Prompt]) -> None:
        missing = self._unanswered({prompt.id: prompt for prompt in prompts})
        self._answer(self.ctx, missing)

    def _unanswered(self, asked: Mapping[str, Prompt]) -> dict[str, Prompt]:
        """Those that miss candidates, whose ids begin with the key."""
        count = self.config.num_candidate_responses
        found = {}
        for key, prompt in asked.items():
            known = {candidate.id for candidate in self.candidates[prompt.id]}
            if not known.issuperset(f"{key}/{k}" for k in range(count)):
                found[key] = prompt
        return found

    def _answer(self, ctx: Context, asked: Mapping[str, Prompt]) -> None:
        """Sample what is missing of candidates, whose ids begin with the key, and store them."""
        count, limit = self.config.num_candidate_responses, self.config.max_seq_len
        known = {c.id for prompt in asked.values() for c in self.candidates[prompt.id]}
        named = [replace(prompt, id=key) for key, prompt in asked.items()]
        how = self.config.generation
        sampled = ctx.sample(named, how, count, max_seq_len=limit, known=known)
        for batch in batched(sampled, FIRST_LOOK):
            found = [replace(c, prompt_id=asked[c.prompt_id].id) for c in batch]
            self.out.append(found)
            for candidate in found:
                self.candidates[candidate.prompt_id].append(candidate)
        for prompt in asked.values():
            self.candidates[prompt.id].sort(key=_place_of)

    def _judge(self, prompts: Sequence[Prompt]) -> str | None:
        """Judge what is not judged; words about a judge that cannot be used, else None."""
        for prompt in prompts:
            self.watcher.count(self.judgements[prompt.id])
        missing = [p for p in prompts if not self._is_judged(p)]
        groups = [[self._shown(c) for c in self._shown_to_judge(p)] for p in missing]
        failure = self.watcher.see_parsed(self.ctx.stage, self.out.path)
        if failure is not None or not missing:
            return failure
        known = {j.id for p in missing for j in self.judgements[p.id]}
        judged = self.judge.judge(self.ctx, missing, groups)
        for batch in batched(self.ctx.runtime.stopping.between(judged), FIRST_LOOK):
            new = [_finite(j) for j in batch if j.id not in known]
            self.watcher.count(new)
            failure = self.watcher.see_new(new)
            if failure is not None:
                return failure
            self.out.append(new)
            for judgement in new:
                self.judgements.setdefault(_prompt_id_of(judgement), []).append(judgement)
            failure = self.watcher.see_parsed(self.ctx.stage, self.out.path)
            if failure is not None:
                return failure
        return None

    def _is_judged(self, prompt: Prompt) -> bool:
        """Whether a prompt's candidates have all the judgements that the judge makes of them."""
        return self.judge.has_judged(self._given(prompt), self.judgements[prompt.id])

    def _given(self, prompt: Prompt) -> list[Candidate]:
        """A prompt's candidates without those that no server answered."""
        return [c for c in self.candidates[prompt.id] if c.reason is None]

    def _shown_to_judge(self, prompt: Prompt) -> list[Candidate]:
        """The candidates that a prompt's missing judgements are asked of, all of them together."""
        return self._given(prompt)

    def _left(self, prompt: Prompt, drops: DropCounts, least: int) -> list[Candidate]:
        """The same, the others and those that the judge filters out counted; nothing, and the
        prompt counted, where too few are left."""
        left = self._given(prompt)
        missing = Counter(c.reason for c in self.candidates[prompt.id] if c.reason is not None)
        out = self.judge.filtered(left, self.judgements[prompt.id])
        left = [c for c in left if c.id not in out]
        missing += Counter(filtered=len(out))
        drops.candidates.update(missing)
        if missing and len(left) < least:
            drops.prompts[missing.most_common(1)[0][0]] += 1
            return []
        return left

    def _shown(self, candidate: Candidate) -> Candidate:
        """A candidate as judges see it; what is trained stays as it was sampled."""
        function = self.config.postprocess_response
        if function is None or candidate.text is None:
            return candidate
        text = function(candidate.text)
        if not isinstance(text, str):
            raise ConfigError(
                f"{self.ctx.stage}: postprocess_response must return the text that judges shall "
                f"see; got {type(text).__name__} for {candidate.text[:200]!r}."
            )
        if text == candidate.text:
            return candidate
        body = list(candidate.ids)
        while body and body[-1] in self.ctx.tokens.end_ids:
            body.pop()
        ids = (*self.ctx.tokens.encode_data(text), *candidate.ids[len(body) :])
        return replace(candidate, text=text, ids=ids)

    def scores(self, candidates: Sequence[Candidate]) -> dict[str, float | None]:
        """The score of each of one prompt's candidates by its id."""
        return self.judge.scores(candidates, self.judgements[candidates[0].prompt_id])

    def _own(self, prompt_id: str) -> list[Judgement]:
        """A prompt's judgements by the stage's judge, without those that it is compared with."""
        return self.judge.own(self.judgements[prompt_id])

    def _made(self, prompt: Prompt, drops: DropCounts) -> list[Any]:
        """What a prompt gives: its pairs, or nothing."""
        candidates = self._left(prompt, drops, 2)
        if not candidates:
            return []
        found = make_pairs(
            prompt,
            candidates,
            self.scores(candidates),
            drops,
            pairing=self.config.pairing.of_round(0),
            pick=self.picker(),
            noise=lambda record_id: stable_hash(self.ctx.seed, "pairs", record_id),
            variances=score_variances(self.judgements[prompt.id]),
            is_valid_score=self.config.is_valid_reward,
            is_valid_pair=self.config.pair_check(),
            min_margin=self.config.min_margin,
        )
        if not isinstance(self.judge, ComparingJudge):
            return found
        smoothing = self.judge.smoothing(candidates, self.judgements[prompt.id])
        return [replace(pair, label_smoothing=smoothing) for pair in found]

    def picker(self) -> Picker | None:
        """Who picks in place of the stage's `pairing`."""
        return self.config.picker()

    def _nothing_made(self, prompts: int, drops: DropCounts) -> Exception:
        """The error where no prompt gave anything."""
        return NoPairError(
            f"{self.ctx.stage}: no preference pair could be made from {prompts} prompts. "
            f"Dropped: {drops.in_words()}. 'unfinished' asks for more max_new_tokens; 'tie' "
            "and 'identical' for a higher temperature or more judgements, 'unscored' for a "
            f"judge that can be read. The records are in {self.out.path}."
        )


def _prompt_id_of(judgement: Judgement) -> str:
    return prompt_id_of(judgement.candidate_ids[0])


def _place_of(candidate: Candidate) -> IdOrder:
    return id_order(candidate.id)


def _finite(judgement: Judgement) -> Judgement:
    """A judge of the user's own may give any number; NaN and infinity are no score."""
    if judgement.score is None or math.isfinite(judgement.score):
        return judgement
    return replace(judgement, score=None, reason="not_finite")


logger = logging.getLogger(__name__)


def report_made(maker: "PairMaker", drops: DropCounts, wanted: int | None) -> None:
    """Log what all processes sampled, judged, kept and dropped.

    wanted: how many were asked for, None for all. Raises the maker's error where nothing was made.
    """
    ctx, out, noun = maker.ctx, maker.out, maker.noun
    tally = together(ctx.runtime.gather([maker.tally]))
    metrics: dict[str, Any] = {**tally.metrics(), **drops.metrics()}
    out.log({"step": out.first_step, **metrics})
    out.summary["metrics"] = metrics
    logger.info(
        "%s: %d prompts, %d candidates, %d judgements, %d %ss; dropped: %s",
        ctx.stage,
        tally.prompts,
        tally.candidates,
        tally.judgements,
        drops.kept,
        noun,
        drops.in_words(),
    )
    if drops.kept == 0:
        raise maker._nothing_made(tally.prompts, drops)
    made = drops.kept + drops.prompts["surplus"]
    maker.checker.see(
        "pairs_per_prompt",
        made / max(1, tally.prompts),
        f"{tally.prompts} prompts gave {made} {noun}s; dropped: {drops.in_words()}. The most "
        "frequent reason says what to change.",
    )
    if wanted is not None:
        maker.checker.see(
            "few_pairs",
            drops.kept / wanted,
            f"{drops.kept} {noun}s instead of {wanted} after max_prompt_passes over the "
            f"prompts; dropped: {drops.in_words()}. Give more prompts or passes, or change "
            "what the most frequent reason says; training goes on with these by default.",
        )
