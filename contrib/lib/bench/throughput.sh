# contrib/bench throughput [--rounds N] [--store ceph|versity] [--mbit N] [--delay D] [IMAGE]: publishing and fetching one image, in MB of plain layer image
# a second, on a directory, on a store in memory, and on that behind a link; and beside it what limits them.
# shellcheck shell=bash

bench_throughput() {
    local name=${1:-big} round store endpoint
    step "Make and push $name" push_image "$name"
    step "Start the store ($STORE)" start_store
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
        for store in directory "$STORE" link; do
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
    local url took plain key before busy address=$AWS_ENDPOINT_URL
    link_post "link?mbit=0&delay=0"
    case $1 in
        directory) url=file://$W/store-$4; mkdir -p "$W/store-$4" ;;
        link) url=$SPEEDY_STORE-link-$4 address=http://$(link_address "$3"); link_post "link?mbit=$MBIT&delay=$DELAY" ;;
        *) url=$SPEEDY_STORE-$4 ;;
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
    key=$(own_key)
    SPEEDY_TRUST_KEYS=$key on b restart_with "$address" --store "$url"
    cold
    before=$(processor_time)
    took=$(on b timed fetch_all "$2")
    busy=$(busy_since "$before")
    on b all_fetched || die "layers were applied, not fetched"
    record "$1" "fetch, MB/s" "$((plain / took / 1000))"
    record "$1" "processors busy in the fetch, %" "$busy"
    record "$1" "fetcher, MB of memory" "$(on b peak_memory)"
    note "round $4: $1: $plain bytes, fetched in $(seconds_of "$took") s"
    on b empty_node
    case $1 in
        directory) rm -rf "$W/store-$4" ;;
        # The last one is a limit's.
        link) PLAIN=$plain; (($4 == ROUNDS)) || clear_store "$url" ;;
        # The cluster has room for little more than two of them.
        *) clear_store "$url" ;;
    esac
}

# processor_time: of all processors since the machine started, in ticks: not idle, and altogether.
processor_time() { awk '$1 == "cpu" { all = 0; for (n = 2; n <= 9; n++) all += $n; print all - $5 - $6, all }' /proc/stat; }
# busy_since WHAT-PROCESSOR_TIME-SAID: percent of all processors.
busy_since() { awk -v before="$1" '{ split(before, b); printf "%d", 100 * ($1 - b[1]) / ($2 - b[2]) }' <<<"$(processor_time)"; }

# spent_since WHAT-PROCESSOR_TIME-SAID: seconds of all processors together.
spent_since() { awk -v before="$1" -v tick="$(getconf CLK_TCK)" '{ split(before, b); print ($1 - b[1]) / tick }' <<<"$(processor_time)"; }

clear_store() { timed python3 "$REPO/contrib/lib/s3.py" rm-all "$1/" >/dev/null; }

all_fetched() {
    "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS" |
        jq -e 'length > 0 and all(.[]; .origin == "fetched")' >/dev/null
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
    pull_by ctr speedy "$1" && filled 600
}

# restart_with ENDPOINT FLAG...
restart_with() {
    daemon_stop "$(node_daemon speedy)"
    AWS_ENDPOINT_URL=$1 AWS_ENDPOINT=$1 SPEEDY_PUBLISH_POLICY=off start_speedy "${@:2}"
    wait_for 10 "containerd to find Speedy again" ctr snapshots --snapshotter speedy ls
}

# What bounds them: each for one core or for the whole device, of plain bytes where not said otherwise.
limits() {
    local sample="$W/sample" ratio decompress hash
    # A part of the largest layer, as it is in the layer image.
    make_image "$1"
    (gzip -dc "$(find "$LAYOUT/blobs" -type f -printf '%s %p\n' | sort -rn | head -n 1 | cut -d' ' -f2)" 2>/dev/null || true) | head -c 268435456 >"$sample"
    local level
    for level in 3 6; do
        read -r ratio < <(zstd -b$level -e$level -i2 -B512KB --single-thread -q "$sample" 2>&1 | tail -n 1 | tr -s ' ')
        record "zstd -$level in 512 KiB pieces, one core" "MB/s" "$(grep -oE '[0-9.]+ MB/s' <<<"$ratio" | sed -n '1s/ .*//p')"
        decompress=$(grep -oE '[0-9.]+ MB/s' <<<"$ratio" | sed -n '2s/ .*//p')
        record "zstd -$level decompressed, one core" "MB/s" "$decompress"
    done
    hash=$((268435456 / $(timed b3sum --num-threads 1 "$sample") / 1000))
    record "BLAKE3, one core" "MB/s" "$hash"
    record "SHA-256 (openssl), one core" "MB/s" "$((268435456 / $(timed openssl dgst -sha256 "$sample") / 1000))"
    rm "$sample"
    disk_limits
    same_objects "$2" "$decompress" "$hash"
    python3 "$REPO/contrib/lib/s3.py" speed "s3://${SPEEDY_STORE#s3://}-speed" >"$W/speed"
    record "$STORE, 8 puts of 1 MiB at once (stored bytes)" "MB/s" "$(cut -d' ' -f1 "$W/speed")"
    record "$STORE, 8 gets of 1 MiB at once (stored bytes)" "MB/s" "$(cut -d' ' -f2 "$W/speed")"
    record "link (stored bytes)" "MB/s" "$((MBIT / 8))"
}

# disk_limits: through the page cache and past it, as a fetch writes and reads back. DISK_SPENT is what the latter two take of the
# processors, in seconds a GiB.
disk_limits() {
    local file=$W/zeros before past="disk, past the page cache in 512 KiB pieces"
    record "disk, written by dd and synced" "MB/s" "$((1073741824 / $(timed dd if=/dev/zero of="$file" bs=4M count=256 conv=fdatasync) / 1000))"
    rm "$file"
    cold
    before=$(processor_time)
    record "$past, written" "MB/s" "$((1073741824 / $(timed dd if=/dev/zero of="$file" bs=512K count=2048 oflag=direct conv=fdatasync) / 1000))"
    record "$past, read" "MB/s" "$((1073741824 / $(timed dd if="$file" of=/dev/null bs=512K iflag=direct) / 1000))"
    DISK_SPENT=$(spent_since "$before")
    rm "$file"
}

# same_objects ENDPOINT DECOMPRESS HASH: what the gateway gives for the very chunks that a fetch takes, as many requests at once as it has
# threads, to a client that checks and writes nothing; directly and through the link. And what the processors give, which store and client
# share: were they busy all the time with nothing but that, with decompressing and hashing each byte once, at so many MB a second each, and
# with writing it to the disk and reading it back once.
same_objects() {
    local url=$SPEEDY_STORE-link-$ROUNDS way row address stored took turn before spent
    link_post "link?mbit=$MBIT&delay=$DELAY"
    python3 "$REPO/contrib/lib/s3.py" ls "$url/chunks/" >"$W/chunks"
    stored=$(awk '{ sum += $1 } END { print sum }' "$W/chunks")
    for turn in 1 2 3; do
        for way in "$STORE" link; do
            address=$1
            [[ $way == "$STORE" ]] || address=$(link_address "$1")
            (umask 077 && curl_list "http://$address" <"$W/chunks" >"$W/curl")
            row="$way, the same objects by curl, nothing checked or written"
            cold
            before=$(processor_time)
            took=$(timed take_all "$stored")
            spent=$(spent_since "$before")
            record "$way, processors: for curl's run, and to decompress, hash, write and read back each byte once, plain bytes" "MB/s" \
                "$(awk -v mb="$((PLAIN / 1000000))" -v spent="$spent" -v d="$2" -v h="$3" -v disk="$DISK_SPENT" -v n="$(nproc)" \
                    'BEGIN { printf "%d", mb / ((spent + mb / d + mb / h + mb * disk / 1073.741824) / n) }')"
            record "$row, stored bytes" "MB/s" "$((stored / took / 1000))"
            record "$row, plain bytes" "MB/s" "$((PLAIN / took / 1000))"
            note "turn $turn: $way: $stored bytes in $(wc -l <"$W/chunks") objects by curl in $(seconds_of "$took") s"
        done
    done
    rm "$W/curl"
}

# curl_list ADDRESS: a configuration of curl, which keeps the key off the command line. This curl signs no hash of the body by itself.
curl_list() {
    printf 'user = "%s:%s"\naws-sigv4 = "aws:amz:%s:s3"\nheader = "x-amz-content-sha256: UNSIGNED-PAYLOAD"\n' \
        "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" "$AWS_REGION"
    awk -F '\t' -v at="$1/$(cut -d/ -f3 <<<"$SPEEDY_STORE")" '{ printf "url = \"%s/%s\"\noutput = \"/dev/null\"\n", at, $2 }'
}

# take_all BYTES: must be so many.
take_all() {
    local got
    got=$(curl -sSf -Z --parallel-max 64 -K "$W/curl" -w '%{size_download}\n' 2>>"$W/commands.log" | awk '{ sum += $1 } END { print sum }')
    [[ $got == "$1" ]] || die "curl took $got bytes of $1"
}
