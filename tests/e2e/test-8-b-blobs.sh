# What an image that was started from the store lacks: the blobs of its layers. Each row of the README's table is a test, and after
# `speedy fetch` all of it works.
# shellcheck shell=bash

# remote_hit NAME...: node b has them from the store, while the registry gives no layer.
remote_hit() {
    local name
    need_speedy
    fresh_fleet "$(file_store)"
    publish_all "$@"
    link_post "blobs?layers=refuse"
    for name in "$@"; do on b pull "$name"; done
    (($(on b layers_where '.origin == "fetched"') >= 8)) || fail "the layers are not from the store"
}

# fetch NAME [FLAG...]: on this node, in the namespace $NAMESPACE or that of ctr.
fetch() {
    CONTAINERD_NAMESPACE=${NAMESPACE:-$(node_daemon "$WORLD")} "$SPEEDY" fetch --containerd "$CONTAINERD_ADDRESS" --hosts-dir "$N/certs.d" \
        "$(image "$1")" "${@:2}"
}
# with_blobs NAME: the registry gives layers again, and they are fetched.
with_blobs() {
    link_post "blobs?layers=allow"
    on b fetch "$1"
}
# fails_without COMMAND...: as long as the registry gives no layer.
fails_without() { ! ("$@") >"$W/error" 2>&1 || fail "it works without the blobs: $*"; }

checked() { ctr images check "name==$(image "$1")" | awk 'NR == 2'; }

test_blobs_check() {
    # The documents are there, and the layers are not; no container minds.
    remote_hit eight
    expect_contains "$(on b checked eight)" "incomplete (1/9)" "ctr images check of a remote hit"
    on b again_by ctr eight >/dev/null
    with_blobs eight
    expect_contains "$(on b checked eight)" " complete (9/9)" "ctr images check after speedy fetch"
}

test_blobs_push() {
    # To the registry from which it came it can be pushed, because that has the layers, to another repository too; elsewhere not.
    # (The same registry by another name is another one for containerd.)
    local elsewhere=localhost:${REGISTRY##*:} name=copy-$RANDOM
    remote_hit eight
    on b ctr images push --hosts-dir "$W/b/certs.d" "$REGISTRY/$name:1" "$(image eight)" >/dev/null
    fails_without on b ctr images push "$elsewhere/$name-elsewhere:1" "$(image eight)"
    with_blobs eight
    on b ctr images push "$elsewhere/$name-elsewhere:1" "$(image eight)" >/dev/null
    for name in "$name" "$name-elsewhere"; do
        in_registry "$name" 1 || fail "$name was pushed, and is not there"
    done
}

test_blobs_export() {
    # --local: an export by the transfer service may still be written when ctr has ended.
    remote_hit eight
    fails_without on b ctr images export --local "$W/export.tar" "$(image eight)"
    with_blobs eight
    on b ctr images export --local "$W/export.tar" "$(image eight)"
    expect_equal 8 "$(tar -xOf "$W/export.tar" manifest.json | jq '.[0].Layers | length')" "layers of the archive"
    rm "$W/export.tar"
}

test_blobs_convert() {
    remote_hit eight
    fails_without on b ctr images convert --uncompress "$(image eight)" "$(image converted)"
    with_blobs eight
    on b ctr images convert --uncompress "$(image eight)" "$(image converted)" >/dev/null
}

test_blobs_tag() {
    # A tag needs no blobs, and the image of that name starts. nerdctl asks the registry for them, and goes on without.
    remote_hit eight
    on b ctr images tag "$(image eight)" "$(image tagged)" >/dev/null
    on b ctr_run --rm "$(image tagged)" tagged /bin/true
    on b nerdctl pull --quiet "$(image eight)" >/dev/null
    on b nerdctl tag "$(image eight)" "$(image tagged)"
    on b nerdctl_run --rm "$(image tagged)" /bin/true
}

test_blobs_nerdctl() {
    # nerdctl asks the registry for what it lacks before it saves or commits: with the registry it works by itself. A commit goes on
    # without, and its image runs here.
    remote_hit eight
    on b nerdctl pull --quiet "$(image eight)" >/dev/null
    on b nerdctl_run --name author --quiet "$(image eight)" sh -c 'echo new > /data/new'
    fails_without on b nerdctl save -o "$W/save.tar" "$(image eight)"
    on b nerdctl commit author committed:1 >/dev/null
    on b nerdctl rm author >/dev/null
    expect_equal new "$(on b nerdctl_run --rm committed:1 cat /data/new | tr -d '\r')" "a file of the committed image"
    link_post "blobs?layers=allow"
    on b nerdctl save -o "$W/save.tar" "$(image eight)"
    rm "$W/save.tar"
}

test_blobs_nerdctl_after_fetch() {
    # Fetched before, it works while the registry gives no layer.
    remote_hit eight
    on b nerdctl pull --quiet "$(image eight)" >/dev/null
    link_post "blobs?layers=allow"
    NAMESPACE=$(on b node_daemon "$WORLD-nerdctl") on b fetch eight
    link_post "blobs?layers=refuse"
    on b nerdctl save -o "$W/save.tar" "$(image eight)"
    rm "$W/save.tar"
}

test_blobs_build() {
    # BuildKit asks the registry itself, whatever containerd's images have.
    local BUILDKIT
    BUILDKIT=$(tool_path "buildkit-$BUILDKIT_VERSION")
    [[ -d $BUILDKIT ]] || skip "BuildKit is not here; contrib/test --long builds it"
    remote_hit eight
    on b start_buildkit || { tail -n 20 "$W/buildkitd.log" >&2; fail "BuildKit does not start"; }
    mkdir -p "$W/build"
    printf 'FROM %s\nRUN echo built > /data/built\n' "$(image eight)" >"$W/build/Dockerfile"
    link_post "blobs?layers=allow"
    PATH="$BUILDKIT:$PATH" on b nerdctl build --buildkit-host "unix://$W/buildkitd.sock" --progress plain -t built:1 "$W/build"
    expect_equal built "$(on b nerdctl_run --rm built:1 cat /data/built | tr -d '\r')" "the built image"
    daemon_stop buildkitd
}

test_blobs_second_snapshotter() {
    remote_hit eight
    ON=overlayfs fails_without on b ctr_run --rm "$(image eight)" elsewhere /bin/true
    with_blobs eight
    ON=overlayfs on b ctr_run --rm "$(image eight)" elsewhere /bin/listing | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/eight.txt" "$W/got.txt" "eight on overlayfs"
}

test_blobs_crictl_inspecti() {
    # What an image is made of is in its documents, which are there.
    remote_hit pause eight
    on b crictl pull "$(image eight)" >/dev/null
    expect_equal 8 "$(on b crictl inspecti "$(image eight)" | jq '.info.imageSpec.rootfs.diff_ids | length')" "layers that crictl shows"
    link_post "blobs?layers=allow"
    NAMESPACE=k8s.io on b fetch eight
    # The image is still CRI's.
    expect_equal managed "$(NAMESPACE=k8s.io on b ctr images ls "name==$(image eight)" | grep -o 'io.cri-containerd.image=[a-z]*' | cut -d= -f2)" "CRI's label"
    expect_contains "$(on b crictl images -o json)" "$(image eight)" "the list of images"
}

test_blobs_encrypted_layers() {
    # Their keys are containerd's business: they are never on the store, nor has the image a name, so no node gets them without a key.
    # Our differ cannot decrypt. The transfer service asks no other one; clients of the diff service go on to containerd's own.
    local store
    need_speedy
    store=$(file_store)
    fresh_fleet "$store"
    # Under the name that containerd's own configuration has for this media type: of two that accept one, it takes either.
    cat >"$N/conf.d/decrypt.toml" <<END
version = 3
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
  accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
  returns = "application/vnd.oci.image.layer.v1.tar+gzip"
  path = "$(command -v python3)"
  args = ["-c", "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read().translate(bytes(n ^ 90 for n in range(256))))"]
END
    daemon_stop containerd
    start_containerd "$VERSION"
    ! (pull encrypted) >"$W/error" 2>&1 || fail "the transfer service pulls it: the README says that it does not"
    expect_listing local encrypted
    wait_for 20 "the attempts to publish" tried_to_publish || fail "$(status_of .publish)"
    expect_equal "0 0" "$(objects "${store#file://}" refs) $(objects "${store#file://}" images)" "encrypted layers and their images on the store"
    ! (on b pull encrypted --local) >"$W/error" 2>&1 || fail "a node without the key has the image"
    fresh_speedy
    rm "$N/conf.d/decrypt.toml"
    daemon_stop containerd
    start_containerd "$VERSION"
}
tried_to_publish() { (($(status_of '.publish.failures + .publish.dropped') > 0)); }

# --- speedy fetch -----------------------------------------------------------------------------------------------------

test_fetch_says_what_it_does() {
    remote_hit eight
    ! (on b fetch eight) >"$W/error" 2>&1 || fail "fetched from a registry that gives no layer"
    expect_contains "$(cat "$W/error")" "cannot fetch $REGISTRY/eight@sha256:" "the error"
    ! (on b fetch eigth) >"$W/error" 2>&1 || fail "an image that is not there"
    expect_contains "$(cat "$W/error")" "it has $(image eight)" "the error names what may have been meant"
    link_post "blobs?layers=allow"
    on b fetch eight --json >"$W/fetched"
    expect_equal "8 8" "$(jq -r '[(.layers | length), ([.layers[] | select(.fetched)] | length)] | join(" ")' "$W/fetched")" "layers in the JSON"
    link_post "blobs?layers=refuse"
    expect_contains "$(on b fetch eight)" "already" "what is said the second time"
    # Nothing of it was applied or unpacked again.
    expect_equal 0 "$(($(on b applies image) + $(on b applies files)))" "layers that were applied"
}

test_fetch_as_somebody() {
    # A registry that wants to know who asks.
    local digest config
    remote_hit eight
    digest=$(on b ctr images ls "name==$(image eight)" | awk 'NR == 2 { print $3 }')
    registry_away
    config=$(cat "$W/registry.yml")
    REGISTRY=127.0.0.1:$(free_port)
    sed "s/addr: .*/addr: \"$REGISTRY\" }/" <<<"$config" >"$W/registry.yml"
    run_registry
    guard_registry "$REGISTRY" "$(sed -n 's/.*addr: "\([^"]*\)".*/\1/p' <<<"$config")" me:s:ecret
    REGISTRY=$(sed -n 's/.*addr: "\([^"]*\)".*/\1/p' <<<"$config")
    printf '%s\n' "$config" >"$W/registry.yml"
    on b registry_host "$REGISTRY"
    fails_without on b fetch eight
    fails_without on b fetch eight --user me:wrong
    echo s:ecret | on b fetch eight --user me
    registry_away
    registry_back
    expect_contains "$(on b checked eight)" " complete (9/9)" "after speedy fetch"
    expect_equal "$digest" "$(on b ctr images ls "name==$(image eight)" | awk 'NR == 2 { print $3 }')" "what the name points at"
}
# guard_registry TARGET ADDRESS USER:PASSWORD: what is asked of ADDRESS goes to TARGET, if it comes with this name and password.
guard_registry() {
    daemon stand-in python3 -c '
import base64, http.client, http.server, sys
target, address, user = sys.argv[1], sys.argv[2].split(":"), sys.argv[3]
wanted = "Basic " + base64.b64encode(user.encode()).decode()
class Guard(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Authorization") != wanted:
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic realm=\"test\"")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        there = http.client.HTTPConnection(target)
        there.request(self.command, self.path, headers={"Accept": self.headers.get("Accept", "*/*")})
        answer = there.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name in ("Content-Type", "Content-Length", "Docker-Content-Digest"):
            if answer.getheader(name): self.send_header(name, answer.getheader(name))
        self.end_headers()
        self.wfile.write(body)
    do_HEAD = do_GET
server = http.server.ThreadingHTTPServer((address[0], int(address[1])), Guard)
print("ready", flush=True)
server.serve_forever()
' "$@"
    wait_for 10 "the guard" grep -q ready "$W/stand-in.log"
}
