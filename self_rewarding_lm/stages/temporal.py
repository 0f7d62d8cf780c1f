"""Temporal self-rewarding: losers of an earlier model, winners of the next (arXiv:2508.06026).

If a model judges its own responses, its best and its worst become more alike round by round. Here
the worst may come from an earlier model, and the best from a model that was trained ahead.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from self_rewarding_lm.context import Context
from self_rewarding_lm.judges.self_judge import SelfJudge, SeveralJudges
from self_rewarding_lm.records import (
    FIRST,
    Candidate,
    Judgement,
    PreferencePair,
    Prompt,
    prompt_id_of,
)
from self_rewarding_lm.runs.run import INITIAL
from self_rewarding_lm.runs.stage_folder import AHEAD, StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import DropCounts, Picker, Rated, pairable, ranked
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Counting, Work
from self_rewarding_lm.text import amount

ANCHOR, NEXT = "anchor", "next"
"""Parts of candidate ids, <prompt id>/anchor/<k>, that name the weights which sampled them. Ids of
candidates from the weights of the stage's start have no such part."""


AHEAD_BEFORE = "iteration-0"
"""The folder of the next weights in runs that version 0.1.0 began; other runs have AHEAD."""


class AnchoredMaker(PairMaker):
    """Samples candidates from the present weights and from those of `rejected_from`."""

    config: "TemporalDPOConfig"

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        super().sample(block)
        if self.config.rejected_from is not None and self.ctx.run is not None:  # no rehearsal
            self.sample_from(self.config.rejected_from, ANCHOR, block)

    def learnable(self, judged: JudgedPrompt, drops: DropCounts) -> list[Candidate]:
        return pairable(
            judged.candidates,
            drops,
            may_win=lambda candidate: part_of(candidate.id) != ANCHOR,
            max_chosen_length=self.config.pairing.max_chosen_length,
        )

    def sample_from(self, which: str | Path, part: str, block: Sequence[JudgedPrompt]) -> None:
        """Sample missing candidates from the weights `which`; `part` names them in ids.

        This process samples them, because a server does not hold these weights.
        """
        missing = self.without_all_candidates(block, f"/{part}")
        if missing:
            with self.ctx.weights(which):
                self.sample_missing(replace(self.ctx, engine=self.ctx.local_engine()), missing)


class FirstMaker(AnchoredMaker):
    """Makes the pairs that the next weights are trained on; ids are <stage>/first/<row>/<pass>."""

    def with_known_records(self, prompt: Prompt) -> JudgedPrompt:
        """Without what a stage that was stopped had of the next weights."""
        judged = super().with_known_records(prompt)
        candidates = [c for c in judged.candidates if part_of(c.id) != NEXT]
        judgements = [j for j in judged.judgements if NEXT not in map(part_of, j.candidate_ids)]
        return JudgedPrompt(prompt, candidates, judgements)

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[PreferencePair]:
        stage, row_and_pass = judged.prompt.id.split("/", 1)
        first_id = f"{stage}/{FIRST}/{row_and_pass}"
        return [replace(pair, id=first_id) for pair in super().pair(judged, drops)]


class NextMaker(AnchoredMaker):
    """Makes pairs of the same prompts again, with candidates of the next weights added."""

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        weights_ahead = next_weights(self.out)
        assert weights_ahead is not None
        self.sample_from(weights_ahead, NEXT, block)

    def candidates_to_judge(self, judged: JudgedPrompt) -> list[Candidate]:
        """Only candidates of the next weights, unless the judge needs to see all together."""
        candidates = super().candidates_to_judge(judged)
        if not isinstance(self.judge, SelfJudge | SeveralJudges):
            return candidates
        return [candidate for candidate in candidates if part_of(candidate.id) == NEXT]

    def judged_together(self, judged: JudgedPrompt) -> list[Candidate]:
        """The candidates of the next weights; the others were judged before, in other blocks."""
        return [c for c in super().judged_together(judged) if part_of(c.id) == NEXT]

    def make_again(self, first_pairs: Sequence[PreferencePair]) -> Sequence[PreferencePair]:
        """Make pairs of the prompts of `first_pairs`, and return them in the same order.

        Raises NoPairError if no prompt gives a pair.
        """
        ctx, out, drops, kept_ids, num_replaced = self.ctx, self.out, DropCounts(), list[str](), 0
        size, label = self.config.prompts_per_block, f"{ctx.stage}: next winners"
        with ctx.runtime.progress(len(first_pairs), label, self.noun) as bar:
            for start in range(0, len(first_pairs), size):
                block = first_pairs[start : start + size]
                prompt_ids = [prompt_id_of(pair.chosen_id or "") for pair in block]
                # 1. sample, judge and pair the block's prompts, each process its own
                prompts = [self.known_prompts[i][0] for i in ctx.runtime.share(prompt_ids)]
                by_prompt = self.make_block(prompts, drops)
                # 2. keep the pairs
                pairs = [pair for prompt_id in prompt_ids for pair in by_prompt[prompt_id]]
                self.keep(pairs)
                kept_ids += [pair.id for pair in pairs]
                num_replaced += sum(part_of(pair.chosen_id or "") == NEXT for pair in pairs)
                bar.update(len(block))
        for record_type in (Candidate, Judgement, PreferencePair):
            out.merge(record_type)
        metrics = {"next/replaced": num_replaced, **drops.metrics()}
        out.log({"step": 0, **metrics})
        out.summary["next_replaced"] = num_replaced
        if not kept_ids:
            raise self.nothing_made(amount(len(first_pairs), "prompt"), drops)
        return Groups(out.known(PreferencePair)).in_order(kept_ids)


class TemporalDPOConfig(SelfRewardDPOConfig):
    """Self-rewarding DPO with losers of an earlier model and winners of the next
    (arXiv:2508.06026).

    For each prompt, the weights of the stage's start sample K candidates, and those of
    `rejected_from` sample K more; the judge scores all with the weights of the start. The best
    candidate of the start wins against the worst of both. With `chosen_from_next`, a model is
    trained on these pairs and samples another K; if the best of these has a higher score, it
    replaces the winner. Then the weights of the start are trained on the resulting pairs. All
    records stay on disk; the weights that were trained ahead stay until the stage is done.
    """

    folder_name: ClassVar[str] = "temporal"
    maker: ClassVar[type[PairMaker]] = AnchoredMaker

    num_candidate_responses: int = Field(default=7, ge=2)
    """Responses that each model samples to a prompt, K of arXiv:2508.06026."""
    rejected_from: str | Path | None = INITIAL
    """Weights that also sample candidates, which may be losers: "initial", an earlier stage or a
    path. None: only the stage's own. They are loaded and removed in every block: see
    prompts_per_block."""
    chosen_from_next: bool = True
    """Train a model ahead, whose responses may replace the winners."""

    @model_validator(mode="after")
    def _picks_itself(self) -> "TemporalDPOConfig":
        is_set = {
            "pairing.pick": self.pairing.pick != "best_worst",
            "pairing.length_control": self.pairing.length_control != 0.0,
            "pick_paired_rewards_fn": self.pick_paired_rewards_fn is not None,
            "rounds": self.rounds > 1,
            "candidates_from": self.candidates_from is not None,
        }
        if any(is_set.values()):
            names = ", ".join(name for name, refused in is_set.items() if refused)
            raise ValueError(f"this stage says itself who answers and who wins; leave out {names}")
        return self

    def weights_used(self) -> set[str]:
        anchor = self.rejected_from
        return super().weights_used() | (set() if anchor is None else {str(anchor)})

    def picker(self) -> Picker:
        return lambda rated: anchored(rated, self.pairing.tie_break)

    def run(self, ctx: Context, out: StageDir) -> None:
        """Make pairs, if `chosen_from_next` once more after training ahead, and train on them."""
        ahead = 0
        if self.chosen_from_next:
            # 1. make pairs, and train the next weights on them
            first_pairs = self.made(FirstMaker, ctx, out)
            ahead = self._train_ahead(ctx, out, first_pairs)
            # 2. make the pairs again with candidates of the next weights
            with ctx.serving(self.needs(ctx)):
                pairs = NextMaker(self, ctx, out).make_again(first_pairs)
        else:
            pairs = self.made(AnchoredMaker, ctx, out)
        # 3. train the weights of the start on the pairs
        pairs = self.trained(ctx, out, pairs)
        objective = self.objective(ctx, out, pairs, round=1)
        steps = self.fit(ctx, out, objective, round=1, first_step=ahead)
        out.summary |= {"pairs": len(pairs), "steps": ahead + steps}

    def work(self, counting: Counting) -> Work:
        models = 1 + (self.rejected_from is not None) + self.chosen_from_next
        work = self.sampled_work(counting, models=models)
        if not self.chosen_from_next or work.training is None:
            return work
        ahead = self.planned_training(work.made, work.training.row)  # without mix_pairs
        return replace(work, training=work.training.plus(ahead))

    def _train_ahead(self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]) -> int:
        """Train and save the next weights unless they are on disk, and load the start's again.

        Returns how many steps this training took; in runs of format 1 how many it planned.
        """
        objective = self.objective(ctx, out, pairs)
        if next_weights(out) is None:
            start = ctx.model.state()
            steps = self.fit(ctx, out, objective)
            out.save_weights(ctx.model, AHEAD, steps=steps)
            ctx.model.module.load_state_dict(start, strict=False)
        taken = None if ctx.format == 1 else out.steps_of(AHEAD)
        return taken or self.planned_steps(len(objective))


def next_weights(out: StageDir) -> Path | None:
    """The file of the weights that were trained ahead; None if there is none."""
    return out.weights(AHEAD) or out.weights(AHEAD_BEFORE)


def anchored(rated: Sequence[Rated], tie_break: str) -> list[tuple[Rated, Rated]]:
    """Winner and loser by the rules of arXiv:2508.06026; [] if the start has no candidate.

    If the best candidate of the next weights beats that of the start, the pair with it comes first
    and the pair with the start's best second.
    """
    # 1. candidates by the weights that sampled them
    present, anchors, ahead = (
        [it for it in rated if part_of(it.candidate.id) == part] for part in ("", ANCHOR, NEXT)
    )
    if not present:
        return []
    # 2. the worst of the present and the earlier weights
    best, worst = (order[0] for order in ranked(present, tie_break))
    for lowest in ranked(anchors, tie_break)[1][:1]:
        worst = lowest if lowest.value < worst.value else worst
    # 3. the best of the next weights if it is better, and the best of the present ones
    next_best = ranked(ahead, tie_break)[0][:1]
    return [(it, worst) for it in (*next_best, best) if it is best or it.value > best.value]


def part_of(candidate_id: str) -> str:
    """Which weights sampled a candidate: "anchor", "next", or "" for those of the stage's start."""
    parts = candidate_id.removeprefix(prompt_id_of(candidate_id)).split("/")
    return parts[1] if len(parts) > 2 else ""
