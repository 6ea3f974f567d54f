"""Two answers side by side as lines of a terminal."""

from safesail.cli.app import visible
from safesail.rewards.readings import Comparison, LatentDifference, Side

__all__ = ["comparison_lines"]


def comparison_lines(comparison: Comparison, top: int) -> list[str]:
    """The lines of a terminal: the scores, both answers segment by segment, and the latents that differ."""
    lines = [
        f"margin      {comparison.margin:+.4f}  (reward of chosen less that of rejected)",
        f"score_safe  {comparison.score_safe:+.4f}  (S⁺ less S⁻ per segment end, chosen less rejected)",
    ]
    for name, safe in (("chosen", comparison.safe_chosen), ("rejected", comparison.safe_rejected)):
        side = comparison.sides[name]
        cut = f", without the first {side.text.n_cut:,} tokens" if side.text.n_cut else ""
        lines += ["", f"{name}: reward {side.reward:+.4f}, S⁺ less S⁻ {safe:+.4f}{cut}", *_segments(side)]
    lines += ["", f"{'latent':20} {'in':2} {'chosen':>7} {'reject.':>7} {'adds':>7} {'s':>6} rating  tokens"]
    return lines + [_latent_line(latent) for latent in [*comparison.latents, *comparison.others[:top]]]


def _segments(side: Side) -> list[str]:
    """A line per segment: the numbers at its end, and its text; then what follows the last end."""
    lines, text = [f"  {'S⁺':>7} {'S⁻':>7} {'reward':>8}  segment"], ""
    for unit in side.units:
        text += unit.text if unit.is_answer or unit.is_end else ""
        if unit.is_end:
            lines.append(f"  {unit.positive:7.2f} {unit.negative:7.2f} {unit.reward:+8.3f}  {visible(text)}")
            text = ""
    return [*lines, f"  {'':7} {'':7} {'':8}  {visible(text)}"] if text else lines


def _latent_line(latent: LatentDifference) -> str:
    sign = {"positive": "S⁺", "negative": "S⁻"}.get(latent.safety, "–")
    salience = "" if latent.salience is None else f"{latent.salience:+.2f}"
    tokens = " ".join(visible(token.strip()) for token in latent.tokens)
    return (
        f"{latent.neuron_id:20} {sign:2} {latent.chosen:7.3f} {latent.rejected:7.3f} {latent.contribution:+7.3f} "
        f"{salience:>6} {latent.rating or '–':^6}  {tokens}"
    ).rstrip()
