"""The verbs between a release and the Hub: `publish`, `verify` and `convert`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from safesail.cli.app import Json, Release, RunFolder, app

__all__ = ["convert", "publish", "verify"]


@app.command()
def publish(
    folder: RunFolder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be published, and where.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open pull requests in repositories that are there already.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Leave the repositories private.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a release on the Hub; run again, it goes on where it stopped, or finds that nothing has changed.

    Log in first with `hf auth login`. Example:  safesail publish runs/demo --dry-run  then  safesail publish runs/demo
    """
    from safesail.release.plan import plan_publication
    from safesail.release.publish import publish as carry_out

    plan = plan_publication(folder, private=private, create_pr=create_pr)
    if dry_run:
        print(json.dumps(plan.to_json()) if as_json else "\n".join(plan.lines()))
        return
    published = carry_out(plan, say=_nothing if as_json else print)
    print(json.dumps(published.to_json()) if as_json else "\n".join(published.lines()))


@app.command()
def verify(
    release: Release,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Also compute again what can be, with the model that the SAEs read.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Load the base model from here.")] = None,
    revision: Annotated[str | None, typer.Option(help="A tag or commit of a release on the Hub.")] = None,
    as_json: Json = False,
) -> None:
    """Check a release: checksums, schemas, cross-references, and whether its numbers agree; exit status 1 if not.

    Example:  safesail verify runs/demo --recompute
    """
    from safesail.release.verify import lines, to_json
    from safesail.release.verify import verify as check

    findings = check(release, recompute=recompute, model=model, revision=revision)
    print(json.dumps(to_json(findings)) if as_json else "\n".join(lines(findings)))
    raise typer.Exit(1 if any(finding.status == "fails" for finding in findings) else 0)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder or Hub id of SAEs, of any format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist yet.")],
    to: Annotated[
        Literal["safesail", "saelens", "sparsify", "neuronpedia"], typer.Option(help="The format to write.")
    ] = "safesail",
    sae_id: Annotated[str | None, typer.Option(help="Only this SAE of the source.")] = None,
    as_json: Json = False,
) -> None:
    """Convert SAEs between formats, with the measured difference beside the result; what is not exact is refused.

    Examples:  safesail convert EleutherAI/sae-pythia-70m-32k pythia  or  safesail convert runs/demo out --to sparsify
    """
    from safesail.release.convert import convert as carry_out

    certificates = carry_out(source, target, to, sae_id, say=_nothing if as_json else print)
    if as_json:
        print(json.dumps([certificate._asdict() for certificate in certificates]))


def _nothing(line: str) -> None:
    """What a verb says meanwhile when only its result is asked for."""
