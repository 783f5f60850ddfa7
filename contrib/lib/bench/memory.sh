# contrib/bench memory [--store ceph|versity] [COUNT]: COUNT images (100) of 50,000 files each, which another node has published, on a node that
# has all of them mounted while next to nothing of their data is here (the link gives 20 Mbit/s), and when it is: what the daemon takes.
# shellcheck shell=bash

bench_memory() {
    local count=${1:-100} number name names=()
    for ((number = 1; number <= count; number++)); do names+=("wide-$number"); done
    step "Make and push $count images of 50,000 files" make_images "${names[@]}"
    publish_pushed "${names[@]}"
    on b start_behind_link "$ENDPOINT" "$KEY"
    machine
    record "daemon, MB" "before the first image" "$(on b resident_memory)"
    link_post "link?mbit=20&delay=1ms"
    step "Pull and mount them" on b mount_names "${names[@]}"
    say "$(on b cold_layers | jq -r '"\(length) layers are read lazily, of \(map(.inodes) | add) files; \(map(.percent) | add / length | floor) % of them is here."')"
    record "daemon, MB" "all mounted, cold" "$(on b resident_memory)"
    link_post "link?mbit=0&delay=0"
    on b filled 600
    record "daemon, MB" "all here" "$(on b resident_memory)"
    sleep 20
    record "daemon, MB" "20 s later" "$(on b resident_memory)"
    record "daemon, MB" "at most" "$(on b peak_memory)"
    on b unmount_names "${names[@]}"
    say
    table "$count images of 50,000 files" --digits 0
}

mount_names() {
    local name
    for name in "$@"; do
        pull_by ctr speedy "$name" >/dev/null
        mkdir -p "$W/at/$name"
        ctr images mount --snapshotter speedy "$(image "$name")" "$W/at/$name" >/dev/null
    done
}
unmount_names() {
    local name
    for name in "$@"; do ctr images unmount --rm "$W/at/$name" >/dev/null || true; done
}
cold_layers() {
    "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS" | jq 'map(select(.lazy))'
}
