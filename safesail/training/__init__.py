"""From activations to a sweep of SAEs, their fidelity, and the one to keep per hook point."""
