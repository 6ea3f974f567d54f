"""Which function of the Hub double answers which request.

The protocol as `huggingface_hub` 2.x speaks it. Paths are matched before percent-decoding, since a revision such as
`refs/pr/1` is one segment of them.
"""

import re
from collections.abc import Callable
from urllib.parse import unquote

import hub_double_files as files
import hub_double_repos as repos
import hub_double_threads as threads
from hub_double_calls import Call, Reply, error_headers
from hub_double_store import HubError

ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
REPO = rf"/api/(?P<kind>models|datasets|spaces)/{ID}"
FILES = rf"/(?P<kind>datasets/|spaces/)?{ID}"
REV, PATH = r"(?P<rev>[^/]+)", r"(?P<path>.+)"

ROUTES: list[tuple[str, str, Callable[[Call], Reply]]] = [
    ("GET", r"/api/whoami-v2", repos.whoami),
    ("POST", r"/api/repos/create", repos.create_repo),
    ("DELETE", r"/api/repos/delete", repos.delete_repo),
    ("POST", r"/api/validate-yaml", repos.validate_yaml),
    ("GET", r"/api/collections", threads.collections),
    ("POST", r"/api/collections", threads.create_collection),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", threads.add_item),
    ("PATCH|DELETE", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)", threads.change_item),
    ("GET|PATCH|DELETE", r"/api/collections/(?P<slug>[^/]+/[^/]+)", threads.collection),
    ("GET", r"/api/(?P<kind>models|datasets|spaces)", repos.list_repos),
    ("PUT", rf"{REPO}/settings", repos.settings),
    ("GET", rf"{REPO}/auth-check(?P<write>/write)?", repos.auth_check),
    ("GET", rf"{REPO}/runtime", repos.runtime),
    ("POST", rf"{REPO}/restart", repos.restart),
    ("GET", rf"{REPO}/tree/{REV}(?:/{PATH})?", files.tree),
    ("POST", rf"{REPO}/paths-info/{REV}", files.paths_info),
    ("GET", rf"{REPO}/commits/{REV}", files.commits),
    ("POST", rf"{REPO}/preupload/{REV}", files.preupload),
    ("POST", rf"{REPO}/commit/{REV}", files.commit),
    ("GET", rf"{REPO}/xet-(?P<right>read|write)-token/{REV}", files.xet_token),
    ("GET", rf"{REPO}/refs", repos.refs),
    ("POST|DELETE", rf"{REPO}/branch/{REV}", repos.branch),
    ("POST|DELETE", rf"{REPO}/tag/{REV}", repos.tag),
    ("GET", rf"{REPO}/discussions", threads.threads),
    ("POST", rf"{REPO}/discussions", threads.open_thread),
    ("GET", rf"{REPO}/discussions/(?P<num>\d+)", threads.thread),
    ("POST", rf"{REPO}/discussions/(?P<num>\d+)/merge", threads.merge),
    ("POST", rf"{REPO}/discussions/(?P<num>\d+)/(?P<change>comment|status|title)", threads.change_thread),
    ("GET", rf"{REPO}(?:/revision/{REV})?", repos.info),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", files.lfs_batch),
    ("PUT", r"/storage/(?P<sha>[0-9a-f]{64})", files.lfs_put),
    ("GET|HEAD", r"/storage/(?P<sha>[0-9a-f]{64})", files.storage),
    ("POST", r"/storage-verify", files.lfs_verify),
    ("GET|HEAD", rf"{FILES}/(?:resolve|raw)/{REV}/{PATH}", files.resolve),
]
COMPILED = [(methods.split("|"), re.compile(pattern), answer) for methods, pattern, answer in ROUTES]


def answer(method: str, path: str, call: Callable[[dict[str, str]], Call]) -> Reply:
    """The reply to a request for an undecoded path; a refusal becomes one too."""
    try:
        for methods, pattern, handler in COMPILED:
            if method in methods and (match := pattern.fullmatch(path)):
                parts = {key: value for key, value in match.groupdict().items() if value is not None}
                if "id" in parts:
                    parts["id"] = unquote(parts["id"])
                return handler(call(parts))
        raise HubError(404, f"no such route: {method} {path}")
    except HubError as error:
        return Reply({"error": error.message, **error.body}, error.status, error_headers(error))
