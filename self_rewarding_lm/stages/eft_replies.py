"""Judge examples of single replies: judgements in people's order, or scores made of the ranks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.asking import Question
from self_rewarding_lm.config import RewardConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import DataError, JudgeError
from self_rewarding_lm.judges import SelfJudge
from self_rewarding_lm.records import Candidate, Judgement, Prompt, RankedReplies
from self_rewarding_lm.stages.eft_builder import Builder, Example
from self_rewarding_lm.stages.targets import first_agreeing, score_targets, scores_of_ranks
from self_rewarding_lm.statements import number_text
from self_rewarding_lm.store import StageDir

if TYPE_CHECKING:
    from self_rewarding_lm.stages.eft import BuildEFTConfig


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
