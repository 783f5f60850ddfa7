# Stages of a test run: each is timed, logged and counted, and a failing one does not stop the next.
# shellcheck shell=bash

STAGE_LOGS=$(mktemp -d "${TMPDIR:-/tmp}/speedy-stages.XXXXXX")
STAGE_ROWS=()
TOTAL_PASSED=0 TOTAL_FAILED=0 TOTAL_SKIPPED=0

# Each counter reads a log and prints "PASSED FAILED SKIPPED".

# cargo test: "test result: ok. 12 passed; 0 failed; 1 ignored; ...", one line for each binary.
count_cargo() {
    awk '/^test result:/ { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed/) f += $(i-1); if ($i ~ /^ignored/) s += $(i-1) } }
        END { print p + 0, f + 0, s + 0 }' "$1"
}

# go test -v: every test that has no subtests of its own.
count_go() {
    awk '/^ *--- (PASS|FAIL|SKIP): / { result[$3] = $2; name = $3; while (sub(/\/[^\/]*$/, "", name)) parent[name] = 1 }
        END { for (t in result) if (!(t in parent)) n[result[t]]++; print n["PASS:"] + 0, n["FAIL:"] + 0, n["SKIP:"] + 0 }' "$1"
}

# A script of ours: its closing line.
count_line() {
    awk '/^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { p = $1; f = $3; s = $5 } END { print p + 0, f + 0, s + 0 }' "$1"
}

# One check that passes or fails as a whole.
count_one() { echo "1 0 0"; }

# stage COUNTER NAME COMMAND...
stage() {
    local counter=$1 name=$2 log start seconds status=0 passed failed skipped
    shift 2
    log=$STAGE_LOGS/${#STAGE_ROWS[@]}.log
    start=$(now_ms)
    printf '\n%s== %s%s\n' "$BOLD" "$name" "$RESET"
    # Go announces every test before its result; that is left out on the way to the eye.
    { "$@" </dev/null 2>&1 || echo $? >"$log.status"; } | tee "$log" | { grep -v '^=== ' || true; }
    [[ ! -e $log.status ]] || status=$(cat "$log.status")
    seconds=$(seconds_since "$start")
    read -r passed failed skipped < <("count_$counter" "$log")
    if ((status != 0 && failed == 0)); then
        # It did not build, or ended in the middle: nothing of it can be called passed by guesswork.
        failed=1
        [[ $counter != one ]] || passed=0
    elif ((status == 0 && passed + failed + skipped == 0)); then
        warn "$name passed without a single test"
        failed=1
    fi
    STAGE_ROWS+=("$(printf '%-28s %9s %8d %8d %8d' "$name" "$seconds" "$passed" "$failed" "$skipped")")
    TOTAL_PASSED=$((TOTAL_PASSED + passed)) TOTAL_FAILED=$((TOTAL_FAILED + failed)) TOTAL_SKIPPED=$((TOTAL_SKIPPED + skipped))
}

# stages_end: the table, the closing line, and the status for `exit`.
stages_end() {
    printf '\n%s%-28s %9s %8s %8s %8s%s\n' "$BOLD" stage seconds passed failed skipped "$RESET"
    printf '%s\n' "${STAGE_ROWS[@]}"
    rm -rf "$STAGE_LOGS"
    printf '\n%d passed, %d failed, %d skipped\n' "$TOTAL_PASSED" "$TOTAL_FAILED" "$TOTAL_SKIPPED"
    ((TOTAL_FAILED == 0))
}
