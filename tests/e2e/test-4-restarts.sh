# Daemons that end, cleanly or not, while containers run.
# shellcheck shell=bash

# expect_unharmed ID: the container runs as before, reads its image, and keeps what it wrote.
expect_unharmed() {
    expect_equal RUNNING "$(task_state "$1")" "the state of $1"
    expect_equal "$(cat "$W/pid-$1")" "$(task_pid "$1")" "the first process of $1"
    expect_equal "kept" "$(ctr_exec "$1" cat /data/kept)" "what $1 wrote"
    ctr_exec "$1" sh -c 'sha256sum /special/big | grep -q fbbab289 && echo more >> /data/more && rm /data/more'
}

start_witness() {
    pull eight
    ctr_start "$1" eight
    task_pid "$1" >"$W/pid-$1"
    ctr_exec "$1" sh -c 'echo kept > /data/kept; rm -r /data/keep'
}

# A new container, a new pull, and the old container stopped and started again.
expect_going_on() {
    expect_equal "hello from tiny" "$(pull tiny && ctr_run --rm "$(image tiny)" "after-$1")" "a new container"
    expect_equal "eight" "$(ctr_run --rm "$(image eight)" "again-$1" cat /data/hello)" "a new container of the old image"
    ctr tasks kill -s SIGTERM "$1"
    wait_for 10 "the end of $1" task_stopped "$1"
    ctr tasks rm "$1"
    ctr tasks start --null-io --fifo-dir "$N/fifo" -d "$1"
    expect_equal kept "$(ctr_exec "$1" cat /data/kept)" "what $1 wrote, after its restart"
    ctr_remove "$1"
}

test_restart_containerd() {
    start_witness through-containerd
    daemon_stop containerd
    start_containerd "$VERSION"
    expect_unharmed through-containerd
    expect_going_on through-containerd
}

test_restart_speedy_by_sigterm() {
    local before after
    need_speedy
    start_witness through-sigterm
    before=$(ctr snapshots --snapshotter speedy ls | LC_ALL=C sort)
    daemon_stop speedy TERM
    # Running containers need no daemon. A new one fails at once, with a reason, and not half.
    expect_unharmed through-sigterm
    ! ctr_run --rm "$(image tiny)" nobody-there >"$W/error" 2>&1 || fail "a container started without a snapshotter"
    restart_speedy
    after=$(ctr snapshots --snapshotter speedy ls | LC_ALL=C sort)
    expect_equal "$before" "$after" "the snapshots after the restart"
    expect_unharmed through-sigterm
    expect_going_on through-sigterm
}

test_restart_speedy_by_kill() {
    local round puller
    need_speedy
    start_witness through-kill
    for round in 1 2 3; do
        # In the middle of work: a pull that is under way when the daemon dies may fail, and works again later.
        remove_image deep
        pull deep >/dev/null 2>&1 &
        puller=$!
        sleep "0.$((round * 3))"
        SIGNAL=KILL restart_speedy
        wait "$puller" || true
        expect_unharmed through-kill
    done
    pull deep
    expect_equal 128 "$(ctr_run --rm "$(image deep)" deep-again)" "an image whose pull was killed three times"
    expect_going_on through-kill
}

remove_image() { ctr images rm --sync "$(image "$1")" >/dev/null 2>&1 || true; }

test_second_speedy_is_refused() {
    need_speedy
    ! timeout 20 "$SPEEDY" serve --root "$SPEEDY_ROOT" --address "$W/other.sock" >"$W/error" 2>&1 || fail "a second daemon on one root"
    expect_contains "$(cat "$W/error")" "$SPEEDY_ROOT" "the message about the root"
    mkdir -p "$W/other-root"
    ! timeout 20 "$SPEEDY" serve --root "$W/other-root" --address "$SPEEDY_ADDRESS" >"$W/error" 2>&1 || fail "a second daemon on one socket"
    expect_contains "$(cat "$W/error")" "$SPEEDY_ADDRESS" "the message about the socket"
    pull tiny
}

test_removal_after_restarts_leaves_nothing() {
    remove_everything
    expect_nothing_left
}
