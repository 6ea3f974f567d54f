# Sourced by `demo` and `test`: finds Python, makes .venv, installs with the versions of constraints.txt.
# Works in the repository's root; every function ends the script with one sentence when it cannot do its work.

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$(basename "$0"): $*"
  exit 2
}

# Prints the first Python of at least 3.11; $PYTHON goes before all others.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python of at least 3.11; set it to one that is"
  done
  fail "no Python of at least 3.11 was found; install one, or name it: PYTHON=/path/to/python3.11 bash scripts/$(basename "$0")"
}

# Makes .venv unless a usable one is there.
ensure_venv() {
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version) (a few seconds)"
    "$python" -m venv --clear .venv || fail "$python could not make .venv; on Debian: apt-get install python3-venv"
  fi
}

# install_once EXTRAS: installs safesail[EXTRAS] in .venv, and nothing when the stamp says that this was done already.
install_once() {
  local stamp=".venv/safesail-$1.stamp" wanted
  wanted="$PWD $1 $(cat pyproject.toml scripts/constraints.txt | cksum)"
  if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  ensure_venv
  say "installing safesail[$1] in .venv (two to four minutes the first time, seconds when it is only checked)"
  # torch first and exactly: a plain `torch` brings gigabytes of CUDA along
  pip_install "$(grep '^torch==' scripts/constraints.txt)"
  pip_install -c scripts/constraints.txt -e ".[$1]"
  printf '%s\n' "$wanted" >"$stamp"
}

pip_install() {
  .venv/bin/python -m pip install -q --disable-pip-version-check "$@" ||
    fail "pip could not install ${*: -1} (its message is above); check the network and run the same command again"
}
