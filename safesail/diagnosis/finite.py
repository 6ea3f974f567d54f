"""How far an intervention can go before the model's logits overflow, and the refusal of what goes further."""

import torch
from torch import Tensor

from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.steering import Intervention, intervened
from safesail.errors import InputError

__all__ = ["NotFinite", "check_finite", "largest_finite", "refusal"]

_LEAST, _LARGEST = -9 * 90, 307 * 90 + 89
"""Places of 1e-9 and 9.9e307 among the numbers of two digits."""


class NotFinite(Exception):
    """Raised where a logit is infinite or not a number."""


def check_finite(logits: Tensor) -> None:
    """Raise NotFinite unless every logit is finite. logits: (vocabulary,)."""
    if not torch.isfinite(logits).all():
        raise NotFinite


def largest_finite(
    inspector: Inspector, interventions: list[Intervention], ids: list[int], *, roles: list[int] | None = None
) -> float:
    """The largest amount, to two digits, at which all logits after the ids are finite.

    The amounts of several interventions are scaled together, and the result is that of the largest. From the amount
    given it is searched by doubling the step until finiteness changes, then by bisection, on the assumption that it
    changes once. Ablations have no amount and stay.
    """
    given = max((abs(change.amount) for change in interventions if change.kind != "ablate"), default=0.0)
    if given == 0:
        raise InputError("these interventions have no amount that could be larger; give one to steer or clamp by.")

    def finite(place: int) -> bool:
        scaled = [change._replace(amount=change.amount / given * _number(place)) for change in interventions]
        return _is_finite(inspector, scaled, ids, roles)

    here, step = min(max(_place(given), _LEAST), _LARGEST), 1
    good = finite(here)
    while True:
        there = min(max(here + (step if good else -step), _LEAST), _LARGEST)
        if finite(there) != good:
            break
        if good and there == _LARGEST:
            return _number(there)
        if not good and there == _LEAST:
            raise InputError("the model's logits are not finite at any amount; change other neurons, or none.")
        here, step = there, 2 * step
    low, high = sorted((here, there))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(middle) else (low, middle)
    return _number(low)


def refusal(
    inspector: Inspector, interventions: list[Intervention], ids: list[int], roles: list[int] | None
) -> InputError:
    """What is said of interventions after which a logit was not finite."""
    if not _is_finite(inspector, [], ids, roles):
        return InputError("the model's own logits are not finite on this prompt; load it in float32.")
    given = max((change.amount for change in interventions if change.kind != "ablate"), key=abs, default=0.0)
    largest = largest_finite(inspector, interventions, ids, roles=roles)
    return InputError(
        f"an amount of {given:g} makes the model's logits infinite or undefined on this prompt; the largest finite one "
        f"is {-largest if given < 0 else largest:g}. Amounts of 1 to 10 are usual."
    )


@torch.inference_mode()
def _is_finite(
    inspector: Inspector, interventions: list[Intervention], ids: list[int], roles: list[int] | None
) -> bool:
    tensor = torch.tensor([ids], device=inspector.model.device)
    with intervened(inspector, interventions, roles=roles):
        logits = inspector.model(input_ids=tensor, use_cache=False, logits_to_keep=1).logits
    return bool(torch.isfinite(logits).all())


def _number(place: int) -> float:
    """The numbers of two digits in order: 1.0 at 0, 1.1 at 1, 9.9 at 89, 10 at 90, 0.99 at -1."""
    return float(f"{10 + place % 90}e{place // 90 - 1}")


def _place(amount: float) -> int:
    """The place of the largest number of two digits that is not above the amount."""
    digits, exponent = f"{amount:.1e}".split("e")
    place = int(digits.replace(".", "")) - 10 + 90 * int(exponent)
    return place if _number(place) <= amount else place - 1
