# contrib/bench dedup [-- OPTIONS OF THE TABLE]: what each way of cutting would make of the image family on the store; nothing runs.
# The table's options: --levels 3,6, --only PART, --extras (deltas against similar chunks).
# shellcheck shell=bash

bench_dedup() {
    local name digest size number=0 dir=$W/layers
    mkdir "$dir"
    for name in $(image_names family); do
        step "Make $name" make_image "$name"
        while read -r digest size; do
            compgen -G "$dir/*-$digest.tar" >/dev/null && continue
            # In the order in which they would be published.
            printf -v number '%03d' "$((10#$number + 1))"
            gzip -dc "$LAYOUT/blobs/sha256/$digest" >"$dir/$number-$digest.tar"
            printf '%s\n' "$size" >"$dir/$number-$digest.gzip-size"
        done < <(jq -r '.layers[] | "\(.digest | ltrimstr("sha256:")) \(.size)"' "$(manifest_file)")
    done
    machine
    "$BENCH" "$@" "$dir"
}
