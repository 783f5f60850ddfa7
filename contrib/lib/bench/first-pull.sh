# contrib/bench first-pull [--rounds N] [IMAGE...]: the first pull of an unmodified image. Through one containerd from one
# registry on this machine, `overlayfs` with the walking differ and `speedy` with its own in turn, by ctr (the transfer service)
# and by nerdctl. Nothing is published meanwhile.
# shellcheck shell=bash

bench_first_pull() {
    local name client snapshotter round took names=("$@")
    ((${#names[@]})) || names=(big small-files)
    for name in "${names[@]}"; do step "Make and push $name" push_image "$name"; done
    quiet_collector
    start_speedy
    start_containerd "$CONTAINERD_VERSION"
    machine
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for client in ctr nerdctl; do
                for snapshotter in overlayfs speedy; do
                    cold
                    took=$(timed pull_by "$client" "$snapshotter" "$name")
                    record "$name, $client" "$snapshotter, s" "$(seconds_of "$took")"
                    note "round $round: $name by $client on $snapshotter: $(seconds_of "$took") s"
                    empty_node
                done
            done
        done
    done
    say
    table "first pull" --ratio "ratio=speedy, s/overlayfs, s"
    say
    say "The daemon used $(peak_memory) MB at most."
}
