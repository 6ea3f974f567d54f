"""What segment-level simulation costs beside token-level simulation, and whether their scores agree.

    python scripts/bench_simulation.py runs/demo --json bench-results/simulation.json
    python scripts/bench_simulation.py runs/demo --local demo-assets/models/SmolLM2-135M-Instruct
    python scripts/bench_simulation.py runs/demo --base-url http://127.0.0.1:8080/v1 --model NAME --cache answers.sqlite

The same neurons of a finished run are simulated three times over HTTP: token by token, segment by segment, and segment
by segment with several neurons to a prompt. Input and output tokens are counted and weighted by price. Token-level and
segment-level simulation judge the same texts; with shared prompts a neuron is judged on all texts of its group, which
hold as many active texts of its own.

Without --base-url the answers are simulated and only the requests are real: an endpoint on this machine knows what the
neurons do, and replaces a share of the units, different for every neuron, by others of the same neuron. Tokens are then
counted with the subject model's tokenizer, those of the messages and of the answers. The expected score is one less
that share at either level, so what the two scores' correlation shows is the scoring's own noise, and not how a language
model would do. With --local a second table shows that of a real one: a model of this machine, whose logits are read.
"""

import argparse
import json
import random
import re
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import benchmark
import torch
from benchmark import Record
from torch import Tensor

from safesail.errors import InputError
from safesail.interpretation.collect import load_codes
from safesail.interpretation.excerpts import Excerpt, Level, Pieces, group_excerpts, units_of
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend
from safesail.interpretation.prompts import inert
from safesail.interpretation.simulate import Job, Simulated, simulate, simulation_requests
from safesail.lm.activations import Activations
from safesail.lm.judge import judge
from safesail.lm.load import causal_lm, load_tokenizer
from safesail.metrics import Interval, pearson, pearson_interval
from safesail.neurons import parse_neuron_id
from safesail.progress import bar
from safesail.recipe import Recipe, ScoreSection
from safesail.run import Run

TOKEN, SEGMENT = "token-level", "segment-level"

benchmark.COLUMNS.update(
    {
        "n_requests": ("requests", ",d"),
        "n_units": ("units", ",d"),
        "prompt_tokens": ("input tokens", ",d"),
        "completion_tokens": ("output tokens", ",d"),
        "weighted_per_neuron": ("weighted a neuron", ",.0f"),
        "cost_share": ("× token-level", ".3f"),
        "cost_limit": ("to reach", ".2f"),
        "n_scored": ("scored", ",d"),
        "mean_score": ("mean score", ".3f"),
        "pearson": ("r with token-level", ".3f"),
        "pearson_low": ("r low", ".3f"),
        "pearson_high": ("r high", ".3f"),
        "spearman": ("rank r", ".3f"),
        "spearman_low": ("rank r low", ".3f"),
        "spearman_high": ("rank r high", ".3f"),
    }
)


class Case(NamedTuple):
    """One way to simulate: its name, its level, its jobs, and the settings it asks with."""

    name: str
    level: Level
    jobs: list[Job]
    section: ScoreSection
    cost_limit: float | None


# --- the neurons of a run -----------------------------------------------------------------------------------------


def chosen_rows(explanations: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The first n neurons with an explanation in the first language that no neuron before them has.

    Equal explanations of different neurons would be equal requests, which are sent once.
    """
    usable, seen = [], set()
    for row in explanations:
        if row["status"] == "ok" and row["language"] == explanations[0]["language"] and row["explanation"] not in seen:
            seen.add(row["explanation"])
            usable.append(row)
    if len(usable) < n:
        raise InputError(f"--neurons {n} was given, but {len(usable)} neurons have an explanation of their own.")
    return usable[:n]


def groups_of(rows: list[dict[str, Any]], hook_points: list[str], size: int) -> list[list[dict[str, Any]]]:
    """Neighbours of one hook point, `size` at a time."""
    by_hook_point: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_hook_point.setdefault(parse_neuron_id(row["neuron_id"], hook_points)[0], []).append(row)
    return [members[i : i + size] for members in by_hook_point.values() for i in range(0, len(members), size)]


class Release:
    """The parts of a finished run that scoring reads."""

    def __init__(self, folder: Path) -> None:
        run = Run.open(folder)
        if not isinstance(run.recipe, Recipe):
            raise InputError(f"{folder} is the run of a reward model, which has no explanations to simulate.")
        self.recipe = run.recipe
        self.activations = Activations(run.result("harvest"))
        self.collected = run.result("collect")
        self.explanations = run.table_of("explain", "explanations.parquet")
        self.normaliser = {row["neuron_id"]: row["normaliser"] for row in run.table_of("collect", "statistics.parquet")}
        self.tokenizer = load_tokenizer(self.recipe.model.path, revision=self.recipe.model.revision)
        self._pieces = Pieces(self.recipe, self.activations, self.tokenizer)

    def excerpts(self, rows: list[dict[str, Any]], size: int) -> dict[str, list[Excerpt]]:
        """Each neuron's excerpts, when `size` neighbours share theirs."""
        found: dict[str, list[Excerpt]] = {}
        hook_points = self.activations.hook_points
        for group in groups_of(rows, hook_points, size):
            latents = {parse_neuron_id(row["neuron_id"], hook_points)[1]: row["neuron_id"] for row in group}
            hook_point = parse_neuron_id(group[0]["neuron_id"], hook_points)[0]
            codes, q = load_codes(self.collected, hook_point), {j: self.normaliser[id] for j, id in latents.items()}
            shared = group_excerpts(self.recipe, self.activations, codes, q, self.tokenizer, self._pieces)
            found |= {latents[latent]: excerpts for latent, excerpts in shared.items()}
        return found


def cases(release: Release, rows: list[dict[str, Any]], shared: int, model: str) -> list[Case]:
    """Token-level and segment-level on each neuron's own texts, then segment-level on those of groups."""
    asked = {"backend": "endpoint", "model": model, "neurons_per_request": 1, "logprobs": False}
    alone = release.recipe.score.model_copy(update=asked)
    together = alone.model_copy(update={"neurons_per_request": shared})
    own, of_groups = release.excerpts(rows, 1), release.excerpts(rows, shared)
    return [
        Case(TOKEN, "token", jobs_of(rows, own, "token", alone), alone, None),
        Case(SEGMENT, "segment", jobs_of(rows, own, "segment", alone), alone, 0.45),
        Case(
            f"{SEGMENT}, {shared} neurons a prompt",
            "segment",
            jobs_of(rows, of_groups, "segment", together),
            together,
            0.25,
        ),
    ]


def jobs_of(
    rows: list[dict[str, Any]], excerpts: dict[str, list[Excerpt]], level: Level, section: ScoreSection
) -> list[Job]:
    return [
        Job(
            row["neuron_id"],
            row["language"],
            row["explanation"],
            units_of(excerpts[row["neuron_id"]], level, section.segment_tokens, section.active_above),
        )
        for row in rows
    ]


# --- the endpoint whose answers are simulated ---------------------------------------------------------------------


class Book:
    """What is to be answered: of each description the units of its jobs, and what a noisy channel makes of them."""

    def __init__(self, cases: list[Case], seed: int = 0, replaced: dict[str, float] | None = None) -> None:
        names = list(dict.fromkeys(job.neuron_id for case in cases for job in case.jobs))
        chance = random.Random(seed)
        order = chance.sample(range(len(names)), len(names))
        self.replaced = replaced or {name: (i + 0.5) / len(names) for name, i in zip(names, order, strict=True)}
        """Of each neuron the share of its units about which another is said: evenly spread from 0 to 1."""
        self._said: dict[str, list[tuple[list[str], list[int]]]] = {}
        for case in cases:
            for job in case.jobs:
                lines = [inert(text) for text in job.units.texts]
                said = noisy(job.units.truth, self.replaced[job.neuron_id], f"{seed} {case.name} {job.neuron_id}")
                self._said.setdefault(inert(job.explanation), []).append((lines, said))

    def levels(self, description: str, lines: list[str]) -> list[int]:
        """What is said of consecutive units."""
        for texts, said in self._said[description]:
            for start in range(len(texts) - len(lines) + 1):
                if texts[start : start + len(lines)] == lines:
                    return said[start : start + len(lines)]
        raise AssertionError(f"nothing is known of {lines[:3]} by the description {description}")


def noisy(truth: Tensor, replaced: float, seed: str) -> list[int]:
    """The truth with a share of the units replaced by units drawn from the same truth: r = 1 - replaced, about."""
    chance, levels = random.Random(seed), [int(level) for level in truth.tolist()]
    return [chance.choice(levels) if chance.random() < replaced else level for level in levels]


_DESCRIPTION = re.compile(r'<description(?: id="(\d+)")?>\s*(.*?)\s*</description>')
_BLOCK = re.compile(r"<(pieces|tokens)>\n(.*?)\n</\1>", re.DOTALL)


def answer_to(prompt: str, book: Book) -> str:
    """The answer to a simulation prompt as compact JSON, the way the prompts show it."""
    kind, block = _BLOCK.findall(prompt)[-1]
    lines = [line.partition(": ")[2] for line in block.split("\n")]
    said = {number: book.levels(description, lines) for number, description in _DESCRIPTION.findall(prompt)}
    if kind == "tokens":
        return json.dumps({"activations": said[""]}, separators=(",", ":"))
    active = {number: [i for i, level in enumerate(levels, 1) if level] for number, levels in said.items()}
    return json.dumps({number or "active": numbers for number, numbers in active.items()}, separators=(",", ":"))


class SimulatedEndpoint:
    """An OpenAI-compatible endpoint on this machine that answers from the book and counts tokens."""

    def __init__(self, book: Book, tokenizer: Any) -> None:
        self._book, self._tokenizer = book, tokenizer
        self._lock = threading.Lock()  # a tokenizer is not made for several threads
        self.prompt_tokens = self.completion_tokens = self.n_requests = 0

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                payload = json.dumps(endpoint.complete(body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion with its usage."""
        text = answer_to(body["messages"][-1]["content"], self._book)
        with self._lock:
            asked, answered = sum(self._count(m["content"]) for m in body["messages"]), self._count(text)
            self.n_requests += 1
            self.prompt_tokens += asked
            self.completion_tokens += answered
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "simulated",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
        }

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


# --- the table ----------------------------------------------------------------------------------------------------


def records_of(cases: list[Case], simulated: list[list[Simulated]], output_price: float, what: str) -> list[Record]:
    """A record per case: what it cost, beside token-level, and how its scores go with those of token-level."""
    scores = [list(map(score, case.jobs, said)) for case, said in zip(cases, simulated, strict=True)]
    costs = [weighted(said, output_price) for said in simulated]
    return [
        {
            "table": "simulation",
            "case": what,
            "name": case.name,
            "n_requests": len(set(map(repr, simulation_requests(case.jobs, case.level, case.section, is_local(case))))),
            "n_units": sum(len(job.units.texts) for job in case.jobs),
            "prompt_tokens": sum(s.prompt_tokens for s in said),
            "completion_tokens": sum(s.completion_tokens for s in said),
            "weighted_per_neuron": cost / len(case.jobs),
            "cost_share": benchmark.ratio(cost, costs[0]),
            "cost_limit": case.cost_limit,
            "n_scored": sum(s is not None for s in of_case),
            "mean_score": mean_of(of_case),
            **(agreement(scores[0], of_case) if case is not cases[0] else {}),
            "scores": dict(zip((job.neuron_id for job in case.jobs), of_case, strict=True)),
            "statuses": {s: sum(each.status == s for each in said) for s in sorted({each.status for each in said})},
        }
        for case, said, cost, of_case in zip(cases, simulated, costs, scores, strict=True)
    ]


def is_local(case: Case) -> bool:
    return case.section.backend == "local"


def score(job: Job, said: Simulated) -> float | None:
    return None if said.predicted is None else pearson(said.predicted, job.units.truth)


def weighted(simulated: list[Simulated], output_price: float) -> float:
    """Tokens as if all were input: output counts `output_price` times."""
    return sum(said.prompt_tokens + output_price * said.completion_tokens for said in simulated)


def mean_of(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def agreement(one: list[float | None], other: list[float | None]) -> dict[str, float | None]:
    """Pearson and Spearman correlation over the neurons that both scored, with intervals from resampling neurons."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    a, b = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T.contiguous()
    linear, by_rank = (_correlated(*sides) for sides in ((a, b), (ranks(a), ranks(b))))
    return {
        **dict(zip(("pearson", "pearson_low", "pearson_high"), linear, strict=True)),
        **dict(zip(("spearman", "spearman_low", "spearman_high"), by_rank, strict=True)),
    }


def _correlated(a: Tensor, b: Tensor) -> Interval:
    return pearson_interval(a, b, torch.arange(len(a))) if len(a) else Interval(None, None, None)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value from 1, equal values sharing the mean of theirs. values: (n,)."""
    order = values.sort().values
    below = torch.searchsorted(order, values, right=False)
    upto = torch.searchsorted(order, values, right=True)
    return (below + upto + 1).double() / 2


# --- the command line ---------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> list[Record]:
    """The records of the table."""
    for name in ("neurons", "shared", "concurrency"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} was given {getattr(arguments, name)}; it takes a number of at least 1.")
    if bool(arguments.base_url) != bool(arguments.model):
        raise InputError("--base-url and --model name a server together; give both, or neither to simulate answers.")
    release = Release(arguments.run)
    rows = chosen_rows(release.explanations, arguments.neurons)
    made = cases(release, rows, arguments.shared, arguments.model or "simulated")
    what = f"{len(rows)} neurons of {release.recipe.name}, output at {arguments.output_price:g} × the price of input"
    if arguments.base_url:
        return records_of(made, ask(made, arguments.base_url, arguments), arguments.output_price, what)
    print(
        "answers are simulated; tokens are counted with the subject model's tokenizer from the real requests and "
        "answers",
        flush=True,
    )
    with SimulatedEndpoint(Book(made), release.tokenizer) as endpoint:
        simulated = ask(made, endpoint.base_url, arguments)
    records = records_of(made, simulated, arguments.output_price, f"{what}, simulated answers")
    if arguments.local:
        judged = [of_local(case) for case in made if case.section.neurons_per_request == 1]
        name = f"{len(rows)} neurons of {release.recipe.name}, logits of {Path(arguments.local).name}"
        records += records_of(judged, by_logits(judged, arguments.local), arguments.output_price, name)
    return records


def of_local(case: Case) -> Case:
    """The same jobs for a model of this machine, which has no limit of cost to keep to."""
    return case._replace(section=case.section.model_copy(update={"backend": "local"}), cost_limit=None)


def by_logits(cases: list[Case], path: str) -> list[list[Simulated]]:
    """The simulations of each case by a model of this machine."""
    model, tokenizer = causal_lm(path), load_tokenizer(path)
    llm = Llm(
        LocalBackend(
            lambda *_: [],  # it is never asked to write
            f"local:{Path(path).name}",
            identity={},
            batch_size=1,
            judge=lambda prompts, choices: judge(model, tokenizer, prompts, choices),
        ),
        None,
    )
    found = []
    for case in cases:
        n_requests = len(simulation_requests(case.jobs, case.level, case.section, True))
        with bar(case.name, n_requests, "prompt") as progress:
            found.append(simulate(case.jobs, case.level, case.section, llm, progress.update))
    return found


def ask(cases: list[Case], base_url: str, arguments: argparse.Namespace) -> list[list[Simulated]]:
    """The simulations of each case; answers of a real server are kept in the cache file."""
    backend = EndpointBackend(
        arguments.model or "simulated",
        base_url,
        api_key_env=arguments.api_key_env,
        concurrency=arguments.concurrency,
        timeout_seconds=arguments.timeout,
    )
    llm = Llm(backend, arguments.cache if arguments.base_url else None)
    return [simulate(case.jobs, case.level, case.section, llm) for case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the cost of segment-level and token-level simulation.")
    parser.add_argument("run", type=Path, help="a finished run, such as runs/demo")
    parser.add_argument("--neurons", type=int, default=60, help="neurons with an explanation of their own (60)")
    parser.add_argument("--shared", type=int, default=8, help="neurons that share a prompt in the third row (8)")
    parser.add_argument("--output-price", type=float, default=4, help="price of an output token in input tokens (4)")
    parser.add_argument("--model", help="ask this model of the server at --base-url instead of simulating answers")
    parser.add_argument("--base-url", help="an OpenAI-compatible server, such as http://127.0.0.1:8080/v1")
    parser.add_argument("--local", metavar="MODEL", help="score with the logits of this transformers folder as well")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", help="the environment variable with its key")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the server's answers in this sqlite file")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at a time (8)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for an answer (600)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records there as well")
    parser.set_defaults(rounds=1, tuned=False)  # nothing is timed
    return benchmark.run_script(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
