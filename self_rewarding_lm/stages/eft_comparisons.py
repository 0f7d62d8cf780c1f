"""Judge examples of two replies each: comparisons whose verdict is known to be right.

Rejection sampling of Self-Taught Evaluators (arXiv:2408.02666, 3.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.asking import Question
from self_rewarding_lm.comparing import PairwiseJudge
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.records import Candidate, Judgement, RankedReplies
from self_rewarding_lm.sampling import stable_hash
from self_rewarding_lm.stages.eft_builder import Builder, Example
from self_rewarding_lm.store import StageDir

if TYPE_CHECKING:
    from self_rewarding_lm.stages.eft import BuildEFTConfig


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
