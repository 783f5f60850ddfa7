# Containers that run before their layers are here, on a store behind a link, and never notice that anybody died. LAZY_KILLS is how often
# the daemon is killed under a reader, LAZY_LONG adds faults of the store.
# shellcheck shell=bash

# lazy_fleet MBIT NAME...: the images are published by the first node, and node b, which has nothing, reaches the store at that rate.
lazy_fleet() {
    local rate=$1
    shift
    cluster_store
    through_link fresh_fleet "$SPEEDY_STORE"
    publish_all "$@"
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    on b lazy_is_possible || skip "this kernel reads no layers lazily"
    link_post reset "blobs?layers=refuse" "link?mbit=$rate"
}
lazy_is_possible() { ! grep -q 'layers are fetched whole before\|cannot be read lazily' "$W/speedy-b.log"; }

# lazily, natively: how many layers are attached so, by what the kernel has below their loop devices.
lazily() { losetup -n -O BACK-FILE | grep -cE '^ */[0-9]+$' || true; }
no_lazy() { [[ $(lazily) == 0 ]]; }

# layers_within SECONDS: this node's layers, when all are on its disk.
layers_within() { timeout "$1" "$SPEEDY" layers --wait --address "$SPEEDY_ADDRESS"; }

# reader_start ID NAME: a container that checks everything in the image again and again, and says so.
reader_start() {
    # Another test's reader may have had that name.
    rm -f "$W/reader-$1"
    ctr run --snapshotter "${ON:-$SNAPSHOTTER}" --log-uri "file://$W/reader-$1" -d "$(image "$2")" "$1" /bin/sh -c '
        cd /data || exit 1
        while :; do
            for file in noise-*; do sha256sum "$file" || echo "FAILED $file"; done
            echo round
        done'
}
rounds() { grep -c '^round' "$W/reader-$1" || true; }
more_rounds() { (($(rounds "$1") >= $2)); }

# expect_reader_well ID NAME: every line of the reader is one that the image's maker expects.
expect_reader_well() {
    local wrong
    wrong=$(sed -n 's/^\([0-9a-f]\{64\}\)  \(noise-.*\)/\1 \2/p; /FAILED\|rror/p' "$W/reader-$1" | sort -u |
        while read -r sum file; do grep -q "/data/$file.*$sum\|$sum.*/data/$file" "$W/expected/$2.txt" || printf '%s %s\n' "$sum" "$file"; done)
    expect_equal "" "$wrong" "what the container read wrong"
}

drop_caches() { sync && echo 3 >/proc/sys/vm/drop_caches; }

test_lazy_starts_before_its_data() {
    # 96 MiB at 40 Mbit/s take 20 s; one file of it is there at once.
    local took
    lazy_fleet 40 large pause
    on b pull large
    took=$(milliseconds on b ctr_run --rm "$(image large)" first /bin/cat /data/hello)
    printf 'a container read its first file %d ms after the pull\n' "$took"
    ((took < 6000)) || fail "a container waited $took ms for one small file"
    # The layer goes from its attach point when containerd's collector comes by and nobody uses it.
    on b ctr_start user large
    [[ $(lazily) == 1 ]] || fail "it is not one layer that is read lazily: $(losetup -n -O NAME,BACK-FILE; on b layers)"
    ! on b layers_within 0.5 >/dev/null || fail "layers --wait did not wait"
    link_post "link?mbit=0"
    on b layers_within 60 | grep -w complete
    on b expect_listing ctr large
    wait_for 60 "the layer to be native" no_lazy || fail "the layer is not native: $(losetup -n -O NAME,BACK-FILE)"
    on b ctr_remove user
    expect_no_layers_from_registry large
    on b again_by nerdctl large >/dev/null
    on b expect_listing crictl large
}

test_lazy_daemon_is_killed_again_and_again() {
    # A container reads and checks everything all the while: first cold, later native.
    local round
    lazy_fleet 100 large
    on b pull large
    on b reader_start reader large
    for ((round = 0; round < ${LAZY_KILLS:-5}; round++)); do
        sleep 2
        SIGNAL=KILL through_link trusting restart_b --store "$SPEEDY_STORE"
        drop_caches
    done
    link_post "link?mbit=0"
    wait_for 60 "the reader to go on" more_rounds reader $(($(rounds reader) + 2)) || fail "the reader hangs: $(tail -n 3 "$W/reader-reader")"
    wait_for 60 "the layer to be native" no_lazy || fail "the layer is not native"
    drop_caches
    wait_for 60 "the reader to go on" more_rounds reader $(($(rounds reader) + 2)) || fail "the reader hangs when the layer is native"
    on b expect_reader_well reader large
    expect_no_layers_from_registry large
    on b ctr_remove reader
}

test_lazy_reads_wait_for_a_daemon() {
    # While nobody serves, reads wait, and nothing else does: df of everything, a pull-less start of another container's shell.
    local reader
    lazy_fleet 40 large
    on b pull large
    on b ctr_start sleeper large
    on b daemon_stop speedy-b KILL
    timeout 10 df -a >/dev/null || fail "df waits for the dead daemon"
    timeout 10 cat /proc/self/mountinfo >/dev/null
    on b ctr_exec sleeper /bin/sha256sum /data/noise-5 >"$W/late" &
    reader=$!
    sleep 3
    kill -0 "$reader" || fail "a read did not wait: $(cat "$W/late")"
    link_post "link?mbit=0"
    through_link trusting on b start_speedy --metrics "$(on b metrics_address)" --store "$SPEEDY_STORE"
    wait "$reader" || fail "the read failed"
    grep -q "$(cut -d' ' -f1 "$W/late")" "$W/expected/large.txt" || fail "the read gave other bytes"
    wait_for 10 "containerd to find Speedy again" on b speedy_is_reached
    on b ctr_remove sleeper
}

test_lazy_store_dies_and_comes_back() {
    local fault reader faults=(refuse "flip after=20000")
    [[ -z ${LAZY_LONG:-} ]] || faults+=(blackhole stall slow "status status=500" "truncate after=200")
    lazy_fleet 0 large
    for fault in "${faults[@]}"; do
        link_post "link?mbit=60"
        through_link trusting fresh_b --store "$SPEEDY_STORE"
        on b pull large
        on b ctr_start sleeper large
        # shellcheck disable=SC2086 # kind and parameters
        store_fault $fault
        on b ctr_exec sleeper /bin/sh -c 'cd /data && sha256sum noise-*' >"$W/during" &
        reader=$!
        sleep 4
        link_post "link?mbit=0"
        store_fault none
        wait "$reader" || fail "a read failed although the store was back after 4 s of $fault"
        expect_equal 6 "$(while read -r sum _; do grep -c "$sum" "$W/expected/large.txt"; done <"$W/during" | grep -c 1)" "right sums after $fault"
        on b ctr_remove sleeper
    done
}

test_lazy_chunk_is_damaged() {
    # A container that reads it gets an error, soon, and never other bytes; the rest of the image can be read. When the chunk is
    # good again, so is the container.
    local store chunk how
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large
    chunk=$(data_chunk "$store")
    for how in flip truncate; do
        trusting fresh_b --store "$store"
        damage "$store" "$chunk" "$how"
        on b pull large
        # Unless the layer was given up meanwhile.
        on b ctr_start "on-$how" large || { repair; continue; }
        # shellcheck disable=SC2016 # for the container
        on b ctr_exec "on-$how" /bin/sh -c 'cat /data/hello; for file in /data/noise-*; do sha256sum $file; done' >"$W/got" 2>&1 || true
        grep -q large "$W/got" || fail "what is good cannot be read either ($how)"
        expect_contains "$(cat "$W/got")" "rror" "a read of the damaged chunk fails ($how)"
        expect_contains "$(cat "$W/speedy-b.log")" "$(basename "$chunk")" "the log names the chunk ($how)"
        expect_no_wrong_sums "$W/got" large
        repair
        # shellcheck disable=SC2016
        on b ctr_exec "on-$how" /bin/sh -c 'for file in /data/noise-*; do sha256sum $file; done' >"$W/got" || fail "still broken after the repair ($how)"
        on b expect_no_wrong_sums "$W/got" large
        on b ctr_remove "on-$how"
    done
}

# expect_no_wrong_sums FILE NAME: every sum in it is one of the image's.
expect_no_wrong_sums() {
    local sum
    grep -oE '^[0-9a-f]{64}' "$1" | while read -r sum; do
        grep -q "$sum" "$W/expected/$2.txt" || fail "a container read other bytes than the image has: $sum"
    done
}

test_lazy_keeper_dies() {
    # The daemon notices and gives everything to another one; then it may be killed as before.
    lazy_fleet 60 large
    on b pull large
    on b reader_start reader large
    pkill -KILL -f "keeper --while-needed --socket $W/b/" || fail "there is no keeper"
    wait_for 20 "another keeper" pgrep -f "keeper --while-needed --socket $W/b/" >/dev/null || fail "no other keeper was started"
    sleep 2
    SIGNAL=KILL through_link trusting restart_b --store "$SPEEDY_STORE"
    link_post "link?mbit=0"
    wait_for 60 "the reader to go on" more_rounds reader 3 || fail "the reader hangs"
    on b expect_reader_well reader large
    on b ctr_remove reader
}

test_lazy_daemon_and_keeper_are_upgraded() {
    # Under a container that reads and checks everything: the keeper becomes the installed program and the daemon is stopped and started,
    # by turns. The keeper stays the process it was, and no read fails.
    local round keeper upgraded
    lazy_fleet 60 large
    on b pull large
    on b reader_start reader large
    keeper=$(pgrep -f "keeper --while-needed --socket $W/b/") || fail "there is no keeper"
    for round in 1 2 3; do
        sleep 1
        upgraded=$(grep -c "upgraded: this is the installed program now" "$W/speedy-b.log" || true)
        kill -USR2 "$keeper"
        wait_for 10 "the keeper to be the installed program" upgraded_more "$upgraded" || fail "the keeper was not upgraded"
        through_link trusting restart_b --store "$SPEEDY_STORE"
        drop_caches
    done
    expect_equal "$keeper" "$(pgrep -f "keeper --while-needed --socket $W/b/")" "the keeper's process"
    link_post "link?mbit=0"
    wait_for 60 "the reader to go on" more_rounds reader $(($(rounds reader) + 2)) || fail "the reader hangs: $(tail -n 3 "$W/reader-reader")"
    wait_for 60 "the layer to be native" no_lazy || fail "the layer is not native"
    on b expect_reader_well reader large
    on b ctr_remove reader
}
upgraded_more() { (($(grep -c "upgraded: this is the installed program now" "$W/speedy-b.log") > $1)); }

test_lazy_both_die() {
    # Nobody is left: reads fail at once, with an error, and work again as soon as there is a daemon. What runs may die of it, so the
    # files are read from outside.
    local file
    lazy_fleet 40 large
    on b pull large
    on b ctr_start sleeper large
    file=$(ls -d "$W"/b/speedy/l/*/fs/data/noise-5)
    pkill -KILL -f "keeper --while-needed --socket $W/b/"
    on b daemon_stop speedy-b KILL
    wait_for 10 "the keeper's end" eval "! pgrep -f 'keeper --while-needed --socket $W/b/' >/dev/null"
    ! timeout 20 sha256sum "$file" >"$W/late" 2>&1 || fail "a read of what nobody serves succeeded"
    grep -q 'error' "$W/late" || fail "a read of what nobody serves did not fail at once: $(cat "$W/late")"
    link_post "link?mbit=0"
    through_link trusting on b start_speedy --metrics "$(on b metrics_address)" --store "$SPEEDY_STORE"
    wait_for 10 "containerd to find Speedy again" on b speedy_is_reached
    timeout 60 sha256sum "$file" >"$W/late" || fail "reads do not work again"
    grep -q "$(cut -d' ' -f1 "$W/late")" "$W/expected/large.txt" || fail "the read gave other bytes"
    on b ctr_remove sleeper
}

test_lazy_machine_is_rebooted() {
    # While a container reads: every process of the node is gone, every mount and loop device, and the kernel calls itself another boot. The
    # store is away by then. What was here serves without it, each chunk hashed again before its first use; what was not waits, and is right
    # when the store is back (or fails after a minute: LAZY_LONG).
    local here reader started
    lazy_fleet 40 large pause
    on b pull pause
    on b layers_within 60 >/dev/null
    on b pull large
    on b ctr_start sleeper large
    on b ctr_exec sleeper /bin/sh -c 'cat /data/hello && cd /data && sha256sum noise-0' >"$W/before"
    store_fault refuse
    on b ctr_exec sleeper /bin/sha256sum /data/noise-5 >/dev/null 2>&1 &
    reader=$!
    sleep 1
    kill -0 "$reader" || fail "a read of what is not here did not wait"
    on b node_reboots
    wait "$reader" || true
    through_link trusting on b start_speedy --metrics "$(on b metrics_address)" --store "$SPEEDY_STORE"
    on b start_containerd "$CONTAINERD_VERSION"
    wait_for 10 "containerd to find Speedy" on b speedy_is_reached
    on b ctr containers rm sleeper >/dev/null || fail "the container of before cannot be removed"
    here=$(milliseconds on b ctr_run --rm "$(image pause)" complete /bin/cat /data/hello)
    printf 'a container of an image that was complete started in %d ms, without the store\n' "$here"
    on b ctr_start again large
    on b ctr_exec again /bin/sh -c 'cat /data/hello && cd /data && sha256sum noise-0' >"$W/after" || fail "what was here before the reboot cannot be read"
    expect_equal "$(cat "$W/before")" "$(cat "$W/after")" "what was here before the reboot"
    if [[ -n ${LAZY_LONG:-} ]]; then
        started=$(now_ms)
        ! on b ctr_exec again /bin/sha256sum /data/noise-5 >"$W/late" 2>&1 || fail "what is not here was read without the store"
        (($(now_ms) - started > 50000)) || fail "a read of what is not here failed after $(($(now_ms) - started)) ms"
        expect_contains "$(cat "$W/late")" "rror" "the read fails"
        on b fill_has_failed || fail "the fill has not failed: $(on b layers_json .)"
    fi
    on b ctr_exec again /bin/sha256sum /data/noise-5 >"$W/late" &
    reader=$!
    sleep 3
    kill -0 "$reader" || fail "a read did not wait for the store: $(cat "$W/late")"
    store_fault none
    link_post "link?mbit=0"
    wait "$reader" || fail "the read failed although the store was back"
    grep -q "$(cut -d' ' -f1 "$W/late")" "$W/expected/large.txt" || fail "the read gave other bytes"
    # What failed is begun again.
    wait_for 60 "the layer to be native" no_lazy || fail "the layer is not native"
    on b ctr_remove again
    expect_no_layers_from_registry large
    boot_id_back
}

# node_reboots: nothing of this node is left but its disk. The kernel's name of this boot is another one until it is unmounted.
node_reboots() {
    local pid mount
    for pid in $(pgrep -f "containerd-shim.* -address $CONTAINERD_ADDRESS"); do
        kill -KILL $(cat "/proc/$pid/task/"*/children 2>/dev/null) "$pid" 2>/dev/null || true
    done
    daemon_stop "$(node_daemon containerd)" KILL
    daemon_stop "$(node_daemon speedy)" KILL
    pkill -KILL -f "keeper --while-needed --socket $N/" || true
    for mount in $(mounts_below "$N"); do umount "$mount" 2>/dev/null || umount -l "$mount" || true; done
    losetup -n -O NAME,BACK-FILE | awk -v top="$N/" 'index($2, top) == 1 { print $1 }' | xargs -r losetup -d
    wait_for 10 "the loop devices to go" no_lazy || fail "loop devices are left: $(losetup -n -O NAME,BACK-FILE)"
    rm -rf "$N/run" "/run/containerd/runc/$(node_daemon "$WORLD")"
    tr 0-9a-f 1-9a-f0 </proc/sys/kernel/random/boot_id >"$W/boot_id"
    mount --bind "$W/boot_id" /proc/sys/kernel/random/boot_id
}

test_lazy_many_containers_share_their_layers() {
    # Of an image of 128 layers, begun before its data is here and gone on with when it is: each layer is attached once, whoever uses it.
    local count=50 number ids=() layers
    [[ -z ${LAZY_LONG:-} ]] || count=200
    lazy_fleet 20 deep
    on b pull deep
    for ((number = 1; number <= count; number++)); do
        on b ctr_start "many-$number" deep
        ids+=("many-$number")
        ((number != count / 2)) || link_post "link?mbit=0"
    done
    on b layers_within 60 >/dev/null
    wait_for 60 "the layers to be native" no_lazy || fail "not all layers are native: $(losetup -n -O NAME,BACK-FILE)"
    expect_equal "$count" "$(on b ctr tasks ls | grep -c RUNNING)" "containers that run"
    layers=$(on b layers_where .attached)
    ((layers > 100)) || fail "only $layers layers are attached"
    expect_equal "$layers" "$(attach_points | sort -u | wc -l)" "attach points"
    # One that was attached lazily has the mount of its file on top.
    (($(attach_points | wc -l) <= 2 * layers)) || fail "$(attach_points | wc -l) mounts for $layers layers"
    for number in 1 $((count / 2)) "$count"; do on b ctr_exec "many-$number" /bin/listing | LC_ALL=C sort >"$W/listing-$number"; done
    for number in $((count / 2)) "$count"; do cmp "$W/listing-1" "$W/listing-$number" || fail "container $number sees other files"; done
    on b ctr_remove "${ids[@]}"
    on b expect_listing ctr deep
    on b remove_everything
    wait_for 60 "the layers to go" on b no_layers || fail "layers are left: $(on b layers)"
    expect_equal "" "$(attach_points)" "attach points that are left"
}
attach_points() { mounts_below "$W/b/speedy/l"; }

test_lazy_disk_is_full() {
    # Room for a third of the layer. What does not fit is read from the store as often as it is wanted; when there is room the rest is fetched.
    local kept
    lazy_fleet 0 large pause
    on b daemon_stop speedy-b
    truncate -s 200M "$W/small.ext4"
    mkfs.ext4 -q -m 0 "$W/small.ext4"
    mount -o loop "$W/small.ext4" "$W/b/speedy"
    through_link trusting restart_b --store "$SPEEDY_STORE"
    on b pull pause
    on b layers_within 60 >/dev/null
    on b ctr_start beside pause
    fallocate -l "$(($(df --output=avail -B1 "$W/b/speedy" | tail -n 1) - 36 * 1024 * 1024))" "$W/b/speedy/filler"
    on b pull large
    on b reader_start reader large
    wait_for 60 "the reader to have read everything" more_rounds reader 2 || fail "the reader hangs: $(tail -n 3 "$W/reader-reader")"
    (($(df --output=avail -B1M "$W/b/speedy" | tail -n 1) < 4)) || fail "the disk is not full: $(df "$W/b/speedy")"
    drop_caches
    wait_for 60 "the reader to read on" more_rounds reader $(($(rounds reader) + 2)) || fail "the reader hangs: $(tail -n 3 "$W/reader-reader")"
    expect_contains "$(cat "$W/speedy-b.log")" "a layer cannot be kept" "the log says that the disk is full"
    on b ctr_exec beside /bin/cat /data/hello >/dev/null || fail "another container does not work on a full disk"
    # The daemon dies of nothing, and starts on a full disk.
    SIGNAL=KILL through_link trusting restart_b --store "$SPEEDY_STORE"
    wait_for 60 "the reader to read on" more_rounds reader $(($(rounds reader) + 1)) || fail "the reader hangs: $(tail -n 3 "$W/reader-reader")"
    wait_for 30 "the fill to fail" on b fill_has_failed || fail "the layer has not failed: $(on b layers)"
    # As long as that: what fails for another reason is tried again 20 s later, and then 40, and 80.
    if [[ -n ${LAZY_LONG:-} ]]; then sleep 65; fi
    rm "$W/b/speedy/filler"
    wait_for 30 "the layer to be native" no_lazy || { tail -n 30 "$W/speedy-b.log" >&2; df "$W/b/speedy" >&2; fail "the layer is not native: $(on b layers)"; }
    on b expect_reader_well reader large
    on b ctr_remove reader
    on b ctr_remove beside
    on b remove_everything
    on b daemon_stop speedy-b
    for kept in $(mounts_below "$W/b/speedy"); do umount "$kept"; done
    umount "$W/b/speedy"
    rm "$W/small.ext4"
    restart_b
}

fill_has_failed() { [[ $(layers_where '.state == "failed"') == 1 ]]; }

test_lazy_removed_image_is_fetched_no_further() {
    # What is removed while it is fetched takes nothing of the link any more. It was fetched to its end once, and then reported as a
    # layer that cannot be fetched.
    lazy_fleet 40 large
    # Only what is said from now on counts.
    : >"$W/speedy-b.log"
    on b pull large
    on b ctr_run --rm "$(image large)" first /bin/cat /data/hello >/dev/null
    on b ctr images rm --sync "$(image large)" >/dev/null
    wait_for 20 "the layer to be removed" on b no_layers
    sleep 1
    link_post reset
    sleep 3
    (($(link_counters .down) < 1000000)) || fail "$(link_counters .down) bytes were fetched of what was removed"
    ! grep -q "a layer cannot be fetched" "$W/speedy-b.log" || fail "its removal was reported as a failure"
}

test_lazy_off() {
    lazy_fleet 0 large
    SPEEDY_FETCH_LAZY=off through_link trusting fresh_b --store "$SPEEDY_STORE"
    on b expect_listing ctr large
    expect_equal 0 "$(lazily)" "layers that are read lazily"
    through_link trusting fresh_b --store "$SPEEDY_STORE"
}

# traces_reach FIELD NUMBER: in what this node's daemon says of traces.
trace_is_fetched() { [[ $(explain "$(image "$1")" | jq -r '.[-1].trace') == *"were fetched first"* ]]; }
traces_reach() { (($(status_of ".traces.$1") >= $2)); }

test_lazy_learns_what_starts_read() {
    # Node b starts an image and reads one file of six. The next node (node b again, with nothing, another key and nobody's trust) has that
    # file after the pull, before anything runs on it, and little else; when the store is cut off then, the container reads it.
    local took recorded down
    lazy_fleet 40 large
    on b pull large
    on b ctr_run --rm "$(image large)" first /bin/sha256sum /data/noise-3 >"$W/got"
    wait_for 60 "the start to be recorded" on b traces_reach written 1 || { on b status_of .traces >&2; fail "the start is not recorded"; }
    expect_contains "$(on b explain "$(image large)" | jq -r '.[-1].trace')" "recorded here" "explain tells of it"

    through_link trusting fresh_b --store "$SPEEDY_STORE"
    link_post reset "blobs?layers=refuse" "link?mbit=40"
    on b pull large
    wait_for 20 "the chunks of the trace" on b traces_reach bytes $((16 << 20)) || { on b status_of .traces >&2; fail "nothing is prefetched"; }
    # The last chunks are on their way when there are as many bytes as the file has.
    wait_for 20 "the end of the trace" on b trace_is_fetched large || { on b explain "$(image large)" >&2; fail "the trace is not fetched"; }
    recorded=$(on b status_of .traces.bytes)
    down=$(link_counters .down)
    printf 'prefetched %d bytes, %d over the link\n' "$recorded" "$down"
    ((recorded < 40 << 20)) || fail "the trace of a start that read 16 MiB has $recorded bytes"
    ((down < recorded * 13 / 10 + 2000000)) || fail "$down bytes came over the link for a trace of $recorded"
    store_fault refuse
    took=$(milliseconds on b ctr_run --rm "$(image large)" second /bin/sha256sum /data/noise-3 2>"$W/again")
    store_fault none
    expect_equal "$(cat "$W/got")" "$(grep noise-3 "$W/again")" "what the second node read"
    printf 'the second node read 16 MiB in %d ms, without the store\n' "$took"
    link_post "link?mbit=0"
    wait_for 60 "the layer to be native" no_lazy || fail "the layer is not native"
    wait_for 30 "the use of the trace to be counted" on b traces_reach used 30 || { on b status_of .traces >&2; fail "it is not seen that the trace was used"; }
    expect_no_layers_from_registry large
}

test_lazy_pinned_image_is_here_before_it_starts() {
    # 96 MiB at 100 Mbit/s take 8 s: an image that is not pinned starts before. This one starts when nothing of it is missing, and a limit
    # that it does not keep to does not take it away.
    local before
    lazy_fleet 100 large pause
    SPEEDY_PIN='*/large:*,nothing/*' through_link trusting fresh_b --store "$SPEEDY_STORE"
    link_post reset "blobs?layers=refuse" "link?mbit=100"
    on b pull large
    on b ctr_start user large
    store_fault refuse
    link_post "link?mbit=0"
    drop_caches
    on b ctr_exec user /bin/sh -c 'cd /data && sha256sum noise-*' >"$W/read" || fail "a pinned image was not whole when its container started"
    expect_read_right large "$W/read"
    [[ $(on b layers_json 'map(select(.pinned)) | length') -ge 1 ]] || fail "layers does not tell of pins: $(on b layers_json .)"
    store_fault none
    on b layers_within 60 >/dev/null
    SPEEDY_LAYERS_LIMIT=32MiB SPEEDY_PIN='*/large:*' through_link trusting restart_b --store "$SPEEDY_STORE"
    wait_for 20 "the limit to be noticed" on b log_says_too_much || fail "no word of the limit"
    before=$(on b layers_json 'map(select(.pinned and .state == "complete") | .bytes) | add')
    ((before > 90 << 20)) || fail "a pinned image was given up: $(on b layers_json .)"
    on b expect_listing ctr large
    expect_no_layers_from_registry large
    on b ctr_remove user
    # Without the image its layers are cache as any other's.
    on b ctr images rm --sync "$(image large)"
    wait_for 30 "the layers of a removed image to go" on b no_pins || fail "still pinned: $(on b layers_json .)"
    through_link trusting fresh_b --store "$SPEEDY_STORE"
}
layers_json() { "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS" | jq -r "$1"; }
log_says_too_much() { grep -q 'layer images take more than their limit' "$W/speedy-b.log"; }
no_pins() { [[ $(layers_json 'map(select(.pinned)) | length') == 0 ]]; }

# expect_read_right NAME FILE: sums of files of /data as sha256sum prints them are those that the image's maker expects, of all that it has.
expect_read_right() {
    local sum file
    [[ $(wc -l <"$2") == 6 ]] || fail "not six files were read: $(cat "$2")"
    while read -r sum file; do
        grep -q "/data/$file.*$sum\|$sum.*/data/$file" "$W/expected/$1.txt" || fail "$file has other bytes"
    done <"$2"
}

test_lazy_traces_off() {
    lazy_fleet 0 large
    SPEEDY_FETCH_TRACES=off through_link trusting fresh_b --store "$SPEEDY_STORE"
    on b expect_listing ctr large
    sleep 12
    expect_equal "off: fetch.traces says so 0 0 0" "$(on b status_of '.traces | "\(.policy) \(.read) \(.written) \(.chunks)"')" "traces that are off"
    through_link trusting fresh_b --store "$SPEEDY_STORE"
}

test_lazy_damaged_traces_harm_nothing() {
    local store directory chain
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large
    on b lazy_is_possible || skip "this kernel reads no layers lazily"
    directory=${store#file://}
    for chain in "$directory"/refs/*/*; do
        chain=$directory/traces/${chain#"$directory/refs/"}
        mkdir -p "$chain"
        head -c 3000 /dev/urandom >"$chain/0123456789abcdef"
        head -c 3000000 /dev/zero >"$chain/123456789abcdef0"
        : >"$chain/23456789abcdef01"
    done
    on b expect_listing ctr large
    wait_for 10 "the traces to be read" on b traces_reach passed_over 3 || { on b status_of .traces >&2; fail "the damaged traces were not looked at"; }
    expect_equal "0 0" "$(on b status_of '.traces | "\(.read) \(.chunks)"')" "traces that were taken for good, and chunks fetched for them"
}
