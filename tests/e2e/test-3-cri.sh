# crictl against containerd's CRI, as a kubelet would use it.
# shellcheck shell=bash

crictl() {
    : >>"$N/crictl.yaml"
    "$(tool_path "crictl-$CRICTL_VERSION")/crictl" --config "$N/crictl.yaml" --timeout 60s \
        --runtime-endpoint "unix://$CONTAINERD_ADDRESS" --image-endpoint "unix://$CONTAINERD_ADDRESS" "$@"
}

# cri_pod NAME: a pod on the host's network, so that no CNI is needed; prints its id.
cri_pod() {
    jq -n --arg name "$1" --arg parent "/$WORLD-cri" --arg logs "$N/pod-$1" '{
        metadata: {name: $name, namespace: "default", uid: $name, attempt: 1}, log_directory: $logs,
        linux: {cgroup_parent: $parent, security_context: {namespace_options: {network: 2}}}}' >"$N/pod-$1.json"
    mkdir -p "$N/pod-$1"
    crictl runp "$N/pod-$1.json"
}

# cri_container POD-ID POD-NAME NAME IMAGE: created and started; prints its id.
cri_container() {
    local id
    jq -n --arg name "$3" --arg image "$(image "$4")" '{
        metadata: {name: $name}, image: {image: $image}, log_path: ($name + ".log"),
        command: ["/bin/sh", "-c", "cat /data/hello; trap \"exit 0\" TERM; while :; do sleep 1000 & wait $!; done"],
        linux: {}}' >"$N/container-$3.json"
    id=$(crictl create "$1" "$N/container-$3.json" "$N/pod-$2.json")
    crictl start "$id" >/dev/null
    printf '%s' "$id"
}

cri_reset() {
    crictl rmp -fa >/dev/null 2>&1 || true
    crictl rmi --all >/dev/null 2>&1 || true
}

test_cri_pull_run_exec_logs() {
    local pod container
    crictl pull "$(image eight)"
    expect_contains "$(crictl images -o json)" "$(image eight)" "the list of images"
    pod=$(cri_pod web)
    container=$(cri_container "$pod" web one eight)
    expect_contains "$(crictl ps -o json | jq -r '.containers[].state')" CONTAINER_RUNNING "the container's state"
    expect_equal "changed in layer six" "$(crictl exec --sync "$container" cat /data/changed)" "exec in the container"
    wait_for 5 "the log" grep -q eight "$N/pod-web/one.log"
    # Written through the container, read back, and gone with it.
    crictl exec --sync "$container" sh -c 'echo x > /data/x && rm /data/hello && test ! -e /data/hello'
    crictl stop --timeout 5 "$container" >/dev/null
    crictl rm "$container" >/dev/null
    crictl rmp -f "$pod" >/dev/null
}

# The bytes that du finds on Speedy's file system and CRI's own number must agree, once its collector has run.
cri_usage_is_right() {
    local used disk
    used=$(crictl imagefsinfo -o json | jq -r '(.status.imageFilesystems // .imageFilesystems)[0].usedBytes.value')
    # What is attached below is not on this disk.
    disk=$(du -sxc -B1 $layers 2>/dev/null | tail -n 1 | cut -f1)
    ((used > disk * 8 / 10 && used < disk * 12 / 10 + 2000000))
}

test_cri_imagefsinfo() {
    local info layers want=$SPEEDY_ROOT pod
    layers="$SPEEDY_ROOT/l $SPEEDY_ROOT/layer"
    if [[ $SNAPSHOTTER != speedy ]]; then
        want=$W/lib/io.containerd.snapshotter.v1.$SNAPSHOTTER layers=$want/snapshots
    fi
    crictl pull "$(image eight)" >/dev/null
    pod=$(cri_pod imagefs)
    cri_container "$pod" imagefs filler eight >/dev/null
    info=$(crictl imagefsinfo -o json | jq '(.status.imageFilesystems // .imageFilesystems)[0]')
    expect_equal "$want" "$(jq -r .fsId.mountpoint <<<"$info")" "the image file system that the kubelet watches"
    # CRI's collector asks for each snapshot's usage every ten seconds.
    wait_for 25 "CRI's figures" cri_usage_is_right
    ((  $(crictl imagefsinfo -o json | jq -r '(.status.imageFilesystems // .imageFilesystems)[0].inodesUsed.value') > 100 )) ||
        fail "CRI counts too few inodes"
    crictl rmp -f "$pod" >/dev/null
}

# A container's writable layer, as the kubelet accounts for it.
cri_writable_at_least() {
    (( $(crictl stats -o json --id "$1" | jq -r '.stats[0].writableLayer.usedBytes.value // 0') >= $2 ))
}

test_cri_stats_of_writable_layer() {
    local pod container
    crictl pull "$(image tiny)" >/dev/null
    pod=$(cri_pod stats)
    container=$(cri_container "$pod" stats writer tiny)
    crictl exec --sync "$container" dd if=/dev/zero of=/data/five bs=1M count=5 2>/dev/null
    wait_for 25 "the writable layer's size in the statistics" cri_writable_at_least "$container" 5242880
    [[ $(crictl stats -o json --id "$container" | jq -r '.stats[0].writableLayer.fsId.mountpoint') == "$SPEEDY_ROOT" || $SNAPSHOTTER != speedy ]] ||
        fail "the writable layer is said to be on another file system"
    crictl rmp -f "$pod" >/dev/null
}

test_cri_128_layers() {
    local pod container
    crictl pull "$(image deep)" >/dev/null
    pod=$(cri_pod deep)
    container=$(cri_container "$pod" deep deep deep)
    expect_equal 128 "$(crictl exec --sync "$container" cat /deep/top)" "the file of the top layer"
    crictl rmp -f "$pod" >/dev/null
}

test_cri_image_volume() {
    local pod container
    version_at_least "$VERSION" 2.1 || skip "image volumes are new in containerd 2.1"
    crictl pull "$(image eight)" >/dev/null
    crictl pull "$(image tiny)" >/dev/null
    pod=$(cri_pod volume)
    jq -n --arg image "$(image tiny)" --arg volume "$(image eight)" '{
        metadata: {name: "reader"}, image: {image: $image}, log_path: "reader.log",
        command: ["/bin/cat", "/volume/data/changed"],
        mounts: [{container_path: "/volume", readonly: true, image: {image: $volume}}]}' >"$N/container-reader.json"
    container=$(crictl create "$pod" "$N/container-reader.json" "$N/pod-volume.json")
    crictl start "$container" >/dev/null
    wait_for 10 "the volume's content" grep -q "changed in layer six" "$N/pod-volume/reader.log"
    crictl rmp -f "$pod" >/dev/null
}

test_cri_removal_leaves_nothing() {
    remove_everything # what ctr pulled shares layers with CRI's images
    crictl pull "$(image eight)" >/dev/null
    crictl pull "$(image deep)" >/dev/null
    [[ -n $(layer_directories) ]] || fail "no layers on the disk although images are there"
    cri_reset
    # The pinned pause image is kept by `rmi --all`.
    NAMESPACE=k8s.io ctr images rm --sync "$(image pause)" >/dev/null 2>&1 || true
    expect_nothing_left
}
