# What the end-to-end tests share: the little runner, and checks in words.
# shellcheck shell=bash
#
# A test is a function test_NAME in a file tests/e2e/test-*.sh. It runs in a subshell with `set -e`,
# so the first command that fails fails it; `skip WHY` ends it as skipped. State that outlives a test
# (daemons, images) is in $W.

PASSED=0 FAILED=0 SKIPPED=0
SKIP_STATUS=77
TEST_LIMIT=${TEST_LIMIT:-180} # seconds for one test

skip() {
    printf '%s\n' "$*" >"$W/skip"
    exit "$SKIP_STATUS"
}

need_speedy() { [[ $SNAPSHOTTER == speedy ]] || skip "this is about Speedy itself"; }

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}

# end_test: of whatever still runs of the current test, nothing goes on.
end_test() {
    local group
    for group in ${TEST_GROUP:-} ${WATCH_GROUP:-}; do
        kill -KILL -- "-$group" 2>/dev/null || true
        wait "$group" 2>/dev/null || true
    done
    TEST_GROUP='' WATCH_GROUP=''
}

run_test() {
    local name=$1 log="$W/test.log" start status=0
    start=$(now_ms)
    # In a process group of its own (set -m), so that all of it ends if it takes too long.
    set -m
    (
        set -eE
        trap 'echo "FAILED at ${BASH_SOURCE[0]##*/}:$LINENO: $BASH_COMMAND (status $?)" >&2' ERR
        "$name"
    ) >"$log" 2>&1 </dev/null &
    TEST_GROUP=$!
    (sleep "$TEST_LIMIT" && echo "took more than $TEST_LIMIT s" >>"$log" && kill -KILL -- "-$TEST_GROUP") >/dev/null 2>&1 &
    WATCH_GROUP=$!
    set +m
    wait "$TEST_GROUP" 2>/dev/null || status=$?
    end_test
    case $status in
        0)
            PASSED=$((PASSED + 1))
            printf '%sok%s      %s (%s s)\n' "$GREEN" "$RESET" "${name#test_}" "$(seconds_since "$start")"
            ;;
        "$SKIP_STATUS")
            SKIPPED=$((SKIPPED + 1))
            printf '%sSKIPPED%s %s: %s\n' "$YELLOW" "$RESET" "${name#test_}" "$(cat "$W/skip")"
            ;;
        *)
            FAILED=$((FAILED + 1))
            printf '%sFAILED%s  %s (%s s)\n' "$RED" "$RESET" "${name#test_}" "$(seconds_since "$start")"
            { grep -v DEPRECATION "$log" || true; } | tail -n 40 | sed 's/^/        /'
            ;;
    esac
    # A test that failed half-way must not fail the next one.
    ((status == 0)) || [[ -z ${AFTER_FAILURE:-} ]] || "$AFTER_FAILURE"
}

# expect_equal WANT GOT WHAT
expect_equal() {
    [[ $1 == "$2" ]] && return 0
    printf 'want: %s\ngot:  %s\n' "$1" "$2" >&2
    fail "$3"
}

expect_contains() {
    [[ $1 == *"$2"* ]] && return 0
    printf 'want: ...%s...\ngot:  %s\n' "$2" "$1" >&2
    fail "$3"
}

# same_files WANT GOT WHAT
same_files() {
    cmp -s "$1" "$2" && return 0
    { diff -u "$1" "$2" || true; } | cut -c1-300 | head -n 30 >&2
    fail "$3"
}

image() { printf '%s/%s:1' "$REGISTRY" "$1"; }

# pull NAME [FLAG...]: with the snapshotter under test.
pull() {
    local name=$1
    shift
    ctr images pull --hosts-dir "$N/certs.d" --snapshotter "${ON:-$SNAPSHOTTER}" "$@" "$(image "$name")" >"$N/pull.log" 2>&1 && return
    tail -n 1 "$N/pull.log" >&2
    fail "cannot pull $name"
}

# What a process in a container prints goes to a file that the shim writes, and from there to us. ctr itself cancels a pipe
# that is not open yet when the process has ended already, which on a busy machine loses the output of short commands.
printed_to() {
    local log=$1 status=0
    shift
    "$@" --log-uri "file://$log" "${REST[@]}" || status=$?
    cat "$log" 2>/dev/null || true
    rm -f "$log"
    return "$status"
}

# ctr_run FLAGS... IMAGE ID COMMAND...: a container without a network, on the snapshotter under test; waits for its end.
ctr_run() {
    local REST=("$@")
    printed_to "$W/out-$RANDOM$RANDOM" ctr run --snapshotter "${ON:-$SNAPSHOTTER}"
}

# ctr_start ID IMAGE [FLAG...]: in the background, waiting for a signal.
ctr_start() {
    local id=$1 name=$2
    shift 2
    ctr run --snapshotter "${ON:-$SNAPSHOTTER}" --null-io -d "$@" "$(image "$name")" "$id" \
        /bin/sh -c "trap 'exit 0' TERM INT; while :; do sleep 1000 & wait \$!; done"
}

# ctr_exec ID COMMAND...
ctr_exec() {
    local REST=("$@") name="x$RANDOM$RANDOM"
    printed_to "$W/out-$name" ctr tasks exec --exec-id "$name"
}

task_pid() { ctr tasks ls | awk -v id="$1" '$1 == id { print $2 }'; }
task_state() { ctr tasks ls | awk -v id="$1" '$1 == id { print $3 }'; }
task_stopped() { [[ $(task_state "$1") == STOPPED ]]; }

# ctr_remove ID...: the container and, with it, its snapshot.
ctr_remove() {
    local id
    for id in "$@"; do
        ctr tasks kill -s SIGTERM "$id" >/dev/null 2>&1 || true
        wait_for 10 "the end of $id" task_stopped "$id" || ctr tasks kill -s SIGKILL "$id" || true
        ctr tasks rm -f "$id" >/dev/null
        ctr containers rm "$id"
    done
}

# metrics_address: where this node's Speedy shows its metrics.
metrics_address() {
    [[ -e $N/metrics ]] || echo "127.0.0.1:$(free_port)" >"$N/metrics"
    cat "$N/metrics"
}

# restart_speedy [FLAG...]: with other flags or environment.
restart_speedy() {
    daemon_stop "$(node_daemon speedy)" "${SIGNAL:-TERM}"
    start_speedy --metrics "$(metrics_address)" "$@"
    # containerd tries again on its own, at most three seconds apart.
    wait_for 10 "containerd to find Speedy again" speedy_is_reached
}

# layer_directories: those of the snapshotter under test that hold anything, and layer images. Speedy keeps a few
# empty directories ready, which are no leftovers.
layer_directories() {
    local top=$SPEEDY_ROOT/l
    [[ $SNAPSHOTTER != speedy ]] || find "$SPEEDY_ROOT/layer" -type f 2>/dev/null
    [[ $SNAPSHOTTER == speedy ]] || top=$W/lib/io.containerd.snapshotter.v1.$SNAPSHOTTER/snapshots
    find "$top" -mindepth 3 -maxdepth 3 -path '*/fs/*' -printf '%h\n' 2>/dev/null | sort -u
}

speedy_check() {
    "$SPEEDY" check --json --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" --containerd "$CONTAINERD_ADDRESS" \
        --containerd-config "$N/containerd.toml"
}

store_is_consistent() {
    [[ $SNAPSHOTTER != speedy ]] || [[ $(speedy_check | jq -r .store.consistent) == true ]]
}

nothing_is_left() { [[ -z $(layer_directories) ]] && store_is_consistent; }

# expect_nothing_left: no snapshot in any namespace and no directory with content on the disk.
expect_nothing_left() {
    local namespace
    if ! wait_for 20 "an empty disk" nothing_is_left; then
        layer_directories >&2
        [[ $SNAPSHOTTER != speedy ]] || speedy_check >&2 || true
        fail "directories are left, or the store is not consistent"
    fi
    for namespace in $(namespaces); do
        expect_equal "" "$(NAMESPACE=$namespace ctr snapshots --snapshotter "$SNAPSHOTTER" ls | tail -n +2)" "snapshots are left in $namespace"
    done
}

# remove_snapshots: gives those that a test made to the next garbage collection. Not by name: once a collection has taken a
# view, containerd goes on counting it as a child and refuses to remove its parent.
remove_snapshots() {
    local name
    for name in $(ctr snapshots --snapshotter "$SNAPSHOTTER" ls | awk 'NR > 1 && $1 !~ /^sha256:/ { print $1 }'); do
        ctr snapshots --snapshotter "$SNAPSHOTTER" label "$name" containerd.io/gc.root= >/dev/null 2>&1 || true
    done
    ctr content prune references >/dev/null 2>&1 || true
}

# remove_everything: every container and image, then a garbage collection.
remove_everything() {
    local namespace images
    remove_containers
    remove_snapshots
    for namespace in $(namespaces); do
        images=$(NAMESPACE=$namespace ctr images ls -q)
        # shellcheck disable=SC2086 # a list of references without spaces
        [[ -z $images ]] || NAMESPACE=$namespace ctr images rm --sync $images >/dev/null
    done
}
