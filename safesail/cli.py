"""The command line: one verb a stage. Parses, calls one function, prints."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safesail.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train, select, explain, score and inspect safety sparse autoencoders.\n\n"
    "Example:  safesail run hub/recipes/demo.toml  then  safesail serve runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pairs_app = typer.Typer(help="Concept contrastive query pairs.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what it would take and whether it fits.")]
BudgetUsd = Annotated[
    float | None, typer.Option("--budget-usd", help="Stop before language models cost more dollars than this.")
]
BudgetTokens = Annotated[
    int | None, typer.Option("--budget-tokens", help="Stop before language models use more tokens than this.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/demo.")]


def main() -> None:
    """Run the command line: a person's mistake is one sentence and exit status 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        print(f"safesail: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
    from safesail.recipe import Recipe
    from safesail.run import Run

    loaded = Recipe.load(recipe, tuple(set_ or ()))
    _check_stage(until)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        again = ["safesail", "run", str(recipe), *(["--out", str(out)] if out else [])]
        again += ["--until", until] if until != "build" else []
        again += ["--adopt"] if adopt else []
        again += [part for setting in set_ or [] for part in ("--set", setting)]
        _print_plan(Run(folder, loaded), until, as_json, again)
        return
    started = Run.create(folder, loaded, adopt=adopt)
    _make(started, until, quiet, as_json, budget=_budget(started, budget_usd, budget_tokens))


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
            _print_plan(Run.open(folder), name, as_json, again, force)
        else:
            _make(Run.open(folder), name, quiet, as_json, force)


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

        opened = Run.open(folder)
        if dry_run:
            _print_estimate(opened, name, as_json)
        else:
            _make(opened, name, quiet, as_json, force, _budget(opened, budget_usd, budget_tokens))


def _stage_command(name: str, what: str) -> None:
    @app.command(name, help=f"{what}\n\nExample:  safesail {name} runs/demo")
    def stage(
        folder: RunFolder,
        force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is done.")] = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from safesail.run import Run

        _make(Run.open(folder), name, quiet, as_json, force)


for _name, _what in (
    ("harvest", "Read the texts and write the model's activations at the hook points."),
    ("train", "Train the sweep of SAEs on the harvested activations, or on the fly."),
):
    _planned_stage_command(_name, _what)

for _name, _what in (
    ("eval", "Measure every SAE's fidelity on held-out texts."),
    ("select", "Choose an SAE per hook point, and its safety-related latents."),
    ("collect", "Collect examples and activation statistics of the chosen latents."),
    ("build", "Build the release's folders with their cards."),
):
    _stage_command(_name, _what)

for _name, _what in (
    ("explain", "Explain the chosen latents and name their domains."),
    ("score", "Score the explanations by simulation."),
):
    _asking_stage_command(_name, _what)


@app.command()
def status(folder: RunFolder, as_json: Json = False) -> None:
    """Say which stages are done, stale or missing, and the next command.

    Example:  safesail status runs/demo
    """
    from safesail.pipeline import outside_inputs
    from safesail.run import STAGES, Run

    opened = Run.open(folder)
    opened.inputs = outside_inputs(opened.recipe)
    states = {name: opened.state(name) for name in STAGES}
    if as_json:
        print(json.dumps({name: {"state": state, **(opened.record(name) or {})} for name, state in states.items()}))
        return
    for name, state in states.items():
        seconds = (opened.record(name) or {}).get("seconds")
        print(f"{name:8} {state:8}" + (f" {seconds:8.1f} s" if seconds is not None else ""))
    waiting = next((name for name, state in states.items() if state != "done"), None)
    print(f"next: safesail {waiting} {folder}" if waiting else f"next: safesail serve {folder}")


@app.command()
def inspect(
    release: Annotated[str, typer.Argument(help="A run folder, or the Hub name of a release (org/name).")],
    text: Annotated[str, typer.Argument(help="The text, or with --answer the question.")],
    answer: Annotated[int, typer.Option(help="Ask it as a chat and generate so many tokens.")] = 0,
    top: Annotated[int, typer.Option(help="Neurons shown per token.")] = 2,
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
    as_json: Json = False,
) -> None:
    """Print which safety neurons fire on each token of a text.

    Example:  safesail inspect runs/demo "The terrorists took hostages."
    """
    from safesail.diagnosis.inspector import Inspector

    inspector = Inspector.from_pretrained(release, model=model)
    prompt: Any = [{"role": "user", "content": text}] if answer else text
    inspection = inspector.inspect(prompt, max_new_tokens=answer)
    if as_json:
        print(json.dumps(inspection.to_json(), ensure_ascii=False))
        return
    for line in token_table(inspection, top):
        print(line)


def token_table(inspection: Any, top: int) -> list[str]:
    """The lines of a terminal table: a token each, with its strongest explained neurons."""
    lines = [f"{'token':18} {'act.':>5}  {'neuron':20} {'score':>5} {'trust':9} {'domains':20} explanation"]
    for i, unit in enumerate(inspection.units):
        shown = _visible(unit.text)[:17]
        hits = inspection.hits(i, explained_only=True)[:top]
        if not hits:
            lines.append(f"{shown:18} {'·':>5}  {inspection.note(i)}".rstrip())
        for row, hit in enumerate(hits):
            score = "" if hit.score is None else f"{hit.score:.2f}"
            lines.append(
                f"{shown if row == 0 else '':18} {hit.normalised or 0:5.2f}  {hit.neuron_id:20} {score:>5} "
                f"{hit.trust:9} "
                f"{','.join(hit.domains) or '-':20} {_visible(hit.explanation or hit.status)[:60]}"
            )
    return lines


@app.command()
def serve(
    release: Annotated[str, typer.Argument(help="A run folder, or the Hub name of a release (org/name).")],
    port: Annotated[int, typer.Option(help="The port.")] = 7860,
    host: Annotated[
        str, typer.Option(help="The address; anything but loopback opens it to the network.")
    ] = "127.0.0.1",
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
) -> None:
    """Serve the token inspector of a release.

    Example:  safesail serve runs/demo --port 7861
    """
    import importlib.util

    from safesail.assets import asset

    if importlib.util.find_spec("gradio") is None:
        raise InputError("the Space needs gradio; type `pip install 'safesail[space]'`.")
    os.environ |= {"SAFESAIL_RELEASE": release, "SAFESAIL_HOST": host, "SAFESAIL_PORT": str(port)}
    if model:
        os.environ["SAFESAIL_MODEL"] = model
    sys.path.insert(0, str(asset("space")))
    runpy.run_path(str(asset("space/app.py")), run_name="__main__")


@pairs_app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(help="Jsonl files of concept pairs, or shipped sets such as en.")],
    as_json: Json = False,
) -> None:
    """Check files of concept pairs, each for itself and against each other; exit status 1 if anything is wrong.

    Example:  safesail pairs check en zh mine.jsonl
    """
    from safesail.pairs import check_files
    from safesail.taxonomy import Taxonomy

    problems = check_files(files, Taxonomy.load())
    if as_json:
        print(json.dumps({"files": files, "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"{', '.join(files)}: no problem found")
    raise typer.Exit(1 if problems else 0)


@pairs_app.command("draft")
def draft(
    file: Annotated[Path, typer.Argument(help="A jsonl file of pairs that lack `without`.")],
    out: Annotated[Path, typer.Option(help="The jsonl file of whole pairs; those already in it are kept.")],
    model: Annotated[str, typer.Option(help="The endpoint's model.")],
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint (default: OPENAI_BASE_URL, or OpenAI's own).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a language model draft the twin without the concept; a twin that breaks a rule is named, not written.

    Example:  safesail pairs draft half.jsonl --out mine.jsonl --model qwen --base-url http://127.0.0.1:8000/v1
    """
    from safesail.interpretation.draft import draft_file
    from safesail.interpretation.llm import EndpointBackend, Llm
    from safesail.taxonomy import Taxonomy

    backend = EndpointBackend(model, base_url)
    problems = draft_file(file, out, Llm(backend, out.with_name(f".{out.name}.answers.sqlite")), Taxonomy.load())
    if as_json:
        print(json.dumps({"file": str(out), "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"{out}: every pair has its twin; read them before you use them")
    raise typer.Exit(1 if problems else 0)


def _make(started: Any, until: str, silent: bool, as_json: bool, force: bool = False, budget: Any = None) -> None:
    from safesail import progress
    from safesail.pipeline import Pipeline

    progress.quiet(silent or as_json)
    say = (lambda line: None) if silent or as_json else lambda line: print(line, flush=True)
    try:
        Pipeline(started, say, budget).make(until, force)
    except KeyboardInterrupt:
        print("\nsafesail: stopped. Nothing is lost: the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None
    if not started.ranks.first:  # of torchrun's processes one speaks
        return
    if as_json:
        print(json.dumps(started.record(until)))
    elif until == "select":
        _print_curve(started)
    elif until in ("explain", "score"):
        _print_statuses(started, until)
    elif until == "build":
        _print_release(started)


def _print_plan(planned: Any, until: str, as_json: bool, again: list[str], force: bool = False) -> None:
    """Print the plan of what is still to be made, by the first rank alone; exit status 2 if it cannot fit."""
    from safesail.training.plan import next_line, plan_lines, plan_run, waiting

    if planned.ledger.is_file():  # something may be done already
        from safesail.pipeline import outside_inputs

        planned.inputs = outside_inputs(planned.recipe)
    plan = plan_run(planned.recipe, planned.folder, waiting(planned, until, force))
    if os.environ.get("RANK", "0") == "0":
        lines = [*plan_lines(plan), next_line(plan, again, planned.folder)]
        print(json.dumps(plan.to_json()) if as_json else "\n".join(lines))
    raise typer.Exit(0 if plan.fits else 2)


def _budget(started: Any, usd: float | None, tokens: int | None) -> Any:
    """The limits of the command line, where one is not given the recipe's."""
    from safesail.interpretation.budget import Budget

    runtime = started.recipe.runtime
    return Budget(runtime.budget_usd if usd is None else usd, runtime.budget_tokens if tokens is None else tokens)


def _print_estimate(opened: Any, name: str, as_json: bool) -> None:
    from safesail.interpretation.estimate import estimate_lines
    from safesail.pipeline import Pipeline

    estimate = Pipeline(opened).estimate(name)
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
    print(f"\nnext: safesail serve {started.folder}")


def _check_stage(name: str) -> None:
    from safesail.run import STAGES

    if name not in STAGES:
        raise InputError(f"--until {name}: there is no such stage; stages are {', '.join(STAGES)}.")


def _visible(text: str) -> str:
    """The text in one line, control characters spelled out, so that it cannot move the cursor or hide."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    main()
