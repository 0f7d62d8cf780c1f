"""Candidates become judgements: a file for each kind of judge.

A judge sees all candidates of a prompt at once and returns judgements with scores, comparisons or
None. Knows nothing of pairs, losses or stages. Begin with `base.py` (what a judge is), then
`self_judge.py` (the model judges itself), `asking.py` (sample, read, score) and `parsing.py` (text
to a score).
"""

from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
from self_rewarding_lm.judges.implicit import ImplicitJudge
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.reward_model import RewardModelJudge
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.judges.votes import VoteJudge

__all__ = [
    "EnsembleJudge",
    "FunctionJudge",
    "ImplicitJudge",
    "Judge",
    "ModuleJudge",
    "PairwiseJudge",
    "RewardModelJudge",
    "SelfJudge",
    "ServerJudge",
    "VoteJudge",
    "make_judge",
]
