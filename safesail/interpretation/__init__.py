"""From latents to explanations and scores: examples, explaining, simulation."""
