# Shared by every script under contrib/ and tests/e2e. Source it; it runs nothing by itself.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Plain output for a pipe or a CI log, a little colour for a terminal.
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' RESET=$'\e[0m'
else
    BOLD='' DIM='' RED='' GREEN='' YELLOW='' RESET=''
fi

say()  { printf '%s\n' "$*"; }
note() { printf '%s    %s%s\n' "$DIM" "$*" "$RESET"; }
warn() { printf '%swarning: %s%s\n' "$YELLOW" "$*" "$RESET" >&2; }
die()  { printf '%serror: %s%s\n' "$RED" "$*" "$RESET" >&2; exit 1; }

now_ms() { date +%s%3N; }
# seconds_since MS: "3.4", for a start taken with now_ms.
seconds_since() {
    local ms=$(($(now_ms) - $1))
    printf '%d.%d' $((ms / 1000)) $((ms % 1000 / 100))
}

# step TITLE COMMAND...: says what it does, does it, says how long it took.
step() {
    local title=$1 start
    shift
    start=$(now_ms)
    printf '%s==>%s %s\n' "$BOLD" "$RESET" "$title"
    "$@"
    note "done in $(seconds_since "$start") s"
}

# as_root COMMAND...: runs it as root, through sudo when we are somebody else.
as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        command -v sudo >/dev/null || die "this needs root for: $*; run it as root, or install sudo"
        sudo -- "$@"
    fi
}

# Starts SCRIPT again as root if we are not root. The caches stay those of the calling user,
# so that what he built is found and what is missing is not built twice.
become_root() {
    ((EUID == 0)) && return 0
    command -v sudo >/dev/null || die "mounts and containers need root: run this as root, or install sudo"
    say "Mounts and containers need root; continuing through sudo."
    exec sudo -- env "PATH=$PATH" "HOME=$HOME" "SPEEDY_TOOLS=$SPEEDY_TOOLS" "SPEEDY_AS_ROOT=1" "$@"
}

# version_at_least HAVE WANT
version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1) == "$2" ]]; }

# wait_for SECONDS WHAT COMMAND...: polls until COMMAND succeeds.
wait_for() {
    local limit=$1 what=$2 deadline
    shift 2
    deadline=$(($(now_ms) + limit * 1000))
    until "$@" >/dev/null 2>&1; do
        if (($(now_ms) > deadline)); then
            warn "gave up waiting for $what after $limit s"
            return 1
        fi
        sleep 0.05
    done
}
