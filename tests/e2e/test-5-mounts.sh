# User namespaces, mount options, parallel unpacking, layers that need not be pulled.
# shellcheck shell=bash

test_user_namespace_with_mapped_ids() {
    local out
    remove_everything
    pull eight
    if ! out=$(ctr_run --rm --remap-labels --uidmap 0:100000:65536 --gidmap 0:100000:65536 "$(image eight)" mapped \
        sh -c 'cat /proc/self/uid_map; id -u; stat -c "%u:%g %a" /data/hello /special/guests; touch /data/mine; stat -c %u /data/mine' 2>&1); then
        # Only what the machine cannot do is a reason to skip: the same must then fail on overlayfs too.
        ON=overlayfs pull eight
        if ON=overlayfs ctr_run --rm --remap-labels --uidmap 0:100000:65536 --gidmap 0:100000:65536 "$(image eight)" mapped-too true >&2; then
            fail "works on overlayfs, but not here: $out"
        fi
        skip "no user-namespace containers with mapped ids here, on overlayfs neither: $(tail -n1 <<<"$out")"
    fi
    expect_contains "$(tr -s ' \n' ' ' <<<"$out")" "0 100000 65536" "the id mapping of the container"
    expect_contains "$out" "1000:1000 640" "a guest's file, through the mapping"
    expect_contains "$out" "0:0 644" "root's file, through the mapping"
    # Mapped in the mount: no copied layer, and on the disk the files have the image's ids.
    expect_equal 8 "$(ctr snapshots --snapshotter "$SNAPSHOTTER" ls | grep -c Committed)" "committed snapshots; more would be a copy"
}

test_user_namespace_writes_are_mapped() {
    pull tiny
    ctr_start mapped-writer tiny --remap-labels --uidmap 0:100000:65536 --gidmap 0:100000:65536 ||
        skip "no user-namespace containers with mapped ids here (see the test before)"
    ctr_exec mapped-writer sh -c 'echo x > /data/mine; chown 7:8 /data/mine'
    expect_equal "100007:100008" "$(stat -c %u:%g "/proc/$(task_pid mapped-writer)/root/data/mine")" "the owner on the host"
    ctr_remove mapped-writer
}

test_volatile_mount_option() {
    need_speedy
    pull tiny
    SPEEDY_OVERLAYFS_MOUNT_OPTIONS=volatile restart_speedy
    ctr_start fleeting tiny
    expect_contains "$(awk '$5 == "/"' "/proc/$(task_pid fleeting)/mountinfo")" volatile "the mount options of the container's root"
    ctr_remove fleeting
    expect_equal "hello from tiny" "$(ctr_run --rm "$(image tiny)" fleeting-too)" "a container on a volatile mount"
    restart_speedy
}

test_parallel_unpack() {
    version_at_least "$VERSION" 2.4 || skip "config/containerd-2.4-parallel.toml is for containerd 2.4 and newer"
    need_speedy
    remove_everything
    daemon_stop containerd
    start_containerd "$VERSION" "$REPO/config/containerd-2.4-parallel.toml"
    expect_contains "$(ctr plugins ls -d "id==speedy")" rebase "the plugin's capabilities"
    pull eight
    pull deep
    ctr_run --rm "$(image eight)" par-eight | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/eight.txt" "$W/got.txt" "an image that was unpacked in parallel differs"
    ctr_run --rm "$(image deep)" par-deep /bin/listing | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/deep.txt" "$W/got.txt" "128 layers that were unpacked in parallel differ"
    remove_everything
    expect_nothing_left
    daemon_stop containerd
    start_containerd "$VERSION"
}

test_layer_from_a_store() {
    # The only layer of tiny comes from Speedy's store: containerd does not fetch it, and the container sees the store's files.
    local layer
    need_speedy
    remove_everything
    layer=$(curl -sf -H 'Accept: application/vnd.oci.image.manifest.v1+json' "http://$REGISTRY/v2/pause/manifests/1" | jq -r '.config.digest')
    layer=$(curl -sf "http://$REGISTRY/v2/pause/blobs/$layer" | jq -r '.rootfs.diff_ids[0]')
    jq -n --arg id "$layer" '{($id): {"from-the-store": "yes\n"}}' >"$W/layers.json"
    restart_speedy --store "memory:$W/layers.json"
    pull pause
    expect_equal 1 "$(ctr snapshots --snapshotter speedy ls | grep -c Committed)" "committed snapshots"
    expect_equal 2 "$(ctr content ls -q | wc -l)" "blobs: the manifest and the configuration, not the layer"
    mkdir -p "$W/mnt"
    ctr images mount --snapshotter speedy "$(image pause)" "$W/mnt" >/dev/null
    expect_equal yes "$(cat "$W/mnt/from-the-store")" "a file of the store"
    umount "$W/mnt"
    ctr snapshots --snapshotter speedy rm "$W/mnt"
    remove_everything
    restart_speedy
    expect_nothing_left
}

test_check_finds_nothing_wrong() {
    need_speedy
    speedy_check >"$W/check.json" || { cat "$W/check.json" >&2; fail "speedy check finds fault"; }
    expect_equal true "$(jq -r .store.consistent "$W/check.json")" "store.consistent"
}

test_everything_is_removed_in_the_end() {
    remove_everything
    expect_nothing_left
}
