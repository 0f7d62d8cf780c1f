"""Which of a prompt's candidates become pairs, as settings. Importing this needs no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from self_rewarding_lm.closed import Config

Rho = Annotated[float, Field(ge=0, le=1)]
Pick = Literal["best_worst", "best_random", "top_bottom", "all_margins"]


class PairingConfig(Config):
    """How pairs are picked from scored candidates (docs/pairs.md).

    A candidate's length is counted in characters of its text, in tokens where it has none.
    """

    pick: Pick = "best_worst"
    """best_worst (arXiv:2401.10020, 2.3); best_random: the best against another one, drawn at
    random; top_bottom: the j-th best against the j-th worst; all_margins: any two, those with the
    greatest difference of scores first."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Pairs of one prompt at most; best_worst gives one."""
    length_control: Rho | tuple[Rho, ...] = 0.0
    """rho of Meta-Rewarding (arXiv:2407.19594, 2.2), for best_worst: of the candidates whose score
    is within rho of the best the shortest wins, of those within rho of the worst the longest loses;
    rho is a share of the spread of scores. A tuple: one a round, the last for all that follow. 0:
    off."""
    length_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Taken off a score for each 1,000 characters; candidates are compared by what is left."""
    max_chosen_length: int | None = Field(default=None, ge=1)
    """No pair with a winner longer than this (2,500 in the first round of arXiv:2407.19594)."""
    min_chosen_score: float | None = Field(default=None, allow_inf_nan=False)
    """Least score of a winner (tau of arXiv:2411.04109)."""
    tie_break: Literal["first", "shorter", "variance"] = "first"
    """Who stands for several of the best or the worst score: the first sampled; the shortest of the
    best and the longest of the worst; the one whose judgements vary least."""
    weight_by_margin: bool = False
    """The difference of its two scores is a pair's weight in the loss (arXiv:2411.04109)."""

    @model_validator(mode="after")
    def _go_together(self) -> "PairingConfig":
        if self.pick == "best_worst" and self.pairs_per_prompt > 1:
            raise ValueError(
                "pick best_worst gives one pair a prompt; for pairs_per_prompt "
                f"{self.pairs_per_prompt} take top_bottom, best_random or all_margins"
            )
        if self.length_control == ():
            raise ValueError("length_control has no value; give a number, or one a round")
        if self.pick != "best_worst" and self.length_control != 0.0:
            raise ValueError(
                f"length_control is a rule for pick best_worst; pick is {self.pick}. A "
                "length_penalty goes with all"
            )
        return self

    @property
    def picks_otherwise(self) -> bool:
        """Whether it says who is picked, other than by default."""
        names = ("pick", "pairs_per_prompt", "length_control", "length_penalty", "tie_break")
        return any(getattr(self, n) != type(self).model_fields[n].default for n in names)

    def of_round(self, round: int) -> "PairingConfig":
        """The settings of one round, from 0 on, with one length_control."""
        if not isinstance(self.length_control, tuple):
            return self
        place = min(round, len(self.length_control) - 1)
        return self.model_copy(update={"length_control": self.length_control[place]})
