# Several nodes and one store: what one node pulled, the others run without the registry's layers; and every fault of the store
# ends in the ordinary pull.
# shellcheck shell=bash
#
# The first node pulls and publishes; node b is the other one. Its registry is behind a link that can refuse every layer.

# --- node b takes everything from the store ---------------------------------------------------------------------------

# expect_from_store CLIENT NAME LAYERS: node b, on which nothing is, runs it while the registry refuses every layer.
expect_from_store() {
    link_post reset "blobs?layers=refuse"
    on b expect_listing "$1" "$2"
    expect_no_layers_from_registry "$2 by $1"
    wait_for 30 "the layers to be durable" on b all_durable
    expect_equal "$3" "$(on b layers_where '.origin == "fetched" and .state == "complete"')" "$2 by $1: layers from the store"
    expect_equal 0 "$(($(on b applies image) + $(on b applies files) + $(on b applies known)))" "$2 by $1: layers that were applied"
    link_post "blobs?layers=allow"
}

fleet_by() {
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all pause more
    expect_from_store "$1" more "$2"
}
test_fleet_by_ctr() { fleet_by ctr 9; }
test_fleet_by_nerdctl() { fleet_by nerdctl 9; }
test_fleet_by_crictl() { fleet_by crictl 10; }

test_fleet_parallel_unpack() {
    # containerd 2.4 prepares the layers of an image away from each other; those in the store are answered as staged.
    local store client
    version_at_least "$VERSION" 2.4 || skip "config/containerd-2.4-parallel.toml is for containerd 2.4 and newer"
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all pause eight aba
    on b unpack_in_parallel
    expect_contains "$(on b ctr plugins ls -d "id==speedy")" rebase "the plugin's capabilities"
    expect_from_store ctr eight 8
    on b remove_everything
    trusting fresh_parallel_b --store "$store"
    expect_from_store crictl eight 9
    # A layer that is not in the store is pulled, on those that are; a layer twice in one chain is staged twice.
    trusting fresh_parallel_b --store "$store"
    on b expect_listing ctr more
    expect_equal 8 "$(on b layers_where '.origin == "fetched"')" "layers from the store"
    link_post "blobs?layers=refuse"
    on b expect_listing ctr aba
    link_post "blobs?layers=allow"
    on b remove_everything
    on b expect_nothing_left
    on b daemon_stop containerd-b
    on b start_containerd "$VERSION"
}
# As fresh_b, and containerd keeps its configuration.
fresh_parallel_b() {
    fresh_b "$@"
    on b unpack_in_parallel
}
unpack_in_parallel() {
    daemon_stop "$(node_daemon containerd)"
    start_containerd "$VERSION" "$REPO/config/containerd-2.4-parallel.toml"
    wait_for 10 "Speedy to see containerd" sees_containerd
}
sees_containerd() { [[ $(status_of .containerd) != null ]]; }

test_fleet_odd_chains() {
    # A layer several times in one chain, the empty layer five times, 128 layers, 96 MiB in one.
    local name
    need_speedy
    fresh_fleet "$(file_store)"
    publish_all aba empties deep large
    link_post reset "blobs?layers=refuse"
    for name in aba empties deep large; do
        on b expect_listing ctr "$name"
        expect_no_layers_from_registry "$name"
    done
}

test_fleet_takes_what_it_has() {
    # Node b has eight's layers itself; of `more` it needs the ninth.
    need_speedy
    fresh_fleet "$(file_store)"
    publish_all more
    on b pull eight
    link_post reset "blobs?layers=refuse"
    on b expect_listing ctr more
    expect_no_layers_from_registry more
    expect_equal 9 "$(on b layers_where true)" "layers on node b"
}

test_fleet_by_hand() {
    # policy "off": nothing is published until somebody says so, and then it is durable when the command returns.
    local store
    need_speedy
    store=$(file_store)
    fleet
    SPEEDY_PUBLISH_POLICY=off fresh_speedy --store "$store"
    pull eight
    sleep 1
    expect_equal 0 "$(find "${store#file://}" -path '*/refs/*' -type f | wc -l)" "refs on the store, with publish.policy = off"
    publish "$(image eight)"
    expect_equal 8 "$(find "${store#file://}" -path '*/refs/*' -type f | wc -l)" "refs on the store"
    trusting fresh_b --store "$store"
    expect_from_store ctr eight 8
}
publish() { "$SPEEDY" publish --address "$SPEEDY_ADDRESS" --containerd "$CONTAINERD_ADDRESS" --namespace "$(node_daemon "$WORLD")" "$@"; }

test_fleet_publishes_what_containerd_unpacked() {
    # Layers that the walking differ unpacked are published from containerd's content store.
    need_speedy
    fresh_fleet "$(file_store)"
    use_differ walking
    pull eight
    expect_equal 0 "$(layers_where true)" "layer images with containerd's own differ"
    publish "$(image eight)"
    use_differ speedy
    expect_from_store ctr eight 8
}

test_fleet_from_an_archive() {
    # An image that was never in this containerd: an OCI layout, and docker archives as ctr and nerdctl write them and as docker
    # did for ten years (a plain tar in a directory for each layer).
    local store way
    need_speedy
    fresh_fleet "$(file_store)"
    pull eight
    ctr images export "$W/ctr.tar" "$(image eight)"
    nerdctl pull --quiet "$(image eight)"
    nerdctl save -o "$W/nerdctl.tar" "$(image eight)"
    mkdir "$W/layout"
    tar -C "$W/layout" -xf "$W/ctr.tar"
    old_docker_archive "$W/layout" "$(image eight)" "$W/docker.tar"
    for way in oci-layout=layout docker-archive=ctr.tar docker-archive=nerdctl.tar docker-archive=docker.tar; do
        store=$(file_store)
        fresh_speedy --store "$store"
        "$SPEEDY" publish --address "$SPEEDY_ADDRESS" "--${way%=*}" "$W/${way#*=}" "$(image eight)"
        is_named "$store" eight || fail "$way: the image has no name on the store"
        trusting fresh_b --store "$store"
        expect_from_store ctr eight 8
    done
    rm -rf "$W/layout" "$W/ctr.tar" "$W/nerdctl.tar" "$W/docker.tar"
}

# old_docker_archive LAYOUT REFERENCE FILE
old_docker_archive() {
    python3 - "$@" <<'END'
import gzip, hashlib, io, json, sys, tarfile
layout, reference, target = sys.argv[1:]
blob = lambda digest: open(f"{layout}/blobs/{digest.replace(':', '/')}", "rb").read()
manifest = json.loads(blob(json.load(open(f"{layout}/index.json"))["manifests"][0]["digest"]))
while "manifests" in manifest:
    manifest = json.loads(blob(manifest["manifests"][0]["digest"]))
config = blob(manifest["config"]["digest"])
name = hashlib.sha256(config).hexdigest() + ".json"
files, layers = {name: config}, []
for number, layer in enumerate(manifest["layers"]):
    data = blob(layer["digest"])
    layers.append(f"{number:064x}/layer.tar")
    files[layers[-1]] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
files["manifest.json"] = json.dumps([{"Config": name, "RepoTags": [reference], "Layers": layers}]).encode()
with tarfile.open(target, "w") as tar:
    for path, data in files.items():
        info = tarfile.TarInfo(path)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
END
}

test_fleet_publish_on_a_terminal() {
    # One line that fits the terminal and is gone at the end, after an error too; without a terminal plain lines.
    local columns
    need_speedy
    fleet
    SPEEDY_PUBLISH_POLICY=off fresh_speedy --store "$(file_store)"
    pull deep
    pull eight
    for columns in 80 40; do
        on_terminal "$columns" publish --force "$(image deep)" || fail "publish on a terminal of $columns columns"
        python3 - "$columns" "$W/terminal" <<'END' || fail "what a terminal of $columns columns shows"
import re, sys
columns, shown = int(sys.argv[1]), open(sys.argv[2], newline="").read()
plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", shown)
drawn = [line for line in re.split(r"[\r\n]+", plain) if "layers" in line and not line.startswith("published")]
assert len(set(drawn)) > 2, f"nothing moves: {drawn}"
assert max(map(len, drawn)) <= columns, f"too long: {max(drawn, key=len)!r}"
assert any("ETA" in line for line in drawn), drawn[-1]
assert shown.endswith("\r\n") and plain.rstrip().splitlines()[-1].startswith("published"), shown[-200:]
assert re.search(r"\x1b\[2?K\r?published [^\r\n]*\r\n$", shown), f"the line is not cleared: {shown[-400:]!r}"
END
    done
    mkdir "$W/later-store"
    echo '{"format": 99}' >"$W/later-store/speedy.json"
    ! on_terminal 80 publish --force --store "file://$W/later-store" "$(image deep)" || fail "a store of a later format is written to"
    python3 - "$W/terminal" <<'END' || fail "an error begins in the middle of a line"
import re, sys
shown = open(sys.argv[1], newline="").read()
assert shown.endswith("\r\n"), shown
assert re.search(r"(^|\n|\x1b\[2?K\r?)speedy: [^\r\n]*\r\n$", shown), repr(shown[-400:])
END
    publish --force "$(image eight)" 2>"$W/lines" >"$W/result"
    expect_equal 8 "$(grep -cE '^layer [1-8]/8 sha256:[0-9a-f]{64}: published, ' "$W/lines")" "lines of layers without a terminal"
    ! grep -q "$(printf '[\033\r]')" "$W/lines" "$W/result" || fail "control characters without a terminal"
}

# on_terminal COLUMNS COMMAND...: what a terminal of that width gets is in $W/terminal.
on_terminal() {
    local columns=$1
    shift
    export -f publish node_daemon
    # script runs $SHELL, or sh where there is none, and dash drops exported functions.
    SHELL=$BASH SPEEDY=$SPEEDY SPEEDY_ADDRESS=$SPEEDY_ADDRESS CONTAINERD_ADDRESS=$CONTAINERD_ADDRESS WORLD=$WORLD NODE=$NODE \
        script -qec "bash -c 'stty cols $columns rows 24; $(printf '%q ' "$@")'" "$W/typescript" >/dev/null </dev/null
    local status=$?
    # Its first and last lines are script's own.
    sed -e '1{/^Script started/d}' -e '${/^Script done/d}' "$W/typescript" | sed -e '$!b' -e '/^\r*$/d' >"$W/terminal"
    return "$status"
}

test_fleet_two_publish_at_once() {
    # Both nodes pull from the registry and publish the same layers at the same time; either's are good.
    local store ours theirs
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    ours=$(public_key)
    theirs=$(on b public_key)
    on b pull large &
    pull large
    wait $!
    on b wait_published
    wait_published
    SPEEDY_TRUST_KEYS=$theirs fresh_speedy --store "$store"
    expect_listing ctr large
    expect_equal 1 "$(layers_where '.origin == "fetched"')" "layers that the first node takes from the store"
    SPEEDY_TRUST_KEYS=$ours fresh_b --store "$store"
    expect_from_store ctr large 1
}

test_fleet_queue_survives() {
    # The daemon is killed with layers in its queue, and the store is not there for a while: all of it is published in the end.
    local store directory
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    directory=${store#file://}
    mv "$directory" "$directory.away"
    : >"$directory"
    pull large
    pull more
    (($(status_of .publish.pending) > 0)) || fail "nothing is in the queue, although the store is a plain file"
    SIGNAL=KILL restart_speedy --store "$store"
    (($(status_of .publish.pending) > 0)) || fail "the queue did not survive"
    rm "$directory"
    mv "$directory.away" "$directory"
    wait_published 120
    expect_from_store ctr more 9
}

# --- names of images --------------------------------------------------------------------------------------------------

test_fleet_names_images() {
    # An image has its name on the store as soon as all of its layers are there: after a pull, for another tag of what is
    # there already, and after an outage with a kill in it. What another node has named is not named again.
    local store names
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    wait_for 10 "the name of eight" is_named "$store" eight || fail "the image has no name"
    expect_contains "$(explain "$(image eight)" | jq -r '.[-1].names[]')" "$(image eight) (linux/amd64): named by $(public_key)" "what explain says"
    ctr images tag "$(image eight)" "$(image again)" >/dev/null
    wait_for 10 "the name of another tag" is_named "$store" again || fail "another tag has no name"

    mv "${store#file://}" "${store#file://}.away"
    : >"${store#file://}"
    ctr images tag "$(image eight)" "$(image outage)" >/dev/null
    wait_for 10 "the attempt" names_wait || fail "a name that cannot be written is not told of"
    expect_equal "$(image outage)" "$(status_of '.publish.problems[].image')" "the image of which status tells"
    SIGNAL=KILL restart_speedy --store "$store"
    rm "${store#file://}"
    mv "${store#file://}.away" "${store#file://}"
    wait_published
    wait_for 60 "the name after the outage" is_named "$store" outage || fail "the name is not written after the outage"

    names=$(names_on "$store" | wc -l)
    expect_equal 3 "$names" "names on the store"
    expect_from_store ctr eight 8
    on b wait_published
    expect_equal "$names" "$(names_on "$store" | wc -l)" "names on the store after another node's pull"
    expect_equal 1 "$(metric speedy_published_images_total)" "names written since the restart, as the metrics have it"
    expect_equal "8 0" "$(on b metric 'speedy_remote_lookups_total{outcome="hit"}') $(on b metric 'speedy_remote_lookups_total{outcome="late"}')" \
        "layers that node b found, as its metrics have it"
}
# names_on STORE: the objects that name images. is_named STORE NAME: whether one names that image.
names_on() { find "${1#file://}/images" -type f; }
is_named() { grep -rqaF "$(image "$2")" "${1#file://}/images" 2>/dev/null; }
names_wait() { [[ $(status_of '[.publish.problems[] | select(.image)] | length') == 1 && $(status_of .publish.pending) -ge 1 ]]; }

test_fleet_names_only_what_it_can() {
    # An image that another snapshotter unpacked, and one whose documents are gone, get no name, and nobody waits for them.
    local store manifest
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    ON=overlayfs pull tiny
    manifest=$(ctr images ls "name==$(image tiny)" | awk 'NR == 2 { print $3 }')
    ctr content rm "$manifest" >/dev/null
    ctr images tag "$(image tiny)" "$(image gone)" >/dev/null
    sleep 2
    wait_published 10
    expect_equal 1 "$(names_on "$store" | wc -l)" "names on the store"
    is_named "$store" eight || fail "the image that can be named is not"
}

# --- faults while publishing ------------------------------------------------------------------------------------------

test_fleet_killed_in_each_phase_of_publishing() {
    # Something stands in the way of a phase, so that the daemon is killed before some chunk, the index, the ref, the name: of
    # what comes later nothing is visible then, and the next daemon ends it.
    local store directory phase later obstacles
    need_speedy
    # Some of the image's two hundred chunks have an id that begins with a 7.
    for phase in chunks/7 indexes refs images; do
        store=$(file_store)
        directory=${store#file://}
        fresh_fleet "$store"
        mkdir -p "$directory/$(dirname "$phase")"
        obstacles=("$directory/$phase")
        [[ $phase != chunks/7 ]] || obstacles=("$directory/$phase"{0..9} "$directory/$phase"{a..f})
        touch "${obstacles[@]}"
        pull large
        wait_for 60 "a publish that fails at $phase" publishing_fails || fail "nothing in the way at $phase"
        for later in indexes refs images; do
            case $phase:$later in
                refs:indexes | images:indexes | images:refs) expect_equal 1 "$(objects "$directory" "$later")" "$later before $phase" ;;
                *) expect_equal 0 "$(objects "$directory" "$later")" "$later before $phase" ;;
            esac
        done
        daemon_stop speedy KILL
        rm "${obstacles[@]}"
        restart_speedy --store "$store"
        wait_published
        wait_for 10 "the name" is_named "$store" large || fail "killed before $phase: the image has no name"
        store_is_consistent || fail "killed before $phase: the node's records are not consistent"
        trusting fresh_b --store "$store"
        expect_from_store ctr large 1
    done
}
publishing_fails() { (($(status_of .publish.failures) > 0)); }
# objects DIRECTORY KIND: how many there are.
objects() { { find "$1/$2" -mindepth 1 -type f 2>/dev/null || true; } | wc -l; }

test_fleet_killed_at_random_while_publishing() {
    # 128 layers and some large ones; a SIGKILL at random moments, until all of it is published. Whatever a ref names is whole.
    local store name kills=0
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    mv "${store#file://}" "${store#file://}.away"
    : >"${store#file://}"
    pull deep
    pull large
    rm "${store#file://}"
    mv "${store#file://}.away" "${store#file://}"
    while ((kills < 30)) && ! published; do
        daemon_stop speedy KILL
        start_speedy --metrics "$(metrics_address)" --store "$store"
        kills=$((kills + 1))
        sleep "0.$((RANDOM % 4))"
    done
    restart_speedy --store "$store"
    printf 'killed %d times while layers were in the queue\n' "$kills"
    ((kills > 2)) || fail "everything was published after $kills kills"
    wait_published 120
    for name in deep large; do
        wait_for 20 "the name" is_named "$store" "$name" || fail "$name has no name"
    done
    store_is_consistent || fail "the node's records are not consistent"
    link_post "blobs?layers=refuse" reset
    on b expect_listing ctr deep
    on b expect_listing ctr large
    expect_no_layers_from_registry "what was published under kills"
}

test_fleet_store_is_full() {
    # The store's file system is full in the middle of a publish: the layer stays in the queue, pulls go on on both nodes, nothing
    # half is visible; once there is room, all of it is published.
    local store directory
    need_speedy
    store=$(file_store)
    directory=${store#file://}
    truncate -s 400M "$W/store.ext4"
    mkfs.ext4 -q "$W/store.ext4"
    mount -o loop "$W/store.ext4" "$directory"
    fallocate -l "$(($(stat -f -c '%a * %S' "$directory") - (30 << 20)))" "$directory/ballast"
    fresh_fleet "$store"
    pull large
    wait_for 60 "a full store" problems_say full || fail "nobody says that the store is full"
    (($(status_of .publish.pending) > 0)) || fail "the layer is not in the queue any more"
    expect_equal "0 0" "$(objects "$directory" refs) $(objects "$directory" images)" "refs and names on a full store"
    expect_listing ctr eight
    on b expect_listing ctr large
    expect_equal 0 "$(on b layers_where '.origin == "fetched"')" "layers from a full store"
    rm "$directory/ballast"
    wait_published 120
    wait_for 10 "the name" is_named "$store" large || fail "the image has no name"
    expect_equal 0 "$(find "$directory" -name '*#*' | wc -l)" "half objects on the store"
    trusting fresh_b --store "$store"
    expect_from_store ctr large 1
    daemon_stop speedy
    on b daemon_stop speedy-b
    umount "$directory"
    rm "$W/store.ext4"
    restart_speedy
    restart_b
}
problems_say() { [[ $(status_of '.publish.problems[].message') == *"$1"* ]]; }

# --- trust ----------------------------------------------------------------------------------------------------------

test_fleet_unknown_key() {
    # Node b does not know the publisher: an ordinary pull, and the line to add; with that line, or --trust any, it is a hit.
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    fresh_b --store "$store"
    on b expect_listing ctr eight
    expect_equal 0 "$(on b layers_where '.origin == "fetched"')" "layers that were signed by an unknown key"
    expect_contains "$(on b explain "$(image eight)" | tr -d '\\')" "$(public_key)" "explain names the key"
    expect_contains "$(cat "$W/speedy-b.log")" "$(public_key)" "the log names the key"
    fresh_b --store "$store" --trust any
    expect_from_store ctr eight 8
    expect_equal any "$(on b status_of .store.trust)" "status shows whom the node trusts"
    trusting fresh_b --store "$store"
    expect_from_store ctr eight 8
}

# --- a store that is wrong --------------------------------------------------------------------------------------------

# An image on the store, and what the ordinary pull of it takes on node b, in milliseconds, without a store.
measure_ordinary_pull() {
    fresh_b
    ORDINARY=$(milliseconds on b pull "$1")
    fresh_b
}

# expect_ordinary_pull NAME WHAT: node b has nothing of it; it pulls from the registry, correctly, delayed by one time-out (five
# seconds) at most.
expect_ordinary_pull() {
    local took
    took=$(milliseconds on b pull "$1")
    printf '%s: %d ms, %d without a store\n' "$2" "$took" "$ORDINARY"
    ((took < ORDINARY + 5000 + 2000)) || fail "$2: the pull took $took ms, $ORDINARY without a store"
    on b expect_listing ctr "$1"
    expect_equal 0 "$(on b layers_where '.origin == "fetched"')" "$2: layers from the store"
}

test_fleet_wrong_format() {
    # A store of a later format: refused, with the reason, and the pull is ordinary.
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    measure_ordinary_pull eight
    jq '.format = 99' "${store#file://}/speedy.json" >"$W/speedy.json"
    mv "$W/speedy.json" "${store#file://}/speedy.json"
    trusting restart_b --store "$store"
    expect_ordinary_pull eight "a store of format 99"
    expect_contains "$(on b status_of '.store.state, .publish.problems[].message'; cat "$W/speedy-b.log")" "99" "what is said of the format"
}

test_fleet_directory_is_gone() {
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    measure_ordinary_pull eight
    trusting restart_b --store "$store"
    mv "${store#file://}" "${store#file://}.away"
    expect_ordinary_pull eight "a store whose directory is gone"
}

# damage NODE-STORE PATTERN HOW: something about the objects that match, each: flip, truncate, remove; copies are kept.
damage() {
    local directory=${1#file://} file
    find "$directory" -path "$2" -type f >"$W/damaged"
    [[ -s $W/damaged ]] || fail "no object matches $2"
    while read -r file; do
        cp -p "$file" "$file.good"
        chmod u+w "$file"
        case $3 in
            flip) python3 -c 'import sys
with open(sys.argv[1], "r+b") as f:
    f.seek(0, 2); at = f.tell() // 2; f.seek(at); byte = f.read(1); f.seek(at); f.write(bytes([byte[0] ^ 1]))' "$file" ;;
            truncate) truncate -s "$(($(stat -c %s "$file") / 2))" "$file" ;;
            remove) rm "$file" ;;
        esac
    done <"$W/damaged"
}
repair() {
    local file
    while read -r file; do mv -f "$file.good" "$file"; done <"$W/damaged"
}

test_fleet_damaged_index_or_ref() {
    local store kind how
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all eight
    measure_ordinary_pull eight
    for kind in indexes refs; do
        for how in flip truncate remove; do
            trusting fresh_b --store "$store"
            damage "$store" "*/$kind/*" "$how"
            expect_ordinary_pull eight "every object below $kind: $how"
            repair
        done
    done
    trusting fresh_b --store "$store"
    expect_from_store ctr eight 8
}

# data_chunks STORE: the largest chunks, which are file content and no metadata.
data_chunk() { find "${1#file://}" -path '*/chunks/*' -type f -printf '%s %p\n' | sort -rn | sed -n '1s/^[0-9]* //p'; }

test_fleet_chunk_is_missing() {
    # Known before anything is promised: an ordinary pull.
    local store chunk
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large
    chunk=$(data_chunk "$store")
    measure_ordinary_pull large
    trusting restart_b --store "$store"
    damage "$store" "$chunk" remove
    expect_ordinary_pull large "a store without one chunk"
    expect_contains "$(on b explain "$(image large)"; cat "$W/speedy-b.log")" "$(basename "$chunk")" "explain or the log names the chunk"
}

test_fleet_chunk_is_damaged() {
    # Seen only when it is fetched, after the layer was promised: where layers are fetched whole no container starts on it, and the
    # error says what is wrong.
    # When the chunk is good again, everything works.
    local store chunk how
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large
    chunk=$(data_chunk "$store")
    for how in flip truncate; do
        SPEEDY_FETCH_LAZY=off trusting fresh_b --store "$store"
        damage "$store" "$chunk" "$how"
        link_post "blobs?layers=refuse"
        on b pull large
        ! on b ctr_run --rm "$(image large)" "on-$how" /bin/true >"$W/error" 2>&1 || fail "a container starts on a chunk that is damaged ($how)"
        expect_contains "$(cat "$W/error")" "$(basename "$chunk")" "the error names the chunk ($how)"
        expect_contains "$(cat "$W/error")" "sha256:" "the error names the layer ($how)"
        grep -qi 'unavailable' "$W/error" || { cat "$W/error" >&2; fail "the error is not: unavailable"; }
        repair
        on b again_by ctr large | LC_ALL=C sort >"$W/got.txt"
        same_files "$W/expected/large.txt" "$W/got.txt" "after the repair the container sees something else than the image has"
        link_post "blobs?layers=allow"
    done
}

test_fleet_killed_while_fetching() {
    # Node b dies by SIGKILL at several moments of a hit; what it has is good, and it goes on.
    local store round puller
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large more
    trusting fresh_b --store "$store"
    for round in 0 1 2 3 4 5; do
        on b pull large >/dev/null 2>&1 &
        puller=$!
        sleep "0.$((round * 15 / 10))"
        SIGNAL=KILL trusting restart_b --store "$store"
        wait "$puller" || true
    done
    link_post "blobs?layers=refuse" reset
    on b expect_listing ctr large
    on b expect_listing nerdctl more
    wait_for 30 "the layers to be durable" on b all_durable
    on b store_is_consistent || fail "node b's store is not consistent"
}

test_fleet_full_disk_while_fetching() {
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all large eight
    on b daemon_stop speedy-b
    truncate -s 80M "$W/small.ext4"
    mkfs.ext4 -q "$W/small.ext4"
    mount -o loop "$W/small.ext4" "$W/b/speedy"
    SPEEDY_FETCH_LAZY=off trusting restart_b --store "$store"
    ! on b run_by ctr large >"$W/error" 2>&1 || fail "100 MB fit on 80"
    on b remove_everything
    expect_from_store ctr eight 8
    # Read lazily, what cannot be kept is read from memory.
    on b remove_everything
    trusting restart_b --store "$store"
    on b expect_listing ctr large
    on b remove_everything
    on b daemon_stop speedy-b
    umount "$W/b/speedy"
    rm "$W/small.ext4"
    trusting restart_b --store "$store"
}

test_fleet_removed_leaves_nothing() {
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all more large
    SPEEDY_LAYERS_BUDGET=0 trusting fresh_b --store "$store"
    expect_from_store ctr more 9
    on b pull large
    # Also one whose data nobody waited for.
    on b remove_everything
    on b expect_nothing_left
    wait_for 20 "an empty cache" on b no_layers || fail "layers are left on node b"
    expect_equal 0 "$(on b loops)" "loop devices of layers"
}

# --- a cluster -----------------------------------------------------------------------------------------------------

# cluster_fleet NAME...: both nodes on a new prefix of the cluster, through the link, and the images published.
cluster_fleet() {
    cluster_store
    through_link fresh_fleet "$SPEEDY_STORE"
    publish_all "$@"
}

test_cluster_by_every_client() {
    local client
    cluster_fleet pause more
    for client in ctr nerdctl crictl; do
        through_link trusting fresh_b --store "$SPEEDY_STORE"
        expect_from_store "$client" more "$([[ $client == crictl ]] && echo 10 || echo 9)"
    done
}

# cluster_faults FAULT...: with each, the ordinary pull works, one time-out later at most; without, the layers come from the store.
cluster_faults() {
    local fault
    cluster_fleet eight
    measure_ordinary_pull eight
    for fault in "$@"; do
        store_fault none
        through_link trusting fresh_b --store "$SPEEDY_STORE"
        case $fault in
            status=*) store_fault status "$fault" ;;
            slow=*) store_fault slow "wait=${fault#slow=}" ;;
            *=*) store_fault "${fault%=*}" "after=${fault#*=}" ;;
            *) store_fault "$fault" ;;
        esac
        expect_ordinary_pull eight "a store with the fault $fault"
    done
    store_fault none
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    expect_from_store ctr eight 8
}
test_cluster_is_down() { cluster_faults refuse blackhole reset; }
test_cluster_is_slow() { cluster_faults slow=5s slow=30s stall=200; }
test_cluster_refuses_and_fails() { cluster_faults status=500 status=503 status=403; }
test_cluster_cuts_answers_short() { cluster_faults truncate=200 reset=200; }

test_cluster_answers_are_damaged_on_the_way() {
    # One bit in each longer answer is wrong, for a while: nothing wrong is used, and when it is over the layer is there.
    cluster_fleet large
    measure_ordinary_pull large
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    store_fault flip after=20000
    on b pull large
    on b again_by ctr large 2>"$W/error" | LC_ALL=C sort >"$W/got.txt" || true
    [[ ! -s $W/got.txt ]] || same_files "$W/expected/large.txt" "$W/got.txt" "the container saw damaged bytes"
    store_fault none
    on b again_by ctr large | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/large.txt" "$W/got.txt" "after the fault the container sees something else than the image has"
}

test_cluster_wrong_credentials() {
    cluster_fleet eight
    measure_ordinary_pull eight
    AWS_SECRET_ACCESS_KEY=wrong through_link trusting restart_b --store "$SPEEDY_STORE"
    expect_ordinary_pull eight "a store that refuses the credentials"
    expect_contains "$(on b status_of .store.state; cat "$W/speedy-b.log")" "403" "what is said of the credentials"
}

test_cluster_removal_during_a_slow_hit() {
    # containerd's collector waits for every Prepare: a store that answers slowly must not hold up anybody else.
    local took slowest=0 puller round
    cluster_fleet eight large
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    on b pull tiny
    store_fault slow wait=2s
    on b pull eight >"$W/slow.log" 2>&1 &
    puller=$!
    sleep 0.5
    on b ctr images rm --sync "$(image tiny)" >/dev/null &
    for round in 1 2 3 4 5; do
        took=$(milliseconds on b ctr snapshots --snapshotter speedy prepare "beside-$round")
        ((took <= slowest)) || slowest=$took
        on b ctr snapshots --snapshotter speedy rm "beside-$round"
        sleep 0.3
    done
    wait "$puller"
    printf 'the slowest Prepare beside a slow hit took %d ms\n' "$slowest"
    ((slowest < 1000)) || fail "a Prepare beside a slow hit took $slowest ms"
    store_fault none
    on b expect_listing ctr eight
}

test_cluster_node_dies_while_publishing_and_fetching() {
    cluster_store
    through_link fresh_fleet "$SPEEDY_STORE"
    pull large
    kill_cluster_node 1
    wait_published 120
    restart_cluster_node 1
    link_post reset "blobs?layers=refuse" "link?mbit=200"
    on b pull large
    kill_cluster_node 2
    on b again_by ctr large | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/large.txt" "$W/got.txt" "the container sees something else than the image has"
    expect_no_layers_from_registry large
    restart_cluster_node 2
}

test_cluster_view_waits_for_data() {
    # nerdctl looks into an image through a view, and asks no Mounts for it, when the data may still be on its way.
    local took
    cluster_fleet large
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    link_post reset "blobs?layers=refuse" "link?mbit=200"
    took=$(milliseconds on b again_by nerdctl large)
    link_post "link?mbit=0"
    printf 'pulled, fetched and run in %d ms\n' "$took"
    ((took > 2000)) || fail "96 MiB over 200 Mbit/s took $took ms: this test waited for nothing"
    on b expect_listing nerdctl large
    expect_no_layers_from_registry large
}

test_cluster_stops_and_starts() {
    # While it is down pulls are ordinary and what is new waits in the queue; afterwards everything is as if it had not been.
    cluster_fleet eight
    measure_ordinary_pull eight
    through_link trusting restart_b --store "$SPEEDY_STORE"
    cluster stop-all
    expect_ordinary_pull eight "a cluster that is down"
    pull more
    (($(status_of .publish.pending) > 0)) || fail "nothing is in the queue, although the cluster is down"
    cluster start-all >/dev/null
    wait_published 120
    through_link trusting fresh_b --store "$SPEEDY_STORE"
    expect_from_store ctr more 9
}

test_cluster_read_only_credentials() {
    # A node that only reads needs no right to write.
    cluster_fleet eight
    eval "$(cluster env --reader | grep KEY)"
    SPEEDY_PUBLISH_POLICY=off through_link trusting fresh_b --store "$SPEEDY_STORE"
    expect_from_store ctr eight 8
}

# --- collection -------------------------------------------------------------------------------------------------------

# grown_old STORE: everything in a directory was written a hundred days ago.
grown_old() { find "${1#file://}" -type f -exec touch -d "100 days ago" {} +; }
gc() { "$SPEEDY" gc --store "$1" --json "${@:2}"; }

test_fleet_removed_images_are_collected() {
    # Two images share layers; one is removed. What the other needs stays, and a node that has nothing starts it from the store.
    local store plan before after
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    publish_all pause more
    wait_for 30 "both names" is_named "$store" pause || fail "the image has no name"
    expect_contains "$("$SPEEDY" images --store "$store")" "$(image more)" "the images of the store"
    expect_equal true "$("$SPEEDY" images --store "$store" --json | jq '[.images[].complete] | all')" "both are complete"
    plan=$(gc "$store")
    expect_equal 0 "$(jq .dead.objects <<< "$plan")" "nothing is dead"
    grown_old "$store"
    before=$(objects "${store#file://}" chunks)
    "$SPEEDY" images rm "$(image pause)" --store "$store" || fail "a dry run failed"
    is_named "$store" pause || fail "a dry run removed a name"
    "$SPEEDY" images rm "$(image pause)" --store "$store" --execute
    ! is_named "$store" pause || fail "the name is still there"
    # First the refs, then what they needed.
    gc "$store" --execute --alone > /dev/null
    grown_old "$store"
    gc "$store" --execute --alone > /dev/null
    after=$(objects "${store#file://}" chunks)
    ((after < before)) || fail "of $before chunks $after are left"
    expect_equal true "$("$SPEEDY" images --store "$store" --json | jq '[.images[].complete] | all')" "what is left is complete"
    expect_equal 0 "$(gc "$store" | jq '.dead.objects + .later.objects')" "nothing is left to collect"
    expect_from_store ctr more 9
}
