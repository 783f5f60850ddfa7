# contrib/bench throughput [--rounds N] [--mbit N] [--delay D] [IMAGE]: publishing and fetching one image, in MB of plain layer image
# a second, on a directory, on a Ceph cluster in memory, and on that behind a link; and beside it what limits them.
# shellcheck shell=bash

bench_throughput() {
    local name=${1:-big} round store endpoint
    step "Make and push $name" push_image "$name"
    step "Start Ceph" start_store
    endpoint=${AWS_ENDPOINT_URL#http://}
    start_link -registry "127.0.0.1:0=$REGISTRY" -listen "127.0.0.1:0=$endpoint"
    quiet_collector
    SPEEDY_PUBLISH_POLICY=off start_speedy
    start_containerd "$CONTAINERD_VERSION"
    pull_by ctr speedy "$name" >/dev/null
    on b node_make
    on b quiet_collector
    on b registry_host "$REGISTRY"
    SPEEDY_PUBLISH_POLICY=off on b start_speedy
    on b start_containerd "$CONTAINERD_VERSION"
    machine
    for ((round = 1; round <= ROUNDS; round++)); do
        for store in directory ceph link; do
            throughput_of "$store" "$name" "$endpoint" "$round"
        done
    done
    say
    table "$name" --digits 0
    say
    : >"$W/results"
    step "Measure the limits" limits "$name" "$endpoint"
    table limit --digits 0
}

# throughput_of STORE NAME ENDPOINT ROUND
throughput_of() {
    local url took plain key address=$AWS_ENDPOINT_URL
    link_post "link?mbit=0&delay=0"
    case $1 in
        directory) url=file://$W/store-$4; mkdir -p "$W/store-$4" ;;
        ceph) url=$SPEEDY_STORE-$4 ;;
        link) url=$SPEEDY_STORE-link-$4 address=http://$(link_address "$3"); link_post "link?mbit=$MBIT&delay=$DELAY" ;;
    esac
    restart_with "$address" --store "$url"
    cold
    # Of the command's own process: what the daemon does in the background is the same code.
    took=$(timed peak_of "$W/peak" "$SPEEDY" publish --json --root "$SPEEDY_ROOT" --store "$url" --containerd "$CONTAINERD_ADDRESS" \
        --namespace "$WORLD" "$(image "$2")")
    plain=$(jq '[.layers[].bytes] | add' "$W/peak.out")
    [[ $plain -gt 0 ]] || die "nothing was published: $(cat "$W/peak.out")"
    record "$1" "publish, MB/s" "$((plain / took / 1000))"
    record "$1" "stored, MB" "$(($(jq '[.layers[].uploaded_bytes] | add' "$W/peak.out") / 1000000))"
    record "$1" "publisher, MB of memory" "$(cat "$W/peak")"
    key=$("$SPEEDY" trust --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" | grep -oE 'ed25519:[A-Za-z0-9+/=_-]+' | head -n 1)
    SPEEDY_TRUST_KEYS=$key on b restart_with "$address" --store "$url"
    cold
    took=$(on b timed fetch_all "$2")
    on b all_fetched || die "layers were applied, not fetched"
    record "$1" "fetch, MB/s" "$((plain / took / 1000))"
    record "$1" "fetcher, MB of memory" "$(on b peak_memory)"
    note "round $4: $1: $plain bytes, fetched in $(seconds_of "$took") s"
    on b empty_node
    rm -rf "$W/store-$4"
}

all_fetched() {
    "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS" |
        jq -e '(if type == "object" then .layers else . end) | length > 0 and all(.[]; .origin == "fetched")' >/dev/null
}

# peak_of FILE COMMAND...: its peak memory in MB to FILE, what it prints to FILE.out.
peak_of() {
    python3 -c 'import resource, subprocess, sys
with open(sys.argv[1] + ".out", "w") as out:
    code = subprocess.call(sys.argv[2:], stdout=out)
with open(sys.argv[1], "w") as peak:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000, file=peak)
sys.exit(code)' "$@"
}

fetch_all() {
    pull_by ctr speedy "$1" && wait_for 600 "the layers' data" filled
}

# restart_with ENDPOINT FLAG...
restart_with() {
    daemon_stop "$(node_daemon speedy)"
    AWS_ENDPOINT_URL=$1 AWS_ENDPOINT=$1 SPEEDY_PUBLISH_POLICY=off start_speedy "${@:2}"
    wait_for 10 "containerd to find Speedy again" ctr snapshots --snapshotter speedy ls
}

# What bounds them: each for one core or for the whole device, of plain bytes where not said otherwise.
limits() {
    local sample="$W/sample" ratio
    # A part of the largest layer, as it is in the layer image.
    make_image "$1"
    (gzip -dc "$(find "$LAYOUT/blobs" -type f -printf '%s %p\n' | sort -rn | head -n 1 | cut -d' ' -f2)" 2>/dev/null || true) | head -c 268435456 >"$sample"
    local level
    for level in 3 6; do
        read -r ratio < <(zstd -b$level -e$level -i2 -B256KB --single-thread -q "$sample" 2>&1 | tail -n 1 | tr -s ' ')
        record "zstd -$level in 256 KiB pieces, one core" "MB/s" "$(grep -oE '[0-9.]+ MB/s' <<<"$ratio" | sed -n '1s/ .*//p')"
        record "zstd -$level decompressed, one core" "MB/s" "$(grep -oE '[0-9.]+ MB/s' <<<"$ratio" | sed -n '2s/ .*//p')"
    done
    if command -v b3sum >/dev/null; then
        record "BLAKE3, one core" "MB/s" "$((268435456 / $(timed b3sum --num-threads 1 "$sample") / 1000))"
    fi
    record "SHA-256 (openssl), one core" "MB/s" "$((268435456 / $(timed openssl dgst -sha256 "$sample") / 1000))"
    record "disk, written and synced" "MB/s" "$((1073741824 / $(timed dd if=/dev/zero of="$W/zeros" bs=4M count=256 conv=fdatasync) / 1000))"
    cold
    record "disk, read" "MB/s" "$((1073741824 / $(timed dd if="$W/zeros" of=/dev/null bs=4M) / 1000))"
    rm "$W/zeros" "$sample"
    python3 "$REPO/contrib/lib/s3.py" speed "s3://${SPEEDY_STORE#s3://}-speed" >"$W/speed"
    record "Ceph, 8 puts of 1 MiB at once (stored bytes)" "MB/s" "$(cut -d' ' -f1 "$W/speed")"
    record "Ceph, 8 gets of 1 MiB at once (stored bytes)" "MB/s" "$(cut -d' ' -f2 "$W/speed")"
    record "link (stored bytes)" "MB/s" "$((MBIT / 8))"
}
