# contrib/bench many [COUNT]: COUNT images (100) of 128 layers each, of which only the first is shared: pulled one after the other by ctr,
# a container of each started, all of them at once on the node; then all of it removed. What that takes of time, of the kernel's
# memory, of mounts and of the daemon. On `overlayfs`, then on `speedy`.
# shellcheck shell=bash

bench_many() {
    local count=${1:-100} snapshotter number before start
    MANY=()
    for ((number = 1; number <= count; number++)); do MANY+=("deep-$number"); done
    step "Make and push $count images" make_images "${MANY[@]}"
    quiet_collector
    start_speedy
    start_containerd "$CONTAINERD_VERSION"
    machine
    for snapshotter in overlayfs speedy; do
        cold
        before=$(kernel_memory)
        start=$(now_ms)
        step "Pull them on $snapshotter" many_pull "$snapshotter"
        record "pull, s each" "$snapshotter" "$(seconds_of "$((($(now_ms) - start) / count))")"
        start=$(now_ms)
        step "Start a container of each" many_start "$snapshotter"
        record "start of a container, s each" "$snapshotter" "$(seconds_of "$((($(now_ms) - start) / count))")"
        [[ $(ctr tasks ls | grep -c RUNNING) == "$count" ]] || die "not all containers run"
        echo 2 >/proc/sys/vm/drop_caches
        record "mounts on the node" "$snapshotter" "$(wc -l </proc/self/mountinfo)"
        record "loop devices" "$snapshotter" "$(find /sys/block -path '*/loop*' -name 'loop*' | while read -r loop; do [[ ! -e $loop/loop/backing_file ]] || echo; done | wc -l)"
        record "kernel memory, MB" "$snapshotter" "$((($(kernel_memory) - before) / 1024))"
        [[ $snapshotter == overlayfs ]] || record "daemon, MB" "$snapshotter" "$(resident_memory)"
        start=$(now_ms)
        step "Stop and remove all of it" many_end
        record "removal, s each" "$snapshotter" "$(seconds_of "$((($(now_ms) - start) / count))")"
    done
    say
    table "$count images of 128 layers" --digits 3
}

many_pull() {
    local name
    for name in "${MANY[@]}"; do pull_by ctr "$1" "$name"; done
}
many_start() {
    local name
    for name in "${MANY[@]}"; do
        ctr run --snapshotter "$1" --null-io -d "$(image "$name")" "$name" /bin/sleep 100000
    done
}
many_end() {
    local name
    for name in "${MANY[@]}"; do
        ctr tasks kill -s KILL "$name"
        ctr tasks rm -f "$name" || true
        ctr containers rm "$name"
    done
    empty_node
}

# kernel_memory: what the kernel takes for itself, in KiB, without what it can give back at once.
kernel_memory() { awk '$1 ~ /^(SUnreclaim|SReclaimable|KernelStack|PageTables|Percpu):$/ { sum += $2 } END { print sum }' /proc/meminfo; }
