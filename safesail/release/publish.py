"""Publishing: a plan is checked as a whole, then executed so that it can be interrupted and run again at any request.

New repositories are private; a gate is set before anything is uploaded; nothing becomes public before the checksums of
every file of every repository are those of the plan. Every step looks at what is there and does only what is missing,
so a second run does nothing.
"""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from safesail.errors import InputError
from safesail.release.plan import Plan, RepoPlan, megabytes
from safesail.release.remote import Hub, RemoteRepo, differs, look, may_write, tree

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import Collection

__all__ = ["Published", "PublishedRepo", "publish"]

Standing = dict[str, RemoteRepo | None]
"""What there was of each repository before: {repository id: as it stood, or None}."""
_PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class PublishedRepo(NamedTuple):
    """What became of one repository."""

    repo_id: str
    repo_type: str
    url: str
    state: str
    """created, updated or unchanged; of a pull request: proposed, proposed already or unchanged."""
    commit: str | None
    """The commit that holds the release."""
    tag: str | None
    private: bool
    pull_request: str | None = None
    """The pull request's URL."""


class Published(NamedTuple):
    """What became of a release."""

    repos: list[PublishedRepo]
    collection: str | None
    """The collection's URL; None where only pull requests were asked for."""

    @property
    def urls(self) -> list[str]:
        """The URLs of the repositories."""
        return [repo.url for repo in self.repos]

    @property
    def commits(self) -> dict[str, str]:
        """The new commits: {repository id: commit}."""
        new = ("created", "updated", "proposed")
        return {repo.repo_id: repo.commit for repo in self.repos if repo.state in new and repo.commit}

    def lines(self) -> list[str]:
        """One line a repository, then the collection."""
        width, states = (max(len(text) for text in column) for column in zip(*map(_cells, self.repos), strict=True))
        lines = [
            f"{state:{width}}  {url:{states}}  {_where(repo)}" for repo in self.repos for state, url in [_cells(repo)]
        ]
        return [*lines, *([f"{'collection':{width}}  {self.collection}"] if self.collection else []), *self._notes()]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"repos": [repo._asdict() for repo in self.repos], "collection": self.collection}

    def _notes(self) -> list[str]:
        hidden = any(repo.private for repo in self.repos if repo.repo_type != "space")
        if not (self.collection and hidden and any(repo.repo_type == "space" for repo in self.repos)):
            return []
        return ["The Space reads private repositories: give it a token that may read them, as its secret HF_TOKEN."]


def _cells(repo: PublishedRepo) -> tuple[str, str]:
    return repo.state, repo.pull_request or repo.url


def _where(repo: PublishedRepo) -> str:
    facts = [repo.tag, repo.commit and repo.commit[:12], None if repo.pull_request else _visibility(repo.private)]
    return " · ".join(fact for fact in facts if fact)


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def publish(plan: Plan, *, token: str | None = None, say: Callable[[str], None] = print) -> Published:
    """Execute a plan; again, it goes on where it stopped, and once all is done it changes nothing.

    token: in place of the Hub's own login. say: what takes the lines of progress.
    """
    hub = Hub.login(token, say)
    standing = _check(hub, plan)
    if plan.create_pr:
        return Published([_propose(hub, plan, repo, standing[repo.repo_id]) for repo in plan.repos], None)
    for repo in plan.repos:
        _create(hub, repo, standing[repo.repo_id])
    for repo in plan.repos:
        _gate(hub, repo)
    for repo in plan.repos:
        _upload(hub, plan, repo, standing[repo.repo_id])
    heads = {repo.repo_id: _verify(hub, repo) for repo in plan.repos}
    for repo in plan.repos:
        _tag(hub, plan, repo, standing[repo.repo_id], heads[repo.repo_id])
    collection = hub.ask(f"make the collection “{plan.collection}”", functools.partial(_collect, plan))
    private = {repo.repo_id: _open(hub, plan, repo) for repo in plan.repos}
    if not plan.private:
        hub.ask(f"open the collection {collection.slug}", functools.partial(_open_collection, plan, collection.slug))
    repos = [_result(hub, plan, repo, standing, heads[repo.repo_id], private[repo.repo_id]) for repo in plan.repos]
    _restart(hub, repos)
    return Published(repos, f"{_endpoint(hub)}/collections/{collection.slug}")


def _result(hub: Hub, plan: Plan, repo: RepoPlan, standing: Standing, head: str, private: bool) -> PublishedRepo:
    before = standing[repo.repo_id]
    new = before is None or before.fresh
    state = "created" if new else "unchanged" if before is not None and before.head == head else "updated"
    return PublishedRepo(repo.repo_id, repo.repo_type, _url(hub, repo), state, head, plan.tag, private)


def _endpoint(hub: Hub) -> str:
    return hub.api.endpoint


def _url(hub: Hub, repo: RepoPlan) -> str:
    return f"{_endpoint(hub)}/{_PREFIX[repo.repo_type]}{repo.repo_id}"


# --- before anything is changed -----------------------------------------------------------------------------------


def _check(hub: Hub, plan: Plan) -> Standing:
    """Everything that could stand in the way, for all repositories; returns what there is of them."""
    user = hub.ask("log in to the Hub", lambda api: api.whoami())
    hub.say(f"logged in as {user['name']}")
    if not plan.create_pr:
        may_write(user, plan.organization, [repo.repo_id for repo in plan.repos])
    for repo in plan.repos:
        _check_card(hub, repo)
    standing = {repo.repo_id: hub.ask(f"look at {repo.repo_id}", functools.partial(_look, repo)) for repo in plan.repos}
    for repo in plan.repos:
        remote = standing[repo.repo_id]
        if plan.create_pr:
            _refuse_absent(repo, remote)
        elif remote is not None:
            _refuse_foreign(repo, remote)
            _refuse_other_tag(hub, plan, repo, remote)
    return standing


def _look(repo: RepoPlan, api: "HfApi") -> RemoteRepo | None:
    return look(api, repo.repo_id, repo.repo_type)


def _check_card(hub: Hub, repo: RepoPlan) -> None:
    """The Hub's own validation of the card."""
    from huggingface_hub import RepoCard

    path = repo.folder / "README.md"

    def once(_: "HfApi") -> None:
        try:
            RepoCard(path.read_text(encoding="utf-8")).validate(repo.repo_type)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise InputError(
                f"the Hub refuses the front matter of {path} ({said}); mend its template in cards/ and build the "
                "release again."
            ) from error

    hub.ask(f"have the card of {repo.repo_id} checked", once)


def _refuse_absent(repo: RepoPlan, remote: RemoteRepo | None) -> None:
    if remote is None:
        raise InputError(
            f"there is no {repo.repo_id} on the Hub that this login can see, so no pull request can be opened on it; "
            "type the command without --create-pr to make it."
        )


def _refuse_foreign(repo: RepoPlan, remote: RemoteRepo) -> None:
    """A repository that holds something else than an earlier version of this part is nobody's to write over."""
    if remote.fresh:
        return
    known = remote.manifest
    if (
        known is None
        or known.part != repo.part
        or known.release != repo.repo_id.split("/")[1].removesuffix(f"-{repo.part}")
    ):
        holds = "files, and no safesail.json" if known is None else f"the {known.part} of {known.release}"
        raise InputError(
            f"{repo.repo_id} is on the Hub already and is not this release: it holds {holds}; rename or remove it "
            "there, or change `name` in the recipe and build the release again."
        )


def _refuse_other_tag(hub: Hub, plan: Plan, repo: RepoPlan, remote: RemoteRepo) -> None:
    """A version that is published already holds the same bytes for ever."""
    if plan.tag not in remote.tags:
        return
    tagged = hub.ask(
        f"list {repo.repo_id} at {plan.tag}", lambda api: tree(api, repo.repo_id, repo.repo_type, plan.tag)
    )
    if other := differs(repo.files, tagged):
        raise InputError(
            f"{repo.repo_id} has a {plan.tag} already with another {other[0]}; raise the version and build again: "
            f"`safesail run RECIPE --out {plan.source} --adopt --set publish.version=NEWER`."
        )


# --- what is done, each step looking first ------------------------------------------------------------------------


def _create(hub: Hub, repo: RepoPlan, before: RemoteRepo | None) -> None:
    """A private repository where there is none."""
    if before is not None:
        return
    sdk = "gradio" if repo.repo_type == "space" else None
    hub.say(f"{repo.repo_id}: create, private")
    hub.ask(
        f"create {repo.repo_id}",
        lambda api: api.create_repo(
            repo.repo_id, repo_type=repo.repo_type, visibility="private", exist_ok=True, space_sdk=sdk
        ),
    )


def _gate(hub: Hub, repo: RepoPlan) -> None:
    """The gate that the plan names; one that was set by hand on another repository stays."""

    def once(api: "HfApi") -> None:
        gated = getattr(api.repo_info(repo.repo_id, repo_type=repo.repo_type), "gated", None) or None
        if repo.gated and gated != repo.gated:
            hub.say(f"{repo.repo_id}: gate ({repo.gated})")
            api.update_repo_settings(repo.repo_id, repo_type=repo.repo_type, gated=repo.gated)

    if repo.gated:
        hub.ask(f"gate {repo.repo_id}", once)


def _upload(hub: Hub, plan: Plan, repo: RepoPlan, before: RemoteRepo | None) -> None:
    """One commit with what differs, or none."""
    if before is not None and not any(_difference(repo, before)):
        hub.say(f"{repo.repo_id}: nothing to upload")
        return

    def once(api: "HfApi") -> None:
        remote = look(api, repo.repo_id, repo.repo_type)
        if remote is None:
            raise InputError(
                f"{repo.repo_id} was created, and this login cannot see it; type `hf auth whoami` to see which it is."
            )
        _refuse_foreign(repo, remote)
        _commit(hub, api, plan, repo, remote)

    hub.ask(f"upload {repo.repo_id}", once)


def _commit(hub: Hub, api: "HfApi", plan: Plan, repo: RepoPlan, remote: RemoteRepo) -> Any:
    """The commit (or pull request) that makes a repository hold the release, and what else it held as it was.

    Not `upload_folder`, which may spread a folder over several commits: the parent is the commit that was looked at, so
    that nobody's change is lost between, and an interruption leaves nothing half done.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    changed, gone = _difference(repo, remote)
    if not changed and not gone:  # an attempt whose answer was lost has done it
        return None
    size = megabytes(sum(repo.files[name].size for name in changed))
    hub.say(f"{repo.repo_id}: {len(changed)} files to upload, {size}" + (f"; {len(gone)} to delete" if gone else ""))
    adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=repo.folder / name) for name in changed]
    try:
        return api.create_commit(
            repo.repo_id,
            [*adds, *(CommitOperationDelete(path_in_repo=name) for name in gone)],
            commit_message=plan.message,
            repo_type=repo.repo_type,
            create_pr=plan.create_pr,
            parent_commit=remote.head,
        )
    except json.JSONDecodeError:  # no answer of the Hub: it may pass
        raise
    except ValueError as error:
        raise InputError(f"the Hub refuses the files of {repo.repo_id} ({' '.join(str(error).split())}).") from error


def _difference(repo: RepoPlan, remote: RemoteRepo) -> tuple[list[str], list[str]]:
    """The files to upload, and those of the release before that are in it no longer; others' files stay."""
    before = {*remote.manifest.files} if remote.manifest else set()
    gone = sorted((before & set(remote.files)) - set(repo.files))
    return differs(repo.files, remote.files), gone


def _verify(hub: Hub, repo: RepoPlan) -> str:
    """The commit that `main` points to, every file of which was found to have the plan's checksum."""

    def once(api: "HfApi") -> tuple[str, list[str]]:
        head = api.repo_info(repo.repo_id, repo_type=repo.repo_type).sha
        assert head is not None, f"{repo.repo_id} has no commit after an upload"
        return head, differs(repo.files, tree(api, repo.repo_id, repo.repo_type, head))

    head, wrong = hub.ask(f"verify {repo.repo_id}", once)
    if wrong:
        raise InputError(
            f"{repo.repo_id} does not hold the {wrong[0]} that was uploaded ({len(wrong)} files differ); "
            "nothing was made public, run the same command again."
        )
    hub.say(f"{repo.repo_id}: {len(repo.files)} checksums hold at {head[:12]}")
    return head


def _tag(hub: Hub, plan: Plan, repo: RepoPlan, before: RemoteRepo | None, head: str) -> None:
    """The version's tag; one that was there has the same content, as `_check` found."""
    if before is not None and plan.tag in before.tags:
        return

    def once(api: "HfApi") -> None:
        refs = api.list_repo_refs(repo.repo_id, repo_type=repo.repo_type)
        if plan.tag not in {tag.name for tag in refs.tags}:
            hub.say(f"{repo.repo_id}: tag {plan.tag}")
            api.create_tag(
                repo.repo_id, tag=plan.tag, tag_message=plan.message, revision=head, repo_type=repo.repo_type
            )

    hub.ask(f"tag {repo.repo_id}", once)


def _collect(plan: Plan, api: "HfApi") -> "Collection":
    """The collection with all repositories in it; a new one is private."""
    known = (each for each in api.list_collections(owner=plan.organization) if each.title == plan.collection)
    found = next(known, None) or api.create_collection(
        plan.collection, namespace=plan.organization, description=plan.description, private=True, exists_ok=True
    )
    collection = api.get_collection(found.slug)
    items = {(item.item_type, item.item_id) for item in collection.items}
    for repo in plan.repos:
        if (repo.repo_type, repo.repo_id) not in items:
            api.add_collection_item(collection.slug, repo.repo_id, repo.repo_type, exists_ok=True)
    return collection


def _open(hub: Hub, plan: Plan, repo: RepoPlan) -> bool:
    """Make a repository public if that is asked for; returns whether it is private now."""

    def once(api: "HfApi") -> bool:
        info = api.repo_info(repo.repo_id, repo_type=repo.repo_type)
        if plan.private or not info.private:
            return bool(info.private)
        if repo.gated and getattr(info, "gated", None) != repo.gated:
            raise InputError(f"{repo.repo_id} is not gated as it should be and stays private; run the command again.")
        hub.say(f"{repo.repo_id}: private → public")
        api.update_repo_settings(repo.repo_id, repo_type=repo.repo_type, visibility="public")
        return False

    return hub.ask(f"make {repo.repo_id} public", once)


def _open_collection(plan: Plan, slug: str, api: "HfApi") -> None:
    """Make the collection public, unless it is somebody's own, with other things in it."""
    collection = api.get_collection(slug)
    ours = {repo.repo_id for repo in plan.repos}
    if collection.private and {item.item_id for item in collection.items} <= ours:
        api.update_collection_metadata(slug, private=False)


def _restart(hub: Hub, repos: list[PublishedRepo]) -> None:
    """A Space reads the release when it starts: one that runs with the release before, or failed, starts anew."""
    changed = any(repo.state != "unchanged" for repo in repos)
    for space in repos:
        if space.repo_type == "space":
            stale = changed and space.state == "unchanged"  # its own commit would have started it anew
            hub.ask(f"start {space.repo_id} anew", functools.partial(_restart_once, hub, space.repo_id, stale))


def _restart_once(hub: Hub, repo_id: str, stale: bool, api: "HfApi") -> None:
    stage = api.get_space_runtime(repo_id).stage
    if stage == "RUNTIME_ERROR" or (stale and stage == "RUNNING"):
        hub.say(f"{repo_id}: start anew")
        api.restart_space(repo_id)


# --- proposing ----------------------------------------------------------------------------------------------------


def _propose(hub: Hub, plan: Plan, repo: RepoPlan, remote: RemoteRepo | None) -> PublishedRepo:
    """A pull request with what differs, unless there is one already."""
    assert remote is not None, "checked before"

    def once(api: "HfApi") -> tuple[str, str | None, str | None]:
        if not any(_difference(repo, remote)):
            return "unchanged", remote.head, None
        for number in _open_requests(api, plan, repo):
            proposed = tree(api, repo.repo_id, repo.repo_type, f"refs/pr/{number}")
            if not differs(repo.files, proposed) and not set(_difference(repo, remote)[1]) & set(proposed):
                return "proposed already", None, f"{_url(hub, repo)}/discussions/{number}"
        made = _commit(hub, api, plan, repo, remote)
        return "proposed", made.oid, made.pr_url

    state, commit, url = hub.ask(f"open a pull request on {repo.repo_id}", once)
    return PublishedRepo(repo.repo_id, repo.repo_type, _url(hub, repo), state, commit, None, remote.private, url)


def _open_requests(api: "HfApi", plan: Plan, repo: RepoPlan) -> list[int]:
    """The numbers of the open pull requests with the plan's title."""
    found = api.get_repo_discussions(
        repo.repo_id, repo_type=repo.repo_type, discussion_type="pull_request", discussion_status="open"
    )
    return [each.num for each in found if each.title == plan.message and each.status in ("open", "draft")]
