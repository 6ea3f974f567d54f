"""`python -m safesail.cli`."""

from safesail.cli import main

main()
