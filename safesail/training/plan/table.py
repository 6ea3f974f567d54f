"""A plan as a table for a person: what, how much, and how it comes about."""

from safesail.training.plan.plan import Plan
from safesail.training.plan.space import Amount, total

__all__ = ["plan_lines"]

Row = tuple[str, str, str, str]


def plan_lines(plan: Plan) -> list[str]:
    """The lines of the table; the last one says whether it fits and what limits."""
    rows = [*_tokens(plan), *_compute(plan), *_memory(plan), *_disk(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return [_headline(plan), "", *lines, "", _verdict(plan)]


def _headline(plan: Plan) -> str:
    where = f"on {plan.device}"
    if plan.n_ranks > 1:
        where += f", {plan.n_ranks} ranks ({plan.parallel}), numbers of rank {plan.rank}, which has most to do"
    still = f"still to be made: {', '.join(plan.stages)}" if plan.stages else "nothing is left to be made"
    return f"{plan.name}: {plan.n_saes} SAEs, {where}; {still}"


def _tokens(plan: Plan) -> list[Row]:
    rows = _rows("tokens", [(item.what, f"{item.amount:,}", item.note) for item in plan.tokens])
    others = f" of {plan.n_saes}" if plan.n_saes_of_rank != plan.n_saes else ""
    saes = f"{plan.n_saes_of_rank}{others} SAEs"
    return [*rows, ("", "steps, each SAE", f"{plan.n_steps:,}", saes)]


def _compute(plan: Plan) -> list[Row]:
    parts = [
        (part.what, f"{flops(part.flops)}, {duration(seconds):>8}", part.note)
        for part, seconds in zip(plan.compute, plan.seconds, strict=True)
    ]
    speed = plan.speed
    rates = f"at {flops(speed.flops_per_second)}/s, {speed.bytes_per_second / 1e9:,.1f} GB/s, measured now"
    if speed.model_flops_per_second != speed.flops_per_second:
        rates += f"; the model at {flops(speed.model_flops_per_second)}/s"
    whole = ("in all, about", f"{flops(plan.total_flops)}, {duration(plan.total_seconds):>8}", rates)
    return _rows("compute", [*parts, whole])


def _memory(plan: Plan) -> list[Row]:
    rows = _amounts("memory", plan.memory)
    if plan.memory:
        ranks = plan.n_local_ranks
        note = f"in {plan.memory_phase}; {gigabytes(plan.room.ram)} free" + (f" for {ranks} ranks" if ranks > 1 else "")
        rows.append(("", "peak of a rank" if ranks > 1 else "peak", gigabytes(total(plan.memory)), note))
    if plan.gpu_memory and plan.room.gpu is not None:
        rows += _amounts("GPU", plan.gpu_memory)
        note = f"in {plan.gpu_memory_phase}; {gigabytes(plan.room.gpu)} free"
        rows.append(("", "peak", gigabytes(total(plan.gpu_memory)), note))
    return rows


def _disk(plan: Plan) -> list[Row]:
    whole = ("", "in all", gigabytes(plan.needs["disk"]), f"{gigabytes(plan.room.disk)} free")
    return [*_amounts("disk", plan.disk), whole] if plan.disk else []


def _amounts(title: str, items: list[Amount]) -> list[Row]:
    return _rows(title, [(item.what, gigabytes(item.amount), item.note) for item in items])


def _rows(title: str, cells: list[tuple[str, str, str]]) -> list[Row]:
    return [(title if i == 0 else "", *row) for i, row in enumerate(cells)]


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"it fits; what limits is {plan.limit}"
    missing = " and ".join(f"{s.what} ({gigabytes(s.needed)} needed, {gigabytes(s.free)} free)" for s in plan.shortages)
    fitting = f"; it would with {', '.join(f'{k} = {v}' for k, v in plan.changes.items())}" if plan.changes else ""
    return f"it does not fit: too little {missing}{fitting}"


def gigabytes(n_bytes: float) -> str:
    """Bytes in GB (10⁹), or in MB below a tenth of one."""
    return f"{n_bytes / 1e9:,.2f} GB" if abs(n_bytes) >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


def flops(amount: float) -> str:
    """FLOPs with the prefix that leaves one to three digits before the point."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if amount >= factor:
            return f"{amount / factor:,.1f} {prefix}FLOP"
    return f"{amount / 1e6:,.1f} MFLOP"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for factor, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:,.1f} s"
