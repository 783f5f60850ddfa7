# contrib/bench full-read [--rounds N] [--store ceph|versity] [--mbit N] [--delay D] [IMAGE...]: an image that is not there is pulled, mounted, and
# every byte of it read once, by tar. Another node has published it. Registry and store are behind one link, by default 1000 Mbit/s and 1 ms each way;
# `overlayfs`, and `speedy` in turn with fetch.lazy off (`eager`) and on (`lazy`).
# shellcheck shell=bash

bench_full_read() {
    local name how round took names=("$@")
    ((${#names[@]})) || names=(python big)
    second_node "${names[@]}"
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for how in overlayfs eager lazy; do
                on b restart_as "$how" "$ENDPOINT"
                cold
                link_post reset
                took=$(on b timed read_whole "$(snapshotter_of "$how")" "$name")
                record "$name" "$how: s" "$(seconds_of "$took")"
                record "$name" "$how: MB over the link" "$(link_counters '.down / 1000000 | floor')"
                note "round $round: $name, $how: read after $(seconds_of "$took") s"
                on b empty_node
            done
        done
    done
    say
    table "full read of an absent image" --ratio "eager:=eager: s/overlayfs: s" --ratio "lazy:=lazy: s/overlayfs: s"
    say
    say "The second node's daemon used $(on b peak_memory) MB at most."
}

# read_whole SNAPSHOTTER NAME
read_whole() {
    pull_by ctr "$1" "$2" || return 1
    mkdir -p "$W/tree"
    ctr images mount --snapshotter "$1" "$(image "$2")" "$W/tree" || return 1
    # Every way has to show as much.
    tar -C "$W/tree" -cf - . | wc -c >>"$W/read.$2" || return 1
    (($(sort -u "$W/read.$2" | wc -l) == 1)) || die "the trees of $2 differ: $(tr '\n' ' ' <"$W/read.$2")bytes"
    ctr images unmount --rm "$W/tree"
}
