"""What is to be published: planned offline, shown, and refused where the folders are not whole."""

import json
import re
import shutil
from pathlib import Path

import pytest
from made_publication import small_release

from safesail.errors import InputError
from safesail.release.manifest import REPO_TYPES, write_manifest
from safesail.release.plan import megabytes, plan_publication


def test_dry_run_is_a_table_that_ends_with_the_command(release: Path) -> None:
    lines = plan_publication(release).lines()
    assert re.fullmatch(r"small v1\.0\.0: 4 repositories, 14 files, 1\.5 MB", lines[0])
    table = [re.split(r"\s{2,}", line) for line in lines[2:7]]
    assert table[0] == ["repository", "kind", "files", "size", "visibility", "access"]
    assert table[1] == ["acme/small-saes", "model", "4", "1.2 MB", "private → public", "open"]
    assert table[2][:4] == ["acme/small-neurons", "data set", "4", "0.3 MB"]
    assert table[3][4:] == ["private → public", "gated (manual): you let readers in one by one"]
    assert table[4][:3] == ["acme/small-inspector", "Space", "3"]
    assert lines[8:10] == ["largest files", "     1.2 MB  acme/small-saes/layers.0/weights.safetensors"]
    text = "\n".join(lines)
    assert "gated       examples\n" in text
    assert "tag         v1.0.0 on every repository\n" in text
    assert "collection  “Small things” of acme: Small things: sparse autoencoders" in text
    assert lines[-1] == f"Publish it:  safesail publish {release}"


def test_dry_run_says_what_private_and_pull_requests_leave_as_it_is(release: Path) -> None:
    private = plan_publication(release, private=True).lines()
    assert private[-1].endswith(f"safesail publish {release} --private")
    assert "public" not in "\n".join(private[:8])
    proposed = plan_publication(release, create_pr=True).lines()
    assert proposed[-1].endswith("--create-pr")
    assert "One pull request on each repository whose content differs; nothing else is changed." in proposed
    assert not any(line.startswith(("tag", "collection", "gated  ")) for line in proposed)


def test_plan_as_json_holds_every_file_and_checksum(release: Path) -> None:
    plan = json.loads(json.dumps(plan_publication(release).to_json()))
    saes = plan["repos"][0]
    assert (saes["repo_id"], saes["repo_type"], saes["gated"]) == ("acme/small-saes", "model", None)
    assert set(saes["files"]) == {"README.md", "config.json", "layers.0/weights.safetensors", "safesail.json"}
    # echo '{}' | sha256sum
    assert saes["files"]["config.json"]["sha256"].startswith("ca3d163bab055381827226140568f3be")
    assert plan["tag"] == "v1.0.0"
    assert plan["organization"] == "acme"


def test_description_of_the_collection_is_no_longer_than_the_hub_allows(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    for part in REPO_TYPES:
        gated = "auto" if part == "examples" else None
        write_manifest(folder / part, part, "small", "acme", "A very long title " * 20, "1.0.0", gated)
    plan = plan_publication(folder)
    assert len(plan.description) == 150
    assert len(plan.collection) <= 60


def test_bytes_are_shown_with_a_unit() -> None:
    assert [megabytes(n) for n in (0, 99_000, 100_000, 1_500_000_000)] == ["0.0 kB", "99.0 kB", "0.1 MB", "1.5 GB"]


def _break(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("saes/config.json", b"{ }", r"saes/config\.json is not the file .*safesail build .* --force"),
        ("neurons/old.txt", None, r"neurons/old\.txt is missing"),
        ("inspector/new.py", b"", r"inspector/new\.py is not in safesail\.json"),
        ("saes/README.md", b"---\nlicense: [mit\n---\n", r"front matter of .*saes/README\.md is broken"),
        ("neurons/README.md", b"---\n- a list\n---\n", r"front matter of .*neurons/README\.md is broken"),
        ("examples/README.md", b"# no front matter\n", r"does not begin with front matter"),
        ("saes/README.md", None, r"README\.md is missing"),
        ("saes/safesail.json", None, r"no finished saes; type `safesail build"),
        ("saes/safesail.json", b"{", r"not valid JSON"),
    ],
)
def test_folder_that_is_not_as_it_was_built_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    folder = small_release(tmp_path / "run")
    (folder / "run.json").write_text("{}")
    _break(folder, name, content)
    with pytest.raises(InputError, match=words):
        plan_publication(folder)


def test_release_of_nobody_is_refused_with_the_command_that_names_its_owner(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run", organization="")
    with pytest.raises(InputError, match=r"safesail run RECIPE --out .* --adopt --set publish\.organization=NAME"):
        plan_publication(folder)


def test_id_that_the_hub_would_refuse_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    for part in REPO_TYPES:
        write_manifest(folder / part, part, "two--dashes", "acme", "t", "1.0.0", None)
    with pytest.raises(InputError, match="the Hub would refuse the id 'acme/two--dashes-saes'"):
        plan_publication(folder)


def test_folders_of_two_versions_are_refused(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    write_manifest(folder / "neurons", "neurons", "small", "acme", "Small things", "1.1.0", None)
    with pytest.raises(InputError, match=r"not of one release: their version differs \('1\.1\.0', '1\.0\.0'\)"):
        plan_publication(folder)


def test_release_that_lacks_parts_is_published_unless_it_is_a_run(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "converted")
    shutil.rmtree(folder / "examples")
    assert [repo.part for repo in plan_publication(folder).repos] == ["saes", "neurons", "inspector"]
    (folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match="no finished examples"):
        plan_publication(folder)
