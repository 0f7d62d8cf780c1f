"""Temporal self-rewarding: losers of an earlier model, winners of the next (arXiv:2508.06026).

Where a model judges its own responses, best and worst come nearer to each other round by round.
Here the worst may be an earlier model's, and the best that of a model that was trained ahead.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from self_rewarding_lm.context import Context
from self_rewarding_lm.judges.self_judge import SelfJudge, SeveralJudges
from self_rewarding_lm.records import FIRST, Candidate, Judgement, PreferencePair, prompt_id_of
from self_rewarding_lm.runs.run import INITIAL
from self_rewarding_lm.runs.stage_folder import AHEAD, StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import DropCounts, Picker, Rated, ranked
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Counting, Work

ANCHOR, NEXT = "anchor", "next"
"""In ids of candidates, <prompt id>/anchor/<k>: whose they are. Those of the stage's start have no
such word."""


AHEAD_BEFORE = "iteration-0"
"""The folder of the next weights in runs that version 0.1.0 began; now it is AHEAD."""


class AnchoredMaker(PairMaker):
    """Beside the candidates of the present weights there are those of `rejected_from`."""

    config: "TemporalDPOConfig"

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        super().sample(block)
        if self.config.rejected_from is not None and self.ctx.run is not None:  # no rehearsal
            self.sample_from(self.config.rejected_from, ANCHOR, block)

    def sample_from(self, which: str | Path, part: str, block: Sequence[JudgedPrompt]) -> None:
        """Sample missing candidates from other weights, in this process: a server does not hold
        them."""
        missing = self.without_all_candidates(block, f"/{part}")
        if missing:
            with self.ctx.weights(which):
                self.sample_missing(replace(self.ctx, engine=self.ctx.local_engine()), missing)


class FirstMaker(AnchoredMaker):
    """Makes the pairs on which the next weights are trained, <stage>/first/<row>/<pass>."""

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[PreferencePair]:
        stage, row_and_pass = judged.prompt.id.split("/", 1)
        first_id = f"{stage}/{FIRST}/{row_and_pass}"
        return [replace(pair, id=first_id) for pair in super().pair(judged, drops)]


class NextMaker(AnchoredMaker):
    """Makes the pairs of the same prompts when there are candidates of the next weights too."""

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        weights_ahead = next_weights(self.out)
        assert weights_ahead is not None
        self.sample_from(weights_ahead, NEXT, block)

    def candidates_to_judge(self, judged: JudgedPrompt) -> list[Candidate]:
        """The others were judged; judges that see more than one candidate need them."""
        candidates = super().candidates_to_judge(judged)
        if not isinstance(self.judge, SelfJudge | SeveralJudges):
            return candidates
        return [candidate for candidate in candidates if part_of(candidate.id) == NEXT]

    def make_again(self, first_pairs: Sequence[PreferencePair]) -> Sequence[PreferencePair]:
        """The pairs of the prompts that `first_pairs` are of, in their order."""
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
            raise self.nothing_made(len(first_pairs), drops)
        return Groups(out.known(PreferencePair)).in_order(kept_ids)


class TemporalDPOConfig(SelfRewardDPOConfig):
    """Self-rewarding DPO with losers of an earlier model and winners of the next.

    K candidates of each prompt come from the weights of the stage's start, K from `rejected_from`;
    the judge scores all with the weights of the start. The best of the start's own wins against the
    worst of both. With `chosen_from_next` a model is trained on these pairs, which samples K more;
    where the best of them has a higher score it takes the winner's place. The stage's own training
    begins again at its start, on the pairs that came of it. All is kept on disk; the model that was
    trained ahead until the stage is done.
    """

    folder_name: ClassVar[str] = "temporal"
    maker: ClassVar[type[PairMaker]] = AnchoredMaker

    num_candidate_responses: int = Field(default=7, ge=2)
    """K of arXiv:2508.06026, of each model."""
    rejected_from: str | Path | None = INITIAL
    """Whose the losers may be beside the stage's own: "initial", an earlier stage or a path. null:
    nobody's. Its weights are loaded and put back in every block: see prompts_per_block."""
    chosen_from_next: bool = True
    """Train a model ahead, whose responses may take the winners' places."""

    @model_validator(mode="after")
    def _picks_itself(self) -> "TemporalDPOConfig":
        given = {
            "pairing.pick": self.pairing.pick != "best_worst",
            "pairing.length_control": self.pairing.length_control != 0.0,
            "pick_paired_rewards_fn": self.pick_paired_rewards_fn is not None,
            "rounds": self.rounds > 1,
        }
        if any(given.values()):
            words = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"this stage says itself who wins against whom; leave out {words}")
        return self

    def weights_used(self) -> set[str]:
        anchor = self.rejected_from
        return super().weights_used() | (set() if anchor is None else {str(anchor)})

    def picker(self) -> Picker:
        return lambda rated: anchored(rated, self.pairing.tie_break)

    def run(self, ctx: Context, out: StageDir) -> None:
        ahead = 0
        if self.chosen_from_next:
            first = self.made(FirstMaker, ctx, out)
            ahead = self._train_ahead(ctx, out, first)
            with ctx.serving(self.needs(ctx)):
                pairs = NextMaker(self, ctx, out).make_again(first)
        else:
            pairs = self.made(AnchoredMaker, ctx, out)
        pairs = self.trained(ctx, out, pairs)
        objective = self.objective(ctx, out, pairs, round=1)
        steps = self.fit(ctx, out, objective, round=1, first_step=ahead)
        out.summary |= {"pairs": len(pairs), "steps": ahead + steps}

    def work(self, counting: Counting) -> Work:
        models = 1 + (self.rejected_from is not None) + self.chosen_from_next
        work = self.sampled_work(counting, models=models)
        if not self.chosen_from_next or work.training is None:
            return work
        ahead = self.planned_training(work.made, work.training.row)  # no pairs are mixed in
        return replace(work, training=work.training.plus(ahead))

    def _train_ahead(self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]) -> int:
        """Train and save the next weights, and put those of the start back; the planned steps."""
        objective = self.objective(ctx, out, pairs)
        if next_weights(out) is None:
            start = ctx.model.state()
            self.fit(ctx, out, objective)
            out.save_weights(ctx.model, AHEAD)
            ctx.model.module.load_state_dict(start, strict=False)
        return self.planned_steps(len(objective))


def next_weights(out: StageDir) -> Path | None:
    """The file of the weights that were trained ahead, if they were written."""
    return out.weights(AHEAD) or out.weights(AHEAD_BEFORE)


def anchored(rated: Sequence[Rated], tie_break: str) -> list[tuple[Rated, Rated]]:
    """Winner and loser, by the rules of arXiv:2508.06026; nothing where no own candidate is left.

    A winner of the next model stands before the one that it takes the place of.
    """
    own, anchors, ahead = (
        [one for one in rated if part_of(one.candidate.id) == part] for part in ("", ANCHOR, NEXT)
    )
    if not own:
        return []
    best, worst = (one[0] for one in ranked(own, tie_break))
    for low in ranked(anchors, tie_break)[1][:1]:
        worst = low if low.value < worst.value else worst
    later = ranked(ahead, tie_break)[0][:1]
    return [(one, worst) for one in (*later, best) if one is best or one.value > best.value]


def part_of(candidate_id: str) -> str:
    """Whose a candidate is: "anchor", "next", or "" for the weights of the stage's start."""
    own = candidate_id.removeprefix(prompt_id_of(candidate_id)).split("/")
    return own[1] if len(own) > 2 else ""
