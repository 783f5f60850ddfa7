# contrib/bench warm [--rounds N] [IMAGE]: reads of an image that is wholly on the node. The image came from a store, lazily; `switched` was mounted
# before its data was here, as by a container that started then, `mounted` when all of it was, as by every later one; beside them the same image
# on `overlayfs`, unpacked on the same disk. Each measure is taken twice on each: with the page cache dropped (`disk`), and once more with what
# the first left there (`memory`). Each round begins with another one.
# shellcheck shell=bash

bench_warm() {
    local name=${1:-big} round tree measure largest files bytes trees=(overlayfs switched mounted)
    step "Make and push $name" push_image "$name"
    publish_to "file://$W/store" "$name"
    step "Unpack it on overlayfs, and fetch it, on the second node" on b warm_node "$name"
    machine
    largest=$(cd "$W/tree-overlayfs" && find . -type f -printf '%s %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
    files=$(find "$W/tree-overlayfs" | wc -l)
    bytes=$(du -sb "$W/tree-overlayfs" | cut -f1)
    say "$files files, $((bytes / 1000000)) MB; the largest is $largest, $(($(stat -c %s "$W/tree-overlayfs/$largest") / 1000000)) MB."
    for ((round = 1; round <= ROUNDS; round++)); do
        for measure in find stat tar sequential random; do
            for tree in "${trees[@]}"; do
                cold
                warm_measure "$measure" disk "$tree"
                warm_measure "$measure" memory "$tree"
            done
        done
        trees=("${trees[@]:1}" "${trees[0]}")
    done
    say
    table "warm reads" --ratio "switched:=switched/overlayfs" --ratio "mounted:=mounted/overlayfs" --digits 0
    on b warm_end
}

# warm_node NAME: the image is mounted from both.
warm_node() {
    node_make
    quiet_collector
    registry_host "$REGISTRY"
    SPEEDY_TRUST_KEYS=$KEY SPEEDY_PUBLISH_POLICY=off start_speedy --store "file://$W/store"
    start_containerd "$CONTAINERD_VERSION"
    local snapshotter
    mkdir "$W/tree-overlayfs" "$W/tree-switched" "$W/tree-mounted"
    for snapshotter in speedy overlayfs; do
        pull_by ctr "$snapshotter" "$1" >/dev/null
        ctr images mount --snapshotter "$snapshotter" "$(image "$1")" "$W/tree-${snapshotter/speedy/switched}" >/dev/null
    done
    filled 600
    wait_for 30 "the layers to be read without Speedy" all_native
    ctr images mount --snapshotter speedy "$(image "$1")" "$W/tree-mounted" >/dev/null
    # What was written just now is read from memory for two minutes: the page cache is dropped below, and that is no comparison.
    wait_for 200 "the page cache to be out of the way (*mounted* reads through it twice, then)" settled || true
}
settled() { ! grep " $SPEEDY_ROOT/l/.* - erofs /" /proc/self/mountinfo | grep -v -e ' - erofs /dev/' -e ',directio'; }
all_native() {
    "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS" |
        jq -e 'length > 0 and all(.[]; .origin == "fetched" and .attached and (.lazy | not))' >/dev/null
}
warm_end() {
    local tree
    for tree in overlayfs switched mounted; do ctr images unmount --rm "$W/tree-$tree" >/dev/null || true; done
}

# warm_measure MEASURE WHERE TREE
warm_measure() {
    local tree=$W/tree-$3 took
    case $1 in
        find) took=$(timed listed "$tree"); record "find, files/s, $2" "$3" "$((files * 1000 / took))" ;;
        stat) took=$(timed listed "$tree" -printf '%s %m %T@ %U\n'); record "stat, files/s, $2" "$3" "$((files * 1000 / took))" ;;
        tar) took=$(timed packed "$tree"); record "tar, MB/s, $2" "$3" "$((bytes / took / 1000))" ;;
        sequential) record "fio sequential, 1 MiB, MB/s, $2" "$3" "$(fio_of "$tree/$largest" read 1M 1 | jq '.jobs[0].read.bw_bytes / 1000000 | floor')" ;;
        random) record "fio random, 4 KiB, 4 readers, IOPS, $2" "$3" "$(fio_of "$tree/$largest" randread 4k 4 | jq '.jobs[0].read.iops | floor')" ;;
    esac
}

# Not to /dev/null, which tar knows.
listed() { find "$@" | wc -l; }
packed() { tar -C "$1" -cf - . | wc -c; }

# fio_of FILE HOW BLOCK READERS: random reads take 32 MiB each, so that most of them find nothing in memory the first time.
fio_of() {
    local size=()
    [[ $2 != randread ]] || size=(--io_size=32M --randrepeat=1)
    fio --name=warm --filename="$1" --readonly --rw="$2" --bs="$3" --numjobs="$4" --group_reporting --ioengine=psync --invalidate=0 --fadvise_hint=0 \
        --output-format=json "${size[@]}"
}
