"""The planner: what a recipe takes on this machine, before anything runs, and the settings that fit if it cannot.

machine: what is left and how fast · job: the sweep as counts · work: FLOPs and seconds · space: memory and disk ·
fit: shortages and suggestions · plan: all together · table: the lines a person reads
"""

from safesail.training.plan.plan import Plan, next_line, plan_run, refuse_what_cannot_fit, waiting
from safesail.training.plan.table import plan_lines

__all__ = ["Plan", "next_line", "plan_lines", "plan_run", "refuse_what_cannot_fit", "waiting"]
