# contrib/bench second-node [--rounds N] [--store ceph|versity] [--mbit N] [--delay D] [IMAGE...]: a second node starts an image that the first one has
# published. Registry and store are behind one link, by default 1000 Mbit/s and 1 ms each way; `overlayfs`
# from the registry and `speedy` from the store in turn, by `nerdctl run --pull always` until the program's first line.
# shellcheck shell=bash

bench_second_node() {
    local name snapshotter round took names=("$@")
    ((${#names[@]})) || names=(python big)
    second_node "${names[@]}"
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for snapshotter in overlayfs speedy; do
                cold
                link_post reset
                took=$(on b ready "$snapshotter" "$name")
                record "$name" "$snapshotter: ready, s" "$(seconds_of "$took")"
                record "$name" "$snapshotter: MB over the link" "$(link_counters '.down / 1000000 | floor')"
                note "round $round: $name on $snapshotter: ready after $(seconds_of "$took") s"
                on b empty_node
            done
        done
    done
    say
    table "second node" --ratio "ratio=speedy: ready, s/overlayfs: ready, s"
    say
    say "The second node's daemon used $(on b peak_memory) MB at most."
}
