# What an operator does to a store that is in use: keys rotate, and what is missing or damaged is found and brought back.
# shellcheck shell=bash

test_cluster_credentials_rotate() {
    # A file of keys is replaced under a running daemon, before and after the store forgets the old ones: it never restarts.
    local keys=$W/credentials pid key
    cluster_store
    [[ $CLUSTER == ceph ]] || skip "only contrib/ceph makes keys"
    new_key node-1 "$keys"
    without_own_keys "$keys" fresh_speedy --store "$SPEEDY_STORE"
    pid=$(daemon_pid speedy)
    publish_all eight
    new_key node-2 "$keys"
    cluster remove-key node-1
    publish_all more
    cluster remove-key node-2
    pull tiny
    wait_for 60 "a refusal" publish_is_refused
    new_key node-3 "$keys"
    wait_published
    expect_equal "$pid" "$(daemon_pid speedy)" "the daemon was not started again"
    daemon_runs speedy || fail "the daemon has ended"
    for key in "$keys".*; do
        if grep -qF "$(awk '/secret/ { print $3 }' "$key")" "$W/speedy.log"; then fail "a secret is in the log"; fi
    done
    fresh_speedy
}
# new_key ID FILE: replaces the file; keeps a copy.
new_key() {
    cluster new-key "$1" >"$2.$1"
    cp "$2.$1" "$2.new"
    mv "$2.new" "$2"
}
without_own_keys() {
    (unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY && AWS_SHARED_CREDENTIALS_FILE=$1 "${@:2}")
}
publish_is_refused() { status_of '.publish.problems[].message' | grep -q 'refuses access'; }

# fsck OPTION...: of this node's store; prints, and leaves the exit code in $N/fsck.code.
fsck() {
    local code=0
    "$SPEEDY" fsck --address "$SPEEDY_ADDRESS" --root "$SPEEDY_ROOT" --containerd "$CONTAINERD_ADDRESS" "$@" 2>"$N/fsck.err" || code=$?
    echo "$code" >"$N/fsck.code"
}
# expect_fsck CODE [OPTION...]: prints what it prints.
expect_fsck() {
    fsck "${@:2}" | tee "$N/fsck.out"
    [[ $(cat "$N/fsck.code") == "$1" ]] || fail "fsck ${*:2} ends with $(cat "$N/fsck.code"), not $1: $(cat "$N/fsck.out" "$N/fsck.err")"
}
fsck_found() { jq -r '.findings[].object' | sort; }
harm() { python3 "$HERE/harm.py" "$@" | sort; }
# same_store WANT GOT: what images need, byte by byte.
same_store() {
    local kind got=$2
    if [[ $got == s3://* ]]; then
        got=$(mktemp -d "$W/got.XXXXXX")
        python3 "$HERE/harm.py" "$2" copy "$got"
    fi
    for kind in images documents refs indexes chunks; do diff -r -x '*#*' "$1/$kind" "$got/$kind" >&2 || fail "$kind are not what they were"; done
    [[ $got == "$2" ]] || rm -r "$got"
}

# fsck_fleet [S3-URL]: an image of the first node is on the store $STORE (a directory is its path), node b runs it from there; $SOUND is a
# copy of the store.
fsck_fleet() {
    local url
    need_speedy
    url=${1:-$(file_store)}
    fresh_fleet "$url"
    publish_all more
    STORE=${url#file://}
    on b pull more
    on b ctr_start fsck-1 more
    wait_for 30 "the layers to be durable" on b all_durable
    SOUND=$(mktemp -d "$W/sound.XXXXXX")
    case $STORE in
        s3://*) python3 "$HERE/harm.py" "$STORE" copy "$SOUND" ;;
        *) cp -a "$STORE/." "$SOUND" ;;
    esac
}

test_fleet_fsck() {
    fsck_fleet
    harmed_is_named_and_comes_back
}
test_cluster_fsck_harmed() {
    cluster_store
    fsck_fleet "$SPEEDY_STORE"
    harmed_is_named_and_comes_back
}

# Whatever is done to an object of whatever kind, fsck names that one and nothing else; then all at once, and repair brings all back, byte by
# byte, while a container of it runs elsewhere.
harmed_is_named_and_comes_back() {
    local kind how wanted round
    expect_contains "$(expect_fsck 0)" clean "a sound store"
    for kind in documents refs indexes chunks; do
        for how in lost cut flipped; do
            wanted=$(harm "$STORE" "$kind" "$how" "$kind$how")
            expect_equal "$wanted" "$(expect_fsck 1 --json | fsck_found)" "one of $kind, $how"
            expect_fsck 0 --repair >/dev/null
            same_store "$SOUND" "$STORE"
        done
    done
    harm "$STORE" chunks lost 99 >/dev/null
    expect_contains "$(expect_fsck 1 --quick)" "$(image more) (linux/amd64)" "which image is touched"
    expect_fsck 0 --repair >/dev/null
    harm "$STORE" all 7 >"$W/harmed"
    expect_fsck 1 --json | fsck_found >"$W/found"
    expect_equal "" "$(comm -13 "$W/harmed" "$W/found")" "findings that nobody harmed"
    # What hides behind an index or a ref comes to light once that is back.
    for round in 1 2 3; do
        fsck --repair >/dev/null
        [[ $(cat "$N/fsck.code") != 0 ]] || break
    done
    expect_fsck 0 >/dev/null
    same_store "$SOUND" "$STORE"
    on b ctr_exec fsck-1 /bin/listing | LC_ALL=C sort >"$W/got.txt"
    [[ -s $W/got.txt ]] || fail "the container on node b lists nothing"
    on b ctr_remove fsck-1
}

test_fleet_fsck_killed() {
    # SIGKILL at any point of a repair: nothing becomes worse, and the next one brings everything back.
    local round pid
    fsck_fleet
    for round in 1 2 3 4 5 6 7 8; do
        harm "$STORE" all "$round" >/dev/null
        "$SPEEDY" fsck --repair --address "$SPEEDY_ADDRESS" --root "$SPEEDY_ROOT" --containerd "$CONTAINERD_ADDRESS" >/dev/null 2>&1 &
        pid=$!
        sleep "0.$((RANDOM % 10))$((RANDOM % 10))"
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
        fsck --repair >/dev/null
        fsck --repair >/dev/null
        expect_fsck 0 --repair >/dev/null
        same_store "$SOUND" "$STORE"
    done
    on b ctr_remove fsck-1
}

test_fleet_fsck_cannot_tell() {
    local store
    fsck_fleet
    on b ctr_remove fsck-1
    # Node b has no blobs and no key of the publisher: it says what it cannot do.
    harm "$STORE" refs cut 1 >/dev/null
    on b expect_fsck 1 --repair >"$W/said"
    expect_contains "$(cat "$W/said")" "only the node with the key" "who can repair a ref"
    expect_fsck 0 --repair >/dev/null
    jq '.format = 9' "$SOUND/speedy.json" >"$STORE/speedy.json"
    expect_fsck 2 >/dev/null
    expect_contains "$(cat "$N/fsck.err")" "format 9" "a newer store"
    cp "$SOUND/speedy.json" "$STORE/speedy.json"
    AWS_ENDPOINT_URL=http://127.0.0.1:1 AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y expect_fsck 2 --store s3://nowhere/x >/dev/null
    expect_contains "$(cat "$N/fsck.err")" "not reachable" "a store that is not there"
    # A layer image of the node itself; its scrub would be quicker.
    SPEEDY_SCRUB_RATE=0 restart_speedy --store "file://$STORE"
    store=$(layer_files | grep erofs | head -n1)
    python3 - "$store" <<<'import sys; f = open(sys.argv[1], "r+b"); f.seek(1100); b = f.read(1); f.seek(-1, 1); f.write(bytes([b[0] ^ 1]))' ||
        fail "cannot damage $store"
    expect_fsck 1 >"$W/said"
    expect_contains "$(cat "$W/said")" "of this node" "a damaged layer image"
    fresh_speedy
}

test_fleet_fsck_registry() {
    # No node has the image any more, and the store lacks some of it: it comes back from the registry, on whatever node is asked.
    local kind round
    fsck_fleet
    on b ctr_remove fsck-1
    remove_everything
    on b remove_everything
    wait_for 20 "the layers to go" no_layers
    wait_for 20 "the layers of node b to go" on b no_layers
    for round in 1 2; do
        harm "$STORE" chunks lost "$round" >/dev/null
        harm "$STORE" chunks cut "$round$round" >/dev/null
    done
    harm "$STORE" indexes lost 1 >/dev/null
    expect_contains "$(expect_fsck 1 --repair)" "with --from-registry they are fetched" "what there is to do"
    for round in 1 2; do fsck --repair --from-registry --hosts-dir "$N/certs.d" >/dev/null; done
    expect_contains "$(expect_fsck 0)" clean "the store after its repair"
    same_store "$SOUND" "$STORE"
    # A node that publishes nothing and only takes the first one's word; the registry is away, and is back.
    harm "$STORE" chunks lost 5 >/dev/null
    link_post "blobs?layers=refuse"
    expect_contains "$(trusting on b expect_fsck 1 --repair --from-registry --hosts-dir "$W/b/certs.d")" "failed: $REGISTRY/more@sha256:" "why it is not repaired"
    expect_contains "$(on b expect_fsck 1 --repair --from-registry --hosts-dir "$W/b/certs.d")" "nobody whose word this node takes" "who trusts nobody"
    link_post "blobs?layers=allow"
    trusting on b expect_fsck 0 --repair --from-registry --hosts-dir "$W/b/certs.d" >/dev/null
    on b expect_fsck 0 >/dev/null
    expect_equal "" "$(NAMESPACE=default ctr images ls -q)$(NAMESPACE=default on b ctr images ls -q)" "images that are left in containerd"
    expect_from_store ctr more 9
}

test_cluster_fsck_read_only() {
    # With keys that may only read nothing is repaired, and that is said.
    local name store
    cluster_store
    [[ $CLUSTER == ceph ]] || skip "only contrib/ceph has a reader"
    fresh_speedy --store "$SPEEDY_STORE"
    publish_all eight
    expect_fsck 0 >/dev/null
    name=$(python3 "$REPO/contrib/lib/s3.py" ls "$SPEEDY_STORE/chunks" | grep -oE 'chunks/[0-9a-f/]+' | head -n1)
    [[ -n $name ]] || fail "no chunks on the store"
    python3 "$REPO/contrib/lib/s3.py" rm "$SPEEDY_STORE/$name"
    store=$SPEEDY_STORE
    (eval "$(cluster env --reader)" && expect_fsck 1 --repair --store "$store") >"$W/said"
    expect_contains "$(cat "$W/said")" "$name" "the chunk that is gone"
    expect_contains "$(cat "$W/said")" "cannot be written with these credentials" "read-only keys"
    expect_fsck 0 --repair >/dev/null
    expect_contains "$(expect_fsck 0)" clean "the store after its repair"
    fresh_speedy
}
