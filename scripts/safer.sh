#!/usr/bin/env bash
# SAFER on this machine: install, fetch what the demos are made of, make runs/safer-demo. About twenty minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

usage() {
  cat <<'TEXT'
usage: bash scripts/safer.sh [RECIPE [OPTION ...]]

Trains a reward model from human-scored answers and its SAE, finds the latents that separate safe from unsafe answers,
edits the preference data by them, retrains and compares. A second call goes on from where the first one stopped.

  RECIPE   another recipe (default: hub/recipes/safer-demo.toml), as hub/recipes/safer-llama3.2-1b.toml
  OPTION   options of `safesail run`, as --dry-run or --set reward.epochs=1
TEXT
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac

install_once gguf,space
recipe=${1:-hub/recipes/safer-demo.toml}
shift || true
if [ "$recipe" = hub/recipes/safer-demo.toml ]; then
  if [ ! -f demo-assets/preferences/safety.jsonl ]; then
    say "fetching two small models, texts and preference pairs into demo-assets/ (230 MB, about a minute)"
  fi
  .venv/bin/python scripts/fetch_assets.py demo-assets >/dev/null
fi
exec .venv/bin/safesail run "$recipe" "$@"
