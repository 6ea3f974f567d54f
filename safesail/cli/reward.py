"""The verb that makes the stages of SAFER: `reward`."""

from typing import Annotated

import typer

from safesail.cli.app import BudgetTokens, BudgetUsd, DryRun, Json, Quiet, RunFolder, app
from safesail.cli.making import budget_of, make, print_estimate, print_plan
from safesail.errors import InputError

__all__ = ["reward"]


@app.command()
def reward(
    folder: RunFolder,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "build",
    force: Annotated[bool, typer.Option("--force", help="Make that stage anew even if it is done.")] = False,
    dry_run: DryRun = False,
    budget_usd: BudgetUsd = None,
    budget_tokens: BudgetTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with the run of a reward model: train it and its SAE, find its safety latents, edit, retrain, compare.

    The run is started by `safesail run` with a recipe that has preferences, as hub/recipes/safer-demo.toml. With
    `--until rate --dry-run` it says what the ratings will cost. Example:  safesail reward runs/safer-demo --until score
    """
    from safesail.reward_recipe import RewardRecipe
    from safesail.run import Run

    opened = Run.open(folder)
    if not isinstance(opened.recipe, RewardRecipe):
        raise InputError(f"{folder} is not the run of a reward model; its verbs are {', '.join(opened.stages)}.")
    if until not in opened.stages:
        raise InputError(f"--until {until}: there is no such stage; stages are {', '.join(opened.stages)}.")
    if dry_run and until == "rate":
        print_estimate(opened, until, as_json)
    elif dry_run:
        again = ["safesail", "reward", str(folder), "--until", until, *(["--force"] if force else [])]
        print_plan(opened, until, as_json, again, force)
    else:
        make(opened, until, quiet, as_json, force, budget_of(opened, budget_usd, budget_tokens))
