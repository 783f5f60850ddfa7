# Without the registry: node b, which never saw an image, starts it from the store while the registry is away, and only then.
# shellcheck shell=bash

# --- a registry that is away ------------------------------------------------------------------------------------------

# registry_port: where this node's Speedy answers for registries.
registry_port() {
    [[ -e $N/registry-port ]] || echo "127.0.0.1:$(free_port)" >"$N/registry-port"
    cat "$N/registry-port"
}

# mirrored_b STORE: node b has nothing but the store, answers for registries, and its containerd knows that. Its log begins here: what
# an earlier test was given is not this one's.
mirrored_b() {
    : >"$W/speedy-b.log"
    trusting fresh_b --store "$1" --registry "$(on b registry_port)"
    on b ask_speedy_last
}
ask_speedy_last() { "$SPEEDY" config hosts "$REGISTRY" --registry "$(registry_port)" >"$N/certs.d/$REGISTRY/hosts.toml"; }

# mirrored_fleet STORE NAME...: the first node has published these, with their names.
mirrored_fleet() {
    local name store=$1
    shift
    fresh_fleet "$store"
    publish_all "$@"
    for name in "$@"; do wait_for 20 "the name of $name" has_name "$name" || fail "$name has no name"; done
    mirrored_b "$store"
}
has_name() { [[ $(explain "$(image "$1")" | jq -r '.[-1].names[]') == *"named by"* ]]; }

registry_away() { daemon_stop registry; }
registry_back() { stand_in_ends; run_registry; }

# stand_in HOW: something else on the registry's port. HOW is a status (with which everything is answered), or garbage, hangup,
# silence (connections are made, and nothing comes) or blackhole (what wants to connect is dropped).
stand_in() {
    stand_in_ends
    ! daemon_runs registry || registry_away
    daemon stand-in python3 -c '
import socket, sys, threading, time
address, how = sys.argv[1].split(":"), sys.argv[2]
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((address[0], int(address[1])))
server.listen(0 if how == "blackhole" else 64)
if how == "blackhole":
    held = []
    while len(held) < 8:
        # A full queue drops the rest.
        client = socket.socket(); client.setblocking(False); client.connect_ex((address[0], int(address[1]))); held.append(client)
    time.sleep(0.5)
print("ready", flush=True)
def answer(client):
    if how in ("silence", "blackhole"):
        time.sleep(600)
    request = b""
    while b"\r\n\r\n" not in request:
        part = client.recv(4096)
        if not part: return
        request += part
    body = b"" if request.startswith(b"HEAD") else b"{}"
    more = ["WWW-Authenticate: Basic realm=\"x\""] if how == "401" else []
    head = ["HTTP/1.1 %s Stand-In" % how, "Content-Type: application/json", "Content-Length: 2", "Connection: close"] + more
    if how == "garbage": client.sendall(b"\x00\x01\x02 this is no registry \xff\xfe\r\n\r\n")
    elif how != "hangup": client.sendall("\r\n".join(head + ["", ""]).encode() + body)
    client.close()
while True:
    if how == "blackhole": time.sleep(600)
    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
' "$REGISTRY" "$1"
    wait_for 10 "the stand-in" grep -q ready "$W/stand-in.log"
}

# by_digest: from here on images are asked for by digest. by_tag undoes it.
by_digest() { image() { printf '%s/%s@%s' "$REGISTRY" "$1" "$(digest_of "$1")"; }; }
by_tag() { image() { printf '%s/%s:1' "$REGISTRY" "$1"; }; }
# digest_of NAME: as the first node has it.
digest_of() { on '' ctr images ls "name==$REGISTRY/$1:1" | awk 'NR == 2 { print $3 }'; }

# expect_from_mirror CLIENT NAME: node b, on which nothing is, runs it.
expect_from_mirror() {
    on b expect_listing "$1" "$2"
    (($(on b layers_where '.origin == "fetched"') > 7)) || fail "$2 by $1: the layers are not from the store"
    expect_contains "$(cat "$W/speedy-b.log")" "given from the store" "$2 by $1: what the log says"
}

# start_without_registry STORE CLIENT: while nobody listens on its port, by tag and by digest.
start_without_registry() {
    mirrored_fleet "$1" pause more
    registry_away
    expect_from_mirror "$2" more
    mirrored_b "$1"
    by_digest
    expect_from_mirror "$2" more
    by_tag
    registry_back
}
test_mirror_by_ctr() { need_speedy; start_without_registry "$(file_store)" ctr; }
test_mirror_by_nerdctl() { need_speedy; start_without_registry "$(file_store)" nerdctl; }
test_mirror_by_crictl() { need_speedy; start_without_registry "$(file_store)" crictl; }

test_mirror_on_a_cluster() {
    local client
    cluster_store
    through_link mirrored_fleet "$SPEEDY_STORE" pause more
    registry_away
    for client in ctr nerdctl crictl; do
        through_link mirrored_b "$SPEEDY_STORE"
        expect_from_mirror "$client" more
    done
    by_digest
    through_link mirrored_b "$SPEEDY_STORE"
    expect_from_mirror ctr more
    by_tag
    registry_back
}

test_mirror_blackholed() {
    # What wants to connect is dropped: containerd waits for 2 s (dial_timeout) for each of its four requests, and nobody longer.
    local store client way took
    need_speedy
    store=$(file_store)
    mirrored_fleet "$store" pause more
    stand_in blackhole
    for client in ctr nerdctl crictl; do
        for way in by_tag by_digest; do
            mirrored_b "$store"
            # The pod's own image is there where a pod has been before.
            [[ $client != crictl ]] || on b crictl pull "$(image pause)" >/dev/null
            $way
            took=$(milliseconds on b expect_listing "$client" more)
            by_tag
            printf '%s, %s: started in %d ms\n' "$client" "$way" "$took"
            ((took < 15000)) || fail "$client, $way: $took ms until the container ran"
        done
    done
    registry_back
}

test_mirror_registry_fails() {
    # A registry that answers 5xx, or hangs up, is away.
    local store how
    need_speedy
    store=$(file_store)
    mirrored_fleet "$store" more
    for how in 500 503 hangup; do
        mirrored_b "$store"
        stand_in "$how"
        expect_from_mirror ctr more
    done
    registry_back
}

# --- a registry that is there -----------------------------------------------------------------------------------------

# error_of COMMAND...: what it says when it fails, without what is different each time.
error_of() {
    # In a shell of its own, which a check of the command ends.
    ! ("$@") >"$N/error" 2>&1 || fail "it works, although the registry says no: $*"
    tail -n 1 "$N/error"
}

test_mirror_registry_says_no() {
    # Whatever the registry answers is its word, by tag and by digest: the pull fails as it does without us, and nothing is given.
    local store how client
    need_speedy
    store=$(file_store)
    mirrored_fleet "$store" more
    for how in 401 403 404 429 garbage; do
        stand_in "$how"
        for client in ctr nerdctl crictl; do
            error_of on b pull_by "$client" more
            by_digest
            error_of on b pull_by "$client" more
            by_tag
        done
        # The same without us, to see that it is the registry's doing.
        on b registry_host "$REGISTRY"
        error_of on b pull_by ctr more
        on b ask_speedy_last
    done
    ! grep -q "given from the store" "$W/speedy-b.log" || fail "something was given while the registry was there"
    expect_equal 0 "$(on b layers_where true)" "layers on node b"
    registry_back
    on b expect_listing ctr more
}

test_mirror_knows_no_more_than_the_store() {
    # Nobody has published it, or somebody whom node b does not trust: the pull fails as without us, and nothing is probed. Who does
    # not name a registry gets nothing.
    local store port
    need_speedy
    store=$(file_store)
    mirrored_fleet "$store" more
    registry_away
    port=$(on b registry_port)
    error_of on b pull_by ctr eight
    : >"$W/speedy-b.log"
    fresh_b --store "$store" --registry "$port" --log-level debug
    error_of on b pull_by ctr more
    ! grep -q "a registry was probed" "$W/speedy-b.log" || fail "a registry was probed for an image that nobody trusted has named"
    expect_equal 404 "$(curl -s -o /dev/null -w '%{http_code}' "http://$port/v2/more/manifests/1")" "without ns"
    expect_equal 405 "$(curl -s -o /dev/null -w '%{http_code}' -X POST "http://$port/v2/more/blobs/uploads/?ns=$REGISTRY")" "a push"
    registry_back
}

test_mirror_pushes_go_to_the_registry() {
    # With the hosts.toml that we print a push works as before, and goes to the registry only.
    need_speedy
    mirrored_fleet "$(file_store)" more
    ctr images tag "$(image more)" "$REGISTRY/pushed:1" >/dev/null
    ask_speedy_last
    ctr images push --hosts-dir "$N/certs.d" "$REGISTRY/pushed:1" >/dev/null 2>"$W/error" || fail "a push: $(cat "$W/error")"
    registry_host "$REGISTRY"
    in_registry pushed 1 || fail "what was pushed is not there"
}
