"""Candidates become judgements: a file for each kind of judge, and a row in `kinds.py`.

A judge is given all candidates of a prompt at once. It returns judgements of one candidate or of
two, each with a score or with None and the reason. Knows nothing of pairs, losses or stages. Begin
with `base.py` (what a judge is), then read `self_judge.py` (a model judges), `asking.py` (sample,
read, score) and `parsing.py` (from text to score).
"""

from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.certainty import CertaintyJudge
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
from self_rewarding_lm.judges.implicit import ImplicitJudge
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.reward_model import RewardModelJudge
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.judges.shuffled import ShuffledJudge
from self_rewarding_lm.judges.votes import VoteJudge

__all__ = [
    "CertaintyJudge",
    "EnsembleJudge",
    "FunctionJudge",
    "ImplicitJudge",
    "Judge",
    "ModuleJudge",
    "PairwiseJudge",
    "RewardModelJudge",
    "SelfJudge",
    "ServerJudge",
    "ShuffledJudge",
    "VoteJudge",
    "make_judge",
]
