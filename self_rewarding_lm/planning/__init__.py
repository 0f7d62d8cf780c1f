"""What a recipe will take: parameters, memory, work, time and disk, without loading weights."""

from self_rewarding_lm.planning.plan import RunPlan, plan_recipe
from self_rewarding_lm.planning.table import bytes_of, plan_json, plan_text

__all__ = ["RunPlan", "bytes_of", "plan_json", "plan_recipe", "plan_text"]
