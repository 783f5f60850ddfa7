# contrib/bench store-size: what a family of images takes on the store, against the registry's distinct gzip blobs. The images are
# published one after the other; each is a rebuild of the one before, with another version of one package.
# shellcheck shell=bash

bench_store_size() {
    local name blobs='' store=$W/store chunks
    for name in $(image_names family); do step "Make and push $name" push_image "$name"; done
    mkdir "$store"
    quiet_collector
    start_speedy --store "file://$store"
    start_containerd "$CONTAINERD_VERSION"
    for name in $(image_names family); do
        step "Pull and publish $name" publish_one "$name"
        make_image "$name"
        blobs+=$(jq -r '.layers[] | "\(.digest) \(.size)"' "$(manifest_file)")$'\n'
        record "$name" "registry, MB" "$(sort -u <<<"$blobs" | awk '{ sum += $2 } END { printf "%.1f", sum / 1e6 }')"
        chunks=$(bytes_below "$store/chunks")
        record "$name" "store, MB" "$(awk -v n="$(bytes_below "$store")" 'BEGIN { printf "%.1f", n / 1e6 }')"
        record "$name" "of that no chunks, MB" "$(awk -v n="$(($(bytes_below "$store") - chunks))" 'BEGIN { printf "%.2f", n / 1e6 }')"
        record "$name" "chunks" "$(find "$store/chunks" -type f | wc -l)"
    done
    say
    table "images so far, up to" --ratio "ratio=store, MB/registry, MB" --digits 1
}

publish_one() {
    pull_by ctr speedy "$1" >/dev/null
    wait_for 600 "publishing" published
}
bytes_below() { find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }
