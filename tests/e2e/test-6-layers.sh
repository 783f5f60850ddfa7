# Layer images on one node: layers go through Speedy's differ and become images, whichever client pulls.
# shellcheck shell=bash

# expect_images CLIENT NAME LAYERS: pulled by the client on an empty node, every layer became an image, and nothing was unpacked.
expect_images() {
    need_speedy
    fresh_speedy
    expect_listing "$1" "$2"
    expect_equal "$3" "$(applies image)" "layers that the differ made images of"
    expect_equal 0 "$(applies files)" "layers that the differ unpacked"
    expect_equal "$3" "$(layers_where '.origin == "applied" and .state == "complete" and .percent == 100')" "complete layer images"
    expect_equal "$3" "$(layer_files | grep -c '\.erofs$')" "files of layer images"
    wait_for 10 "the container's own directory to go" nothing_is_unpacked || { unpacked_files >&2; fail "files were unpacked"; }
}
nothing_is_unpacked() { [[ -z $(unpacked_files) ]]; }

test_layers_by_ctr() { expect_images ctr eight 8; }
test_layers_by_ctr_local() { expect_images local eight 8; }
test_layers_by_nerdctl() { expect_images nerdctl eight 8; }
# The pod's own image is one layer more.
test_layers_by_crictl() { expect_images crictl eight 9; }

test_layers_plain_docker_zstd() {
    local name
    for name in plain docker zstd; do expect_images ctr "$name" 8; done
    expect_images nerdctl zstd 8
}

test_layers_are_good_erofs() {
    local file
    need_speedy
    fresh_speedy
    pull more
    for file in $(layer_files | grep '\.erofs$'); do
        fsck.erofs "$file" >&2 || fail "fsck.erofs finds fault with $file"
        expect_equal erofs "$(blkid -p -o value -s TYPE "$file")" "what blkid takes $file for"
    done
}

test_layers_are_the_same_every_time() {
    # From another containerd, another root and another client: the same bytes.
    need_speedy
    fresh_speedy
    pull more
    layer_files | grep '\.erofs$' | xargs sha256sum | cut -d' ' -f1 | sort >"$W/first"
    fresh_speedy
    nerdctl pull --quiet "$(image more)"
    layer_files | grep '\.erofs$' | xargs sha256sum | cut -d' ' -f1 | sort >"$W/second"
    same_files "$W/first" "$W/second" "layer images differ from one run to the next"
}

test_layers_several_times_in_a_chain() {
    # overlayfs refuses one layer twice in a chain: it is mounted once, on top.
    need_speedy
    fresh_speedy
    expect_listing ctr aba
    # Two contents in three layers.
    expect_equal 2 "$(layers_where true)" "layer images"
    expect_listing nerdctl empties
    expect_listing ctr deep
}

test_layers_mixed_with_directories() {
    # The first eight layers are directories, the ninth is an image; and the other way round.
    need_speedy
    fresh_speedy
    use_differ walking
    pull eight
    expect_equal 0 "$(layers_where true)" "layer images with containerd's own differ"
    use_differ speedy
    expect_listing ctr more
    expect_equal 1 "$(applies image)" "layers that the differ made images of"
    fresh_speedy
    pull eight
    use_differ walking
    expect_listing ctr more
    expect_equal 8 "$(layers_where true)" "layer images"
    use_differ speedy
}

test_layers_in_several_namespaces() {
    # Stored once, however many namespaces have them; nobody gets them without having pulled the blob.
    need_speedy
    fresh_speedy
    expect_listing ctr eight
    NAMESPACE=$WORLD-other expect_listing ctr eight
    expect_listing nerdctl eight
    expect_equal 8 "$(layers_where true)" "layer images"
    expect_equal 8 "$(applies image)" "layers that the differ made images of"
    expect_equal 16 "$(applies known)" "layers whose image was there already"
}

test_layers_on_foreign_mounts() {
    # Another snapshotter's layers come by our differ too, on the way through containerd's diff service.
    need_speedy
    fresh_speedy
    ON=overlayfs pull eight --local
    expect_equal "eight" "$(ON=overlayfs ctr_run --rm "$(image eight)" foreign cat /data/hello)" "a container on overlayfs"
    expect_equal 0 "$(($(applies image) + $(applies files) + $(applies known)))" "layers that our differ applied"
}

test_layers_through_restarts() {
    local signal
    need_speedy
    fresh_speedy
    start_witness through-layers
    layers | jq -S 'map(del(.used))' >"$W/before"
    for signal in TERM KILL; do
        SIGNAL=$signal restart_speedy
        expect_unharmed through-layers
        layers | jq -S 'map(del(.used))' >"$W/after"
        same_files "$W/before" "$W/after" "the layers after a restart by SIG$signal"
        expect_equal eight "$(ctr_run --rm "$(image eight)" "new-$signal" cat /data/hello)" "a new container after SIG$signal"
    done
    expect_going_on through-layers
}

test_layers_of_a_killed_daemon() {
    # The daemon dies while it makes the image of a large layer, three times; what it left is removed.
    local round puller
    need_speedy
    fresh_speedy
    for round in 1 2 3; do
        pull large >/dev/null 2>&1 &
        puller=$!
        sleep "0.$((round * 3 + 1))"
        SIGNAL=KILL restart_speedy
        wait "$puller" || true
        remove_image large
    done
    expect_listing ctr large
    expect_equal 1 "$(layers_where true)" "layer images"
    expect_equal 1 "$(layer_files | grep -c '\.erofs$')" "files of layer images"
}

test_layers_are_removed_with_the_image() {
    # Without a budget for the cache, the space is free when `ctr images rm --sync` returns.
    need_speedy
    SPEEDY_LAYERS_BUDGET=0 fresh_speedy
    expect_listing ctr large
    expect_listing ctr more
    (($(kilobytes_below "$SPEEDY_ROOT") > 90000)) || fail "100 MB of layers take no space"
    remove_everything
    no_layers || { layers >&2; layer_files >&2; fail "layers are left after the image's removal"; }
    expect_equal 0 "$(loops)" "loop devices of layers"
    (($(kilobytes_below "$SPEEDY_ROOT") < 60000)) || fail "the space of the layers is not free"
    expect_nothing_left
}

# kilobytes_below DIR: directories that are being freed meanwhile are no fault.
kilobytes_below() { (du -sxk "$1" 2>/dev/null || true) | cut -f1; }

test_layers_stay_as_cache() {
    # Within the budget they stay, unlisted, and the next pull makes nothing anew.
    need_speedy
    SPEEDY_LAYERS_BUDGET=1GiB SPEEDY_LAYERS_KEEP_FREE=0% fresh_speedy
    expect_listing ctr more
    remove_everything
    expect_equal 9 "$(layers_where '.snapshots == 0')" "layers in the cache"
    expect_equal "" "$(ctr snapshots --snapshotter speedy ls | tail -n +2)" "snapshots"
    expect_listing ctr more
    expect_equal 9 "$(applies image)" "layers that the differ made images of, in both pulls"
    # A small budget keeps what was used last.
    SPEEDY_LAYERS_BUDGET=1KiB SPEEDY_LAYERS_KEEP_FREE=0% restart_speedy
    remove_everything
    wait_for 20 "an empty cache" no_layers || { layers >&2; fail "the cache has more than its budget"; }
}

# checkpoint ID: what the container wrote, and its specification, as the image with-spec.
checkpoint() {
    local digest
    ctr containers checkpoint --rw --image "$1" "$REGISTRY/checkpoint:1"
    digest=$(ctr images ls | awk -v name="$REGISTRY/checkpoint:1" '$1 == name { print $3 }')
    ctr content get "$digest" >"$N/checkpoint.json"
    ctr containers info --spec "$1" >"$N/spec.json"
    python3 "$REPO/tests/e2e/checkpoint.py" "$N/checkpoint.json" "$N/spec.json" "$REGISTRY/with-spec:1" "$N/checkpoint.tar"
    ctr images import --local --no-unpack "$N/checkpoint.tar"
}

test_layers_restore_a_containers_own_files() {
    # What a container wrote is applied into its own snapshot: files, no image, since nobody commits it.
    need_speedy
    fresh_speedy
    pull eight
    ctr_start writer eight
    ctr_exec writer sh -c 'echo written > /data/written; rm /data/hello; rm -r /data/keep; mkdir /data/keep; echo x > /data/keep/only'
    checkpoint writer
    ctr_remove writer
    ctr containers restore --rw writer "$REGISTRY/with-spec:1"
    expect_equal 8 "$(applies image)" "layers that the differ made images of"
    expect_equal 1 "$(applies files)" "layers that the differ unpacked"
    # ctr has started it.
    expect_equal "written only" "$(ctr_exec writer sh -c 'test ! -e /data/hello && echo $(cat /data/written) $(ls /data/keep)')" "the restored files"
    ctr_remove writer
}

test_layers_on_a_full_disk() {
    # The pull fails and says why, and what was there is as before; when there is room again it works.
    need_speedy
    fresh_speedy
    daemon_stop speedy
    truncate -s 80M "$W/small.ext4"
    mkfs.ext4 -q "$W/small.ext4"
    mount -o loop "$W/small.ext4" "$SPEEDY_ROOT"
    restart_speedy
    expect_listing ctr eight
    ! ctr images pull --hosts-dir "$N/certs.d" --snapshotter speedy "$(image large)" >"$W/error" 2>&1 || fail "100 MB fit on 80"
    grep -qi 'no space left' "$W/error" || { tail -n 3 "$W/error" >&2; fail "the error does not say that the disk is full"; }
    expect_equal eight "$(ctr_run --rm "$(image eight)" beside cat /data/hello)" "a container after the disk was full"
    expect_equal 8 "$(layers_where true)" "layer images"
    expect_listing ctr more
    remove_everything
    expect_nothing_left
    daemon_stop speedy
    umount "$SPEEDY_ROOT"
    rm "$W/small.ext4"
    restart_speedy
}

test_layers_explained() {
    need_speedy
    fresh_speedy
    pull eight
    expect_equal 8 "$(explain "$(image eight)" | jq '[(if type == "object" then .layers else . end)[] | select(.kind == "image" and .image.origin == "applied")] | length')" \
        "layers that explain says were applied here"
    expect_equal 8 "$(status_of .layers.count)" "layers in the status"
    # For people too: one line a layer at least.
    (( $("$SPEEDY" layers --address "$SPEEDY_ADDRESS" | wc -l) >= 8 )) || fail "speedy layers prints too little"
    "$SPEEDY" status --address "$SPEEDY_ADDRESS" >&2
    "$SPEEDY" explain --address "$SPEEDY_ADDRESS" --containerd "$CONTAINERD_ADDRESS" --namespace "$WORLD" "$(image eight)" >&2
}

test_layers_leave_nothing() {
    need_speedy
    SPEEDY_LAYERS_BUDGET=0 fresh_speedy
    expect_listing ctr aba
    expect_listing nerdctl more
    expect_listing crictl eight
    cri_reset
    remove_everything
    expect_nothing_left
    no_layers || { layers >&2; fail "layers are left"; }
    restart_speedy
}
