"""The verbs that make a release: `run`, one a stage, and `status`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safesail.cli.app import BudgetTokens, BudgetUsd, DryRun, Json, Quiet, RunFolder, app
from safesail.errors import InputError

__all__ = ["budget_of", "make", "print_estimate", "print_plan", "run", "status"]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, as hub/recipes/demo.toml.")],
    out: Annotated[Path | None, typer.Option(help="The run folder (default: runs/<recipe name>).")] = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "build",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a setting: --set train.epochs=2.")] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Go on in a folder of another recipe, redoing what it changes.")
    ] = False,
    dry_run: DryRun = False,
    budget_usd: BudgetUsd = None,
    budget_tokens: BudgetTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a release from a recipe; run again, it goes on where it stopped.

    Example:  safesail run hub/recipes/demo.toml --until select
    """
    from safesail.reward_recipe import load_recipe
    from safesail.run import Run

    loaded = load_recipe(recipe, tuple(set_ or ()))
    _check_stage(Run(out or Path(), loaded), until)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        again = ["safesail", "run", str(recipe), *(["--out", str(out)] if out else [])]
        again += ["--until", until] if until != "build" else []
        again += ["--adopt"] if adopt else []
        again += [part for setting in set_ or [] for part in ("--set", setting)]
        print_plan(Run(folder, loaded), until, as_json, again)
        return
    started = Run.create(folder, loaded, adopt=adopt)
    make(started, until, quiet, as_json, budget=budget_of(started, budget_usd, budget_tokens))


def _of_kind(opened: Any, stage: str) -> Any:
    """The run, if it is made of stages that have verbs of their own and this is one; else an InputError says how."""
    from safesail.reward_recipe import RewardRecipe

    if isinstance(opened.recipe, RewardRecipe) and stage != "build":
        raise InputError(
            f"{opened.folder} is the run of a reward model; its stages are made with `safesail reward {opened.folder} "
            f"--until {stage if stage in opened.stages else 'STAGE'}` ({', '.join(opened.stages)})."
        )
    return opened


def _planned_stage_command(name: str, what: str) -> None:
    @app.command(name, help=f"{what}\n\nExample:  safesail {name} runs/demo --dry-run")
    def stage(
        folder: RunFolder,
        force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is done.")] = False,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from safesail.run import Run

        if dry_run:
            again = ["safesail", name, str(folder), *(["--force"] if force else [])]
            print_plan(_of_kind(Run.open(folder), name), name, as_json, again, force)
        else:
            make(_of_kind(Run.open(folder), name), name, quiet, as_json, force)


def _asking_stage_command(name: str, what: str) -> None:
    @app.command(
        name,
        help=f"{what}\n\nExample:  safesail {name} runs/demo --dry-run  then  safesail {name} runs/demo --budget-usd 5",
    )
    def stage(
        folder: RunFolder,
        force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is done.")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print calls, tokens and cost.")] = False,
        budget_usd: BudgetUsd = None,
        budget_tokens: BudgetTokens = None,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from safesail.run import Run

        opened = _of_kind(Run.open(folder), name)
        if dry_run:
            print_estimate(opened, name, as_json)
        else:
            make(opened, name, quiet, as_json, force, budget_of(opened, budget_usd, budget_tokens))


def _stage_command(name: str, what: str) -> None:
    @app.command(name, help=f"{what}\n\nExample:  safesail {name} runs/demo")
    def stage(
        folder: RunFolder,
        force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is done.")] = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from safesail.run import Run

        make(_of_kind(Run.open(folder), name), name, quiet, as_json, force)


for _command, _name, _what in (
    (_planned_stage_command, "harvest", "Read the texts and write the model's activations at the hook points."),
    (_planned_stage_command, "train", "Train the sweep of SAEs on the harvested activations, or on the fly."),
    (_stage_command, "eval", "Measure every SAE's fidelity on held-out texts."),
    (_stage_command, "select", "Choose an SAE per hook point, and its safety-related latents."),
    (_stage_command, "collect", "Collect examples and activation statistics of the chosen latents."),
    (_asking_stage_command, "explain", "Explain the chosen latents and name their domains."),
    (_asking_stage_command, "score", "Score the explanations by simulation."),
    (_stage_command, "build", "Build the release's folders with their cards."),
):
    _command(_name, _what)


@app.command()
def status(folder: RunFolder, as_json: Json = False) -> None:
    """Say which stages are done, stale or missing, and the next command.

    Example:  safesail status runs/demo
    """
    from safesail.pipeline import outside_inputs
    from safesail.run import Run

    opened = Run.open(folder)
    opened.inputs = outside_inputs(opened.recipe)
    states = {name: opened.state(name) for name in opened.stages}
    if as_json:
        print(json.dumps({name: {"state": state, **(opened.record(name) or {})} for name, state in states.items()}))
        return
    width = max(8, *map(len, states))
    for name, state in states.items():
        seconds = (opened.record(name) or {}).get("seconds")
        print(f"{name:{width}} {state:8}" + (f" {seconds:8.1f} s" if seconds is not None else ""))
    waiting = next((name for name, state in states.items() if state != "done"), None)
    if waiting:
        print(f"next: {opened.command(waiting)}")
    else:
        print(f"next: safesail serve {folder}  or  safesail publish {folder} --dry-run")


def make(started: Any, until: str, silent: bool, as_json: bool, force: bool = False, budget: Any = None) -> None:
    from safesail import progress
    from safesail.pipeline import pipeline_of

    progress.quiet(silent or as_json)
    say = (lambda line: None) if silent or as_json else lambda line: print(line, flush=True)
    try:
        pipeline_of(started, say, budget).make(until, force)
    except KeyboardInterrupt:
        print("\nsafesail: stopped. Nothing is lost: the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None
    if not started.ranks.first:  # of torchrun's processes one speaks
        return
    if as_json:
        print(json.dumps(started.record(until)))
    elif "preferences" in started.stages:
        from safesail.cli.reward_tables import print_reward

        print_reward(started, until)
    elif until == "select":
        _print_curve(started)
    elif until in ("explain", "score"):
        _print_statuses(started, until)
    elif until == "build":
        _print_release(started)


def print_plan(planned: Any, until: str, as_json: bool, again: list[str], force: bool = False) -> None:
    """Print the plan of what is still to be made, by the first rank alone; exit status 2 if it cannot fit."""
    from safesail.rewards.preferences import n_pairs
    from safesail.training.plan import next_line, plan_lines, plan_run, waiting

    if planned.ledger.is_file():  # something may be done already
        from safesail.pipeline import outside_inputs

        planned.inputs = outside_inputs(planned.recipe)
    known = n_pairs(planned.recipe, planned.scratch / "preferences")
    plan = plan_run(planned.recipe, planned.folder, waiting(planned, until, force), known)
    if os.environ.get("RANK", "0") == "0":
        lines = [*plan_lines(plan), next_line(plan, again, planned.folder)]
        print(json.dumps(plan.to_json()) if as_json else "\n".join(lines))
    raise typer.Exit(0 if plan.fits else 2)


def budget_of(started: Any, usd: float | None, tokens: int | None) -> Any:
    """The limits of the command line, where one is not given the recipe's."""
    from safesail.interpretation.budget import Budget

    runtime = started.recipe.runtime
    return Budget(runtime.budget_usd if usd is None else usd, runtime.budget_tokens if tokens is None else tokens)


def print_estimate(opened: Any, name: str, as_json: bool) -> None:
    from safesail.interpretation.estimate import estimate_lines
    from safesail.pipeline import pipeline_of

    estimate = pipeline_of(opened).estimate(name)
    print(json.dumps(estimate._asdict()) if as_json else "\n".join(estimate_lines(name, estimate)))


def _print_curve(started: Any) -> None:
    from safesail.release.summary import aligned, candidate_table, curve_lines, selection_table

    curve = [{"sae_id": sae_id, **row} for sae_id, row in started.json_of("select", "selection.json")["curve"].items()]
    print("\nReconstruction loss on held-out documents, and concept contrast, against sparsity:\n")
    print("\n".join(curve_lines(curve)))
    print(f"\n{aligned(*selection_table(curve))}")
    print(f"\n{aligned(*candidate_table(started.json_of('select', 'candidates.json'), started.recipe.select.fdr))}")
    print(f"\nnext: safesail build {started.folder}")


def _print_statuses(started: Any, until: str) -> None:
    from safesail.release.summary import status_lines

    table = started.table_of(until, "explanations.parquet" if until == "explain" else "scores.parquet")
    refused = (started.record(until) or {}).get("refused_by_domain")
    print()
    print("\n".join(status_lines(table, [], refused) if until == "explain" else status_lines([], table)))
    print(f"\nnext: safesail build {started.folder}")


def _print_release(started: Any) -> None:
    from safesail.neurons import NeuronDatabase
    from safesail.release.summary import aligned, domain_table, sae_table, selection_table
    from safesail.repository import read_table
    from safesail.taxonomy import Taxonomy

    print(f"\nThe release is in {started.folder}: saes/ neurons/ examples/ inspector/\n")
    curve = read_table(started.part("neurons") / "selection/train.parquet")
    print(f"{aligned(*sae_table(curve))}\n\n{aligned(*selection_table(curve))}\n")
    neurons = list(NeuronDatabase.load(started.folder))
    print(aligned(*domain_table(neurons, list(Taxonomy.load().domain_ids))))
    print(f"\nnext: safesail serve {started.folder}  or  safesail publish {started.folder} --dry-run")


def _check_stage(planned: Any, name: str) -> None:
    if name not in planned.stages:
        raise InputError(f"--until {name}: there is no such stage; stages are {', '.join(planned.stages)}.")
