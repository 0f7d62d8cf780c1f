"""The judges of the library, a row for each. The public names read these rows.

To add a judge write its file, a subclass of `Judge`, and its row.
"""

from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.certainty import CertaintyJudge
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge
from self_rewarding_lm.judges.implicit import ImplicitJudge
from self_rewarding_lm.judges.reward_model import RewardModelJudge
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.judges.shuffled import ShuffledJudge
from self_rewarding_lm.judges.votes import VoteJudge

JUDGES: tuple[type[Judge], ...] = (
    CertaintyJudge,
    EnsembleJudge,
    FunctionJudge,
    ImplicitJudge,
    ModuleJudge,
    PairwiseJudge,
    RewardModelJudge,
    SelfJudge,
    ServerJudge,
    ShuffledJudge,
    VoteJudge,
)
