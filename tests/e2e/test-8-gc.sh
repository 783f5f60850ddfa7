# Collections of a store that is in use, by real processes that are killed at any moment.
# shellcheck shell=bash

GC_RACE=${GC_RACE:-35} # seconds for which everything happens at once
FRESH=16       # images for each node that were never published
AGE=$((100 * 24 * 3600))

# gc OPTION...: of the store in $STORE. Beside publishers a collection waits for a minute before it deletes, which is for other
# collections; there is one at a time here, and all else is as without --alone: the grace period is the one that publishers need.
gc() { "$SPEEDY" gc --json --alone --root "$SPEEDY_ROOT" --store "file://$STORE" "$@"; }

# grow_old DIRECTORY|FILE: was written so many days before. For times when nothing is under way: a publisher's clock does not jump.
grow_old() {
    python3 - "$1" "$AGE" <<'END'
import os, sys
top, age = sys.argv[1], int(sys.argv[2])
files = [top] if os.path.isfile(top) else [os.path.join(d, f) for d, _, names in os.walk(top) for f in names]
for file in files:
    try:
        info = os.stat(file)
        os.utime(file, (info.st_atime, info.st_mtime - age))
    except FileNotFoundError:
        pass
END
}

nothing_is_under_way() {
    wait_published
    on b wait_published
    wait_for 30 "the layers to be durable" on b all_durable
}

# litter: 1500 chunks that nothing names, so that collections last for a while.
litter() {
    python3 - "$STORE/chunks" <<'END'
import os, secrets, sys
for _ in range(1500):
    name = secrets.token_hex(32)
    directory = os.path.join(sys.argv[1], name[:2])
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with open(os.path.join(directory, name), "wb") as file:
        file.write(b"litter")
END
}
littered() { find "$STORE/chunks" -size -7c -type f | wc -l; }

# remove_image NAME: from this node's containerd.
remove_image() { ctr images rm --sync "$(image "$1")" >/dev/null; }

# forget NAME...: on the first node, and on the store.
forget() {
    local name
    for name in "$@"; do
        remove_image "$name"
        "$SPEEDY" images rm --execute --root "$SPEEDY_ROOT" --store "file://$STORE" "$(image "$name")" >/dev/null
    done
}

# live END PUBLISHER NAME...: pulls, runs and removes images until END, in milliseconds, each that was never published once. Speedy is
# killed now and then, and with it publishers that wait for a collection; it takes the word of PUBLISHER.
live() {
    local end=$1 publisher=$2 names=("${@:3}") name number=0
    while (($(now_ms) < end)); do
        name=${names[RANDOM % ${#names[@]}]}
        ((RANDOM % 2 == 0 || number == FRESH)) || name=fresh-${NODE:-a}$((++number))
        expect_listing ctr "$name"
        echo "$name" >>"$N/lived"
        ((RANDOM % 3 == 0)) || remove_image "$name"
        ((RANDOM % 6 != 0)) || SIGNAL=KILL SPEEDY_TRUST_KEYS=$publisher restart_speedy --store "file://$STORE"
    done
}

# collect_until END: collections, of which each is killed unless it is quicker.
collect_until() {
    local end=$1 pid status
    while (($(now_ms) < end)); do
        gc --execute --rate $((20 + RANDOM % 100)) >"$W/gc.out" 2>"$W/gc.err" &
        pid=$!
        sleep "$((RANDOM % 2)).$((RANDOM % 10))"
        kill -KILL "$pid" 2>/dev/null || true
        status=0
        wait "$pid" 2>/dev/null || status=$?
        case $status in
            0) echo ended ;;
            137) echo killed ;;
            *) fail "a collection fails: $(cat "$W/gc.err")" ;;
        esac >>"$W/collected"
        # Its notice would hold publishers up for three hours; nobody deletes now.
        grow_old "$STORE/collection.json"
        sleep "$((RANDOM % 2)).$((RANDOM % 10))"
    done
}

test_fleet_gc_race() {
    # Two nodes publish, pull, run and remove images while their store is collected, again and again, by a process that is killed at
    # random. Some of what they publish is being deleted just then. In the end no image with a name lacks a byte, and nothing dead is left.
    local url ours theirs end name names a b c
    need_speedy
    # shellcheck disable=SC2046 # names without spaces
    make_images $(seq -f fresh-a%g "$FRESH") $(seq -f fresh-b%g "$FRESH") >/dev/null
    url=$(file_store)
    STORE=${url#file://}
    fresh_fleet "$url"
    ours=$(public_key)
    theirs=$(on b public_key)
    publish_all eight more aba empties
    on b pull more
    on b ctr_start gc-1 more
    # Of `aba` the refs go now, and index and chunks are old when it begins; of `empties` only the name has gone by then.
    forget aba
    nothing_is_under_way
    grow_old "$STORE"
    gc --execute | jq -e '.freed.kinds.refs.objects > 0' >/dev/null || fail "no ref of aba went"
    forget empties
    nothing_is_under_way
    grow_old "$STORE"
    litter
    grow_old "$STORE"
    gc | jq -e '[.kinds[] | select(.dead.objects > 0).kind] | contains(["refs", "indexes", "chunks"])' >/dev/null || fail "nothing is dead"
    rm -f "$W/collected" "$W/lived" "$W/b/lived"

    end=$(($(now_ms) + GC_RACE * 1000))
    collect_until "$end" &
    c=$!
    live "$end" "$theirs" aba eight empties large &
    a=$!
    on b live "$end" "$ours" aba empties more zstd &
    b=$!
    wait "$c"
    wait "$a"
    wait "$b"
    sort "$W/collected" | uniq -c
    cat "$W/lived" "$W/b/lived" | sort | uniq -c
    (($(grep -c killed "$W/collected") > 3)) || fail "collections were not killed"
    (($(littered) < 1200)) || fail "$(littered) of 1500 dead chunks are left: the collections did next to nothing"

    # Publishers that wait for a collection are killed, too, and begin anew; each node takes the other's word from now on.
    SIGNAL=KILL SPEEDY_TRUST_KEYS=$theirs restart_speedy --store "$url"
    SIGNAL=KILL SPEEDY_TRUST_KEYS=$ours restart_b --store "$url"
    nothing_is_under_way
    expect_contains "$(expect_fsck 0 --store "$url")" clean "the store after it"
    on b ctr_exec gc-1 /bin/listing | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/more.txt" "$W/got.txt" "a container that ran all the time"
    on b ctr_remove gc-1

    # Nobody publishes any more. What is dead goes with the first, what only that needed with the next.
    names=$("$SPEEDY" images --json --root "$SPEEDY_ROOT" --store "$url" | jq -r '.images[].image' | sort -u)
    expect_contains "$names" "$(image more)" "images with a name"
    for _ in 1 2; do
        grow_old "$STORE"
        gc --execute >/dev/null
    done
    grow_old "$STORE"
    expect_equal "0 0 0" "$(gc | jq -r '"\(.dead.objects) \(.later.objects) \([.kinds[].young.objects] | add)"')" "dead, decaying and young objects that are left"
    expect_contains "$(expect_fsck 0 --store "$url")" clean "the store in the end"
    SPEEDY_TRUST_KEYS=$ours,$theirs fresh_b --store "$url"
    SPEEDY_PUBLISH_POLICY=off SPEEDY_TRUST_KEYS=$ours,$theirs restart_b --store "$url"
    link_post reset "blobs?layers=refuse"
    for name in $names; do
        name=${name##*/}
        on b expect_listing ctr "${name%:1}"
    done
    expect_no_layers_from_registry "all of them"
    link_post "blobs?layers=allow"
    fresh_b
    fresh_speedy
}
