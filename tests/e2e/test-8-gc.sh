# Collections of a store that is in use, by real processes that are killed at any moment.
# shellcheck shell=bash

FRESH=16       # images for each node that were never published
AGE=$((100 * 24 * 3600))

# gc OPTION...: of the store $STORE. Beside publishers a collection waits for a minute before it deletes, which is for other
# collections; there is one at a time here, and all else is as without --alone: the grace period is the one that publishers need.
gc() { (become_gc "$@"); }
# become_gc OPTION...: the same in place of this shell. Whoever kills a shell that waits for a collection does not kill the collection.
become_gc() { exec "$SPEEDY" gc --json --alone --root "$SPEEDY_ROOT" --store "$STORE" "$@"; }

# grow_old: everything on the store $STORE was written so many days before. For times when nothing is under way: a publisher's clock
# does not jump.
grow_old() {
    case $STORE in
        s3://*) cluster grow-old "$AGE" "${STORE#s3://*/}/" >/dev/null ;;
        *) python3 - "${STORE#file://}" "$AGE" <<'END' ;;
import os, sys
top, age = sys.argv[1], int(sys.argv[2])
for directory, _, names in os.walk(top):
    for name in names:
        file = os.path.join(directory, name)
        info = os.stat(file)
        os.utime(file, (info.st_atime, info.st_mtime - age))
END
    esac
}

nothing_is_under_way() {
    wait_published
    on b wait_published
    wait_for 30 "the layers to be durable" on b all_durable
}

# litter COUNT: chunks that nothing names, so that collections last for a while.
litter() {
    python3 - "$REPO/contrib/lib" "$STORE" "$1" <<'END'
import os, secrets, sys
sys.path.insert(0, sys.argv.pop(1))
names = [f"chunks/{name[:2]}/{name}" for name in (secrets.token_hex(32) for _ in range(int(sys.argv[2])))]
kind, _, place = sys.argv[1].partition("://")
if kind == "s3":
    import s3
    store, (bucket, prefix) = s3.Store(), place.split("/", 1)
    for name in names:
        store.call("PUT", bucket, f"{prefix}/{name}", body=b"litter")
else:
    for name in names:
        os.makedirs(os.path.join(place, os.path.dirname(name)), mode=0o700, exist_ok=True)
        with open(os.path.join(place, name), "wb") as file:
            file.write(b"litter")
END
}
# littered: how much of it is left.
littered() {
    case $STORE in
        s3://*) python3 "$REPO/contrib/lib/s3.py" ls "$STORE/chunks" | awk '$1 == 6' | wc -l ;;
        *) find "${STORE#file://}/chunks" -size -7c -type f | wc -l ;;
    esac
}
# forget_notice: that of a collection that was killed would hold publishers up for three hours. What it asked of S3 is done within some
# seconds, and so is with their looking who publish the small images of which something is dead; in a directory all of it is at once.
forget_notice() {
    case $STORE in
        s3://*)
            sleep 3
            python3 "$REPO/contrib/lib/s3.py" rm "$STORE/collection.json" || (($? == 4))
            ;;
        *) rm -f "${STORE#file://}/collection.json" ;;
    esac
}

# remove_image NAME: from this node's containerd.
remove_image() { ctr images rm --sync "$(image "$1")" >/dev/null; }

# forget NAME...: on the first node, and on the store.
forget() {
    local name
    for name in "$@"; do
        remove_image "$name"
        "$SPEEDY" images rm --execute --root "$SPEEDY_ROOT" --store "$STORE" "$(image "$name")" >/dev/null
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
        ((RANDOM % 6 != 0)) || SIGNAL=KILL SPEEDY_TRUST_KEYS=$publisher restart_speedy --store "$STORE"
    done
}

# collect_until END: collections, of which each is killed unless it is quicker; on S3 every second one later than the others, which are
# killed while they still read.
collect_until() {
    local end=$1 pid status reads=0 round=0
    [[ $STORE != s3://* ]] || reads=3
    while (($(now_ms) < end)); do
        become_gc --execute --rate $((20 + 20 * reads + RANDOM % 60)) >"$W/gc.out" 2>"$W/gc.err" &
        pid=$!
        sleep "$((reads * (round++ % 2) + RANDOM % 2)).$((RANDOM % 10))"
        kill -KILL "$pid" 2>/dev/null || true
        status=0
        wait "$pid" 2>/dev/null || status=$?
        case $status in
            0) echo ended ;;
            137) echo killed && forget_notice ;;
            *) fail "a collection fails: $(cat "$W/gc.err")" ;;
        esac >>"$W/collected"
        sleep "$((RANDOM % 2)).$((RANDOM % 10))"
    done
}

test_fleet_gc_race() {
    need_speedy
    STORE=$(file_store)
    gc_race "${GC_RACE:-35}" 1500
}
test_cluster_gc_race() {
    local FRESH=8
    cluster_store
    [[ $CLUSTER == ceph ]] || skip "only contrib/ceph makes objects old"
    STORE=$SPEEDY_STORE
    gc_race "${GC_RACE:-30}" 600
}

# gc_race SECONDS LITTER: two nodes publish, pull, run and remove images while their store is collected, again and again, by a process that
# is killed at random. Some of what they publish is being deleted just then. In the end no image with a name lacks a byte, and nothing
# dead is left.
gc_race() {
    local ours theirs end name names a b c
    # shellcheck disable=SC2046 # names without spaces
    make_images $(seq -f fresh-a%g "$FRESH") $(seq -f fresh-b%g "$FRESH") >/dev/null
    fresh_fleet "$STORE"
    ours=$(public_key)
    theirs=$(on b public_key)
    publish_all eight more aba empties
    on b pull more
    on b ctr_start gc-1 more
    # Of `aba` the refs go now, and index and chunks are old when it begins; of `empties` only the name has gone by then.
    forget aba
    nothing_is_under_way
    grow_old
    gc --execute | jq -e '.freed.kinds.refs.objects > 0' >/dev/null || fail "no ref of aba went"
    forget empties
    nothing_is_under_way
    grow_old
    litter "$2"
    grow_old
    gc | jq -e '[.kinds[] | select(.dead.objects > 0).kind] | contains(["refs", "indexes", "chunks"])' >/dev/null || fail "nothing is dead"
    rm -f "$W/collected" "$W/lived" "$W/b/lived"

    end=$(($(now_ms) + $1 * 1000))
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
    (($(grep -c killed "$W/collected") > 1)) || fail "collections were not killed"
    (($(littered) < $2 * 4 / 5)) || fail "$(littered) of $2 dead chunks are left: the collections did next to nothing"

    # Publishers that wait for a collection are killed, too, and begin anew; each node takes the other's word from now on.
    SIGNAL=KILL SPEEDY_TRUST_KEYS=$theirs restart_speedy --store "$STORE"
    SIGNAL=KILL SPEEDY_TRUST_KEYS=$ours restart_b --store "$STORE"
    nothing_is_under_way
    # What is left of the litter is no chunk, and would be called damaged.
    gc --execute >/dev/null
    expect_equal 0 "$(littered)" "litter that is left"
    expect_contains "$(expect_fsck 0 --store "$STORE")" clean "the store after it"
    on b ctr_exec gc-1 /bin/listing | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/more.txt" "$W/got.txt" "a container that ran all the time"
    on b ctr_remove gc-1

    # Nobody publishes any more. What is dead goes with the first, what only that needed with the next.
    names=$("$SPEEDY" images --json --root "$SPEEDY_ROOT" --store "$STORE" | jq -r '.images[].image' | sort -u)
    expect_contains "$names" "$(image more)" "images with a name"
    for _ in 1 2; do
        grow_old
        gc --execute >/dev/null
    done
    grow_old
    expect_equal "0 0 0" "$(gc | jq -r '"\(.dead.objects) \(.later.objects) \([.kinds[].young.objects] | add)"')" "dead, decaying and young objects that are left"
    expect_contains "$(expect_fsck 0 --store "$STORE")" clean "the store in the end"
    SPEEDY_TRUST_KEYS=$ours,$theirs fresh_b --store "$STORE"
    SPEEDY_PUBLISH_POLICY=off SPEEDY_TRUST_KEYS=$ours,$theirs restart_b --store "$STORE"
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

# keeping RULE COMMAND...: with this rule for images.
keeping() { SPEEDY_GC_KEEP=$1 "${@:2}"; }
# went: the images that a collection says go, or went.
went() { jq -r '[.removed[].image] | sort | join(" ")'; }
# days_unused NAME: for how many days nobody has used the image, as the first node sees it on the store.
days_unused() {
    "$SPEEDY" images --json --root "$SPEEDY_ROOT" --store "$STORE" |
        jq --arg name "$(image "$1")" --argjson now "$(date +%s)" '.images[] | select(.image == $name) | ($now - .used) / 86400 | floor'
}
is_in_use() { [[ $(days_unused "$1") == 0 ]]; }

test_fleet_use_elsewhere_keeps_an_image() {
    # Both images were published long ago. Node b pulls both and runs one: the first node sees that on the store, and a rule by last
    # use keeps this one alone.
    local rule='* age<30d used<30d'
    need_speedy
    STORE=$(file_store)
    fresh_fleet "$STORE"
    publish_all eight large
    nothing_is_under_way
    grow_old
    expect_equal "100 100" "$(days_unused eight) $(days_unused large)" "days since anybody used eight and large"
    expect_equal "$(image eight) $(image large)" "$(keeping "$rule" gc | went)" "what would go before anybody uses it"
    on b pull large
    on b expect_listing ctr eight
    wait_for 20 "the use of eight" is_in_use eight || fail "$("$SPEEDY" images --root "$SPEEDY_ROOT" --store "$STORE")"
    expect_equal 100 "$(days_unused large)" "days since anybody used large, which was only pulled"
    expect_equal "$(image large)" "$(keeping "$rule" gc --execute | went)" "what goes now that eight is in use"
    expect_equal "$(image eight)" "$("$SPEEDY" images --json --root "$SPEEDY_ROOT" --store "$STORE" | jq -r '.images[].image')" "images on the store"
    expect_contains "$(expect_fsck 0 --store "$STORE")" clean "the store after it"
    trusting fresh_b --store "$STORE"
    expect_from_store ctr eight 8
}
