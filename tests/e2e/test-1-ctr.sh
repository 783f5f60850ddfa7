# ctr: pulling, running, and the snapshot commands.
# shellcheck shell=bash

test_ctr_pull_and_run_tiny() {
    pull tiny
    expect_equal "hello from tiny" "$(ctr_run --rm "$(image tiny)" tiny)" "what the container printed"
}

test_ctr_pull_local() {
    # The client's own pull, through the snapshots API and the diff service instead of the transfer service.
    remove_everything
    pull tiny --local
    expect_equal "hello from tiny" "$(ctr_run --rm "$(image tiny)" tiny-local)" "what the container printed"
}

test_ctr_write_and_restart_container() {
    pull tiny
    ctr_start keeper tiny
    ctr_exec keeper sh -c 'echo kept > /data/kept; rm /data/hello; echo new > /etc/passwd'
    ctr tasks kill -s SIGTERM keeper
    wait_for 10 "the end of keeper" task_stopped keeper
    ctr tasks rm keeper
    # The same snapshot is mounted again from Mounts.
    ctr tasks start --null-io --fifo-dir "$N/fifo" -d keeper
    expect_equal "kept" "$(ctr_exec keeper cat /data/kept)" "a file after the restart"
    ! ctr_exec keeper test -e /data/hello || fail "a removed file is back after the restart"
    # Another container of the image sees nothing of it.
    expect_equal "hello from tiny" "$(ctr_run --rm "$(image tiny)" other)" "the image in another container"
    ctr_remove keeper
}

test_ctr_read_only_root() {
    pull tiny
    expect_contains "$(ctr_run --rm --read-only "$(image tiny)" ro sh -c 'touch /data/x 2>&1 || true')" \
        "Read-only file system" "a write to a read-only root"
}

test_ctr_user_by_name() {
    # containerd looks up the name in the layers' /etc/passwd: since 2.3 by reading the lower directories itself.
    pull eight
    expect_equal "uid=1000(guest) gid=1000(guest) groups=50(staff),1000(guest)" \
        "$(ctr_run --rm --user guest "$(image eight)" user id)" "the user in the container"
}

test_ctr_eight_layers_inside() {
    # What the image maker says a container must see: kinds, modes, owners, links, devices, digests.
    pull eight
    ctr_run --rm "$(image eight)" eight | LC_ALL=C sort >"$W/got.txt"
    [[ $(wc -l <"$W/got.txt") -gt 100 ]] || fail "the listing is too short: $(wc -l <"$W/got.txt") lines"
    same_files "$W/expected/eight.txt" "$W/got.txt" "the container sees something else than the image has"
}

# list_on SNAPSHOTTER ID: every detail of a running container of the eight-layer image, seen from outside.
list_on() {
    ON=$1 pull eight
    ON=$1 ctr_start "$2" eight
    python3 "$REPO/tests/e2e/listtree.py" "/proc/$(task_pid "$2")/root/."
    ctr_remove "$2"
}

test_ctr_eight_layers_as_on_overlayfs() {
    list_on overlayfs by-overlayfs >"$W/by-overlayfs.txt"
    list_on "$SNAPSHOTTER" by-us >"$W/by-us.txt"
    grep -q 'attrs/capable.*security.capability=' "$W/by-us.txt" || fail "no file capability in the listing"
    grep -q 'attrs/user.*user.binary=00ff0a3d' "$W/by-us.txt" || fail "no binary user attribute in the listing"
    same_files "$W/by-overlayfs.txt" "$W/by-us.txt" "the container differs from the same one on overlayfs"
}

test_ctr_128_layers() {
    remove_everything
    pull deep
    expect_equal "128" "$(ctr_run --rm "$(image deep)" deep)" "the file of the top layer"
    ctr_run --rm "$(image deep)" deep-list /bin/listing | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/deep.txt" "$W/got.txt" "the container sees something else than the image has"
    expect_equal 128 "$(ctr snapshots --snapshotter "$SNAPSHOTTER" ls | grep -c Committed)" "committed snapshots"
}

test_ctr_snapshots_list_tree_usage_info() {
    local top rows
    remove_everything
    pull eight
    rows=$(ctr snapshots --snapshotter "$SNAPSHOTTER" ls)
    expect_equal 8 "$(grep -c Committed <<<"$rows")" "committed snapshots of an image with eight layers"
    # The tree is one chain of eight.
    expect_equal 8 "$(ctr snapshots --snapshotter "$SNAPSHOTTER" tree | grep -c sha256)" "lines of the tree"
    top=$(ctr snapshots --snapshotter "$SNAPSHOTTER" tree | tail -n1 | grep -o 'sha256:[0-9a-f]*')
    expect_equal Committed "$(ctr snapshots --snapshotter "$SNAPSHOTTER" info "$top" | jq -r .Kind)" "kind of the top snapshot"
    # 1 MiB of file content is in layer two; the sum must hold that and busybox, each once.
    ctr snapshots --snapshotter "$SNAPSHOTTER" usage -b | awk 'NR > 1 { sum += $2; inodes += $3 } END { print sum, inodes }' >"$W/usage"
    ctr snapshots --snapshotter overlayfs ls >/dev/null
    read -r size inodes <"$W/usage"
    ((size > 2500000 && size < 8000000)) || fail "usage of all layers is $size bytes"
    ((inodes > 100 && inodes < 300)) || fail "usage of all layers is $inodes inodes"
}

test_ctr_usage_as_on_overlayfs() {
    # Of layers that containerd unpacked; a layer image takes other space.
    local name
    [[ $SNAPSHOTTER != speedy ]] || use_differ walking
    remove_everything
    for name in overlayfs "$SNAPSHOTTER"; do
        ON=$name pull eight
        ctr snapshots --snapshotter "$name" usage -b | LC_ALL=C sort >"$W/usage-$name"
    done
    same_files "$W/usage-overlayfs" "$W/usage-$SNAPSHOTTER" "bytes and inodes of the layers differ from overlayfs"
    remove_everything
    [[ $SNAPSHOTTER != speedy ]] || use_differ speedy
}

test_ctr_prepare_commit_view_by_hand() {
    local sn="snapshots --snapshotter $SNAPSHOTTER" target="$W/mnt" top
    # shellcheck disable=SC2086 # $sn is words
    {
        remove_everything
        mkdir -p "$target"
        ctr $sn prepare --target "$target" first >"$W/mount.sh"
        sh "$W/mount.sh"
        echo one >"$target/file"
        mkdir "$target/dir"
        umount "$target"
        ctr $sn commit base first
        ctr $sn prepare --target "$target" second base >"$W/mount.sh"
        sh "$W/mount.sh"
        expect_equal one "$(cat "$target/file")" "the parent's file"
        echo two >"$target/file"
        rm -r "$target/dir"
        umount "$target"
        ctr $sn diff second >"$W/diff.tar.gz"
        expect_contains "$(tar tf "$W/diff.tar.gz")" ".wh.dir" "the diff's whiteout"
        ctr $sn commit top second
        # ctr protects what it prepares from the garbage collection, but not a view. Right after a collection the next one is
        # a hundred changes away: time enough to do so.
        ctr content prune references
        ctr $sn view --target "$target" look top >"$W/mount.sh"
        ctr $sn label look containerd.io/gc.root=yes
        sh "$W/mount.sh"
        top=$(cat "$target/file"; ls "$target"; touch "$target/x" 2>&1 || true)
        umount "$target"
        expect_contains "$top" "two" "the child's file in a view"
        expect_contains "$top" "Read-only file system" "a write to a view"
        [[ $top != *dir* ]] || fail "a removed directory is in the view"
        ! ctr $sn rm base 2>"$W/error" || fail "a snapshot with children was removed"
        ctr $sn label top mine=yes
        expect_equal yes "$(ctr $sn info top | jq -r .Labels.mine)" "a label"
        ctr $sn rm look
        ctr $sn rm top
        ctr $sn rm base
    }
    ctr content prune references
    expect_nothing_left
}

test_ctr_bad_requests() {
    local sn="snapshots --snapshotter $SNAPSHOTTER"
    # shellcheck disable=SC2086 # $sn is words
    {
        expect_contains "$(ctr $sn prepare x no-such-parent 2>&1 || true)" "not found" "an unknown parent"
        ctr $sn prepare active >/dev/null
        expect_contains "$(ctr $sn prepare active 2>&1 || true)" "already exists" "a key that is taken"
        expect_contains "$(ctr $sn prepare child active 2>&1 || true)" "" "an active snapshot as parent"
        ! ctr $sn prepare child active >/dev/null 2>&1 || fail "an active snapshot became a parent"
        expect_contains "$(ctr $sn rm no-such 2>&1 || true)" "not found" "the removal of an unknown key"
        ctr $sn rm active
    }
}

test_ctr_content_and_check() {
    # Every blob is there and unpacked for our snapshotter.
    remove_everything
    pull eight
    expect_equal 10 "$(ctr content ls -q | wc -l)" "blobs of an image with eight layers"
    expect_contains "$(ctr images check --snapshotter "$SNAPSHOTTER")" "complete (9/9)" "the image check"
    expect_contains "$(ctr images check --snapshotter "$SNAPSHOTTER" | tail -n1)" "true" "the unpacked column"
}

test_ctr_image_mount() {
    pull eight
    mkdir -p "$W/mnt"
    ctr images mount --snapshotter "$SNAPSHOTTER" "$(image eight)" "$W/mnt" >/dev/null
    expect_equal eight "$(cat "$W/mnt/data/hello")" "a file of the mounted image"
    ctr images unmount --rm "$W/mnt" 2>/dev/null || { umount "$W/mnt"; ctr snapshots --snapshotter "$SNAPSHOTTER" rm "$W/mnt"; }
}

test_ctr_removal_leaves_nothing() {
    pull eight
    pull deep
    ctr_run --rm "$(image eight)" last true
    [[ -n $(layer_directories) ]] || fail "no layers on the disk although images are there"
    remove_everything
    expect_nothing_left
}
