# What the tests of layer images and of several nodes share.
# shellcheck shell=bash

# --- one node -------------------------------------------------------------------------------------------------------

# use_differ speedy|walking: containerd restarts only if it has the other one.
use_differ() {
    local now=walking
    ! grep -q '^ *differ = "speedy-diff"' "$N/containerd.toml" || now=speedy
    if [[ $now != "$1" ]]; then
        daemon_stop "$(node_daemon containerd)"
        DIFFER=$1 start_containerd "$VERSION"
    fi
    [[ $1 == walking ]] || grep -q '^ *differ = "speedy-diff"' "$N/containerd.toml" ||
        fail "config/containerd.toml does not name Speedy's differ"
}

# fresh_speedy [FLAG...]: nothing is on the node, and the daemon has a new root. FORGET=key keeps not even the node's key.
fresh_speedy() {
    local namespace mount
    use_differ speedy
    cri_reset
    remove_everything
    for namespace in $(namespaces); do
        # A pull that failed leaves a lease for a day.
        NAMESPACE=$namespace ctr leases ls -q | while read -r lease; do NAMESPACE=$namespace ctr leases rm --sync "$lease" >/dev/null; done
        expect_equal "" "$(NAMESPACE=$namespace ctr snapshots --snapshotter speedy ls | tail -n +2)" "snapshots are left in $namespace"
    done
    daemon_stop "$(node_daemon speedy)"
    for mount in $(mounts_below "$SPEEDY_ROOT"); do umount "$mount"; done
    # A small disk that a test has left.
    ! mountpoint -q "$SPEEDY_ROOT" || umount "$SPEEDY_ROOT"
    rm -rf --one-file-system "$SPEEDY_ROOT"
    mkdir "$SPEEDY_ROOT"
    restart_speedy "$@"
}

# applies HOW: layers that the differ has applied since the daemon started: `image`, `known` or `files`.
applies() {
    curl -sSf "http://$(metrics_address)/metrics" |
        awk -v name="speedy_diff_applies_total{how=\"$1\"}" '$1 == name { n = $2 } END { print n + 0 }'
}

# metric NAME: its value, the name with its labels as the page has it; nothing if it is not there.
metric() { curl -sSf "http://$(metrics_address)/metrics" | awk -v name="${1//\"/\\\"}" '$1 == name { print $2 }'; }

status_of() { "$SPEEDY" status --json --address "$SPEEDY_ADDRESS" | jq -r "$1"; }
layers() { "$SPEEDY" layers --json --address "$SPEEDY_ADDRESS"; }

# layers_where CONDITION: how many layer images are so, in jq's words.
layers_where() { layers | jq "map(select($1)) | length"; }
# all_durable: a layer is mounted when its bytes are here, and recorded as complete when they are on the disk.
all_durable() { [[ $(layers_where '.state != "complete"') == 0 ]]; }
no_layers() { [[ $(layers_where true) == 0 && -z $(layer_files) ]]; }
layer_files() { find "$SPEEDY_ROOT/layer" -type f 2>/dev/null | sort; }
explain() { "$SPEEDY" explain --json --address "$SPEEDY_ADDRESS" --containerd "$CONTAINERD_ADDRESS" --namespace "$(node_daemon "$WORLD")" "$@"; }

# Files that were unpacked into directories, in committed snapshots as in containers.
unpacked_files() { find "$SPEEDY_ROOT/l" -xdev -mindepth 3 -path '*/fs/*' 2>/dev/null | sort; }
loops() { losetup -n -O BACK-FILE | grep -c "^$SPEEDY_ROOT/" || true; }

# --- one command on whatever client ---------------------------------------------------------------------------------

# run_by CLIENT NAME: pulls an image and runs its /bin/listing; prints what that prints, sorted. CLIENT is ctr (the transfer
# service), local (ctr's own pull, as a client of the diff service), nerdctl or crictl.
run_by() {
    pull_by "$1" "$2" >&2
    again_by "$1" "$2" | LC_ALL=C sort
}

pull_by() {
    case $1 in
        ctr) pull "$2" ;;
        local) pull "$2" --local ;;
        nerdctl) nerdctl pull --quiet "$(image "$2")" ;;
        crictl) crictl pull "$(image "$2")" ;;
    esac
}

again_by() {
    case $1 in
        ctr | local) ctr_run --rm "$(image "$2")" "by-$1-$RANDOM" /bin/listing ;;
        nerdctl) nerdctl_run --rm "$(image "$2")" /bin/listing ;;
        crictl) cri_listing "$2" ;;
    esac
}

cri_exited() { [[ $(crictl inspect "$1" | jq -r .status.state) == CONTAINER_EXITED ]]; }

# cri_listing NAME: a pod that lists the image.
cri_listing() {
    local pod container name="list-$RANDOM"
    pod=$(cri_pod "$name")
    jq -n --arg image "$(image "$1")" '{metadata: {name: "list"}, image: {image: $image}, log_path: "list.log",
        command: ["/bin/listing"], linux: {}}' >"$N/container-$name.json"
    container=$(crictl create "$pod" "$N/container-$name.json" "$N/pod-$name.json")
    crictl start "$container" >/dev/null
    wait_for 30 "the listing" cri_exited "$container"
    sed 's/^[^ ]* [a-z]* [FP] //' "$N/pod-$name/list.log"
    crictl rmp -f "$pod" >/dev/null
}

# expect_listing CLIENT NAME: the image, pulled and run by the client, is what its maker says.
expect_listing() {
    run_by "$1" "$2" >"$N/got.txt"
    same_files "$W/expected/$2.txt" "$N/got.txt" "$2 by $1: the container sees something else than the image has"
}

# in_registry REPOSITORY TAG: the registry gives a manifest only to whom takes its kind.
in_registry() { curl -sf -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' "http://$REGISTRY/v2/$1/manifests/$2"; }

# --- two nodes ------------------------------------------------------------------------------------------------------

# fleet: node b with the registry behind a link. Once for a whole run.
fleet() {
    need_speedy
    if ! daemon_runs link; then
        start_link -registry "127.0.0.1:0=$REGISTRY" ${AWS_ENDPOINT_URL:+-listen "127.0.0.1:0=${AWS_ENDPOINT_URL#http://}"}
    fi
    [[ -d $W/b ]] || start_node b "$VERSION" --metrics "$(on b node_metrics)"
    on b registry_host "$(link_address "$REGISTRY")"
    on b revive
    link_post "fault?kind=none" "link?mbit=0&delay=0" "blobs?layers=allow"
}

# node_metrics: as metrics_address, before the node has a directory.
node_metrics() { mkdir -p "$N" && metrics_address; }

# revive: what a failed test may have left dead.
revive() {
    daemon_runs "$(node_daemon speedy)" || restart_speedy
    daemon_runs "$(node_daemon containerd)" || start_containerd "$VERSION"
}

# public_key: this node's.
public_key() { "$SPEEDY" trust --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" --json | jq -r .key; }

published() { [[ $(status_of .publish.pending) == 0 ]]; }

# wait_published [SECONDS]: until everything is on the store, and nothing was given up.
wait_published() {
    wait_for "${1:-60}" "publishing" published || { status_of . >&2; fail "publishing does not end"; }
    expect_equal 0 "$(status_of .publish.dropped)" "layers that were not published"
}

# fresh_fleet STORE: the first node has STORE, node b the same and trusts the first; nothing is on either.
fresh_fleet() {
    fleet
    fresh_speedy --store "$1"
    trusting fresh_b --store "$1"
}
fresh_b() { on b fresh_speedy "$@"; }
restart_b() { on b restart_speedy "$@"; }

# trusting COMMAND...: what it starts trusts the first node's key.
trusting() {
    local key
    key=$(public_key)
    [[ -n $key ]] || fail "speedy trust prints no key"
    SPEEDY_TRUST_KEYS=$key "$@"
}

# file_store: the URL of a new directory store; sets nothing, prints it.
file_store() {
    local directory
    directory=$(mktemp -d "$W/store.XXXXXX")
    printf 'file://%s' "$directory"
}

# publish_all NAME...: the first node pulls them, and they are on the store.
publish_all() {
    local name
    for name in "$@"; do pull "$name"; done
    wait_published
}

# expect_no_layers_from_registry WHAT: node b took manifests and configurations from there, and nothing else.
expect_no_layers_from_registry() {
    expect_equal "0 0" "$(link_counters '.ports[].registry | select(.) | "\(.layer_gets) \(.layer_bytes)"')" \
        "$1: layers were asked of the registry; $(link_counters '.ports[].registry | select(.) | .blobs')"
    expect_equal true "$(link_counters '.ports[].registry | select(.) | (.manifests | length) > 0')" "$1: nothing at all was asked of the registry"
}

# seconds COMMAND...: how long it takes, in milliseconds.
milliseconds() {
    local start
    start=$(now_ms)
    "$@" >&2
    printf '%d' "$(($(now_ms) - start))"
}

# --- a cluster -----------------------------------------------------------------------------------------------------

# cluster COMMAND [OPTION...]: of contrib/ceph or contrib/garage.
cluster() { "$REPO/contrib/$CLUSTER" "$1" "$W/cluster" "${@:2}"; }
kill_cluster_node() { cluster "$([[ $CLUSTER == ceph ]] && echo kill-osd || echo kill-node)" "$1"; }
restart_cluster_node() { cluster "$([[ $CLUSTER == ceph ]] && echo restart-osd || echo restart-node)" "$1"; }

# cluster_store: a cluster, started at its first use, and the AWS_* variables; $SPEEDY_STORE gets a prefix of its own.
cluster_store() {
    need_speedy
    [[ $CLUSTER != none ]] || skip "no cluster; tests/e2e/run --cluster ceph starts one"
    [[ -e $W/cluster/complete ]] || cluster start >/dev/null
    eval "$(cluster env)"
    CLUSTER_ENDPOINT=${AWS_ENDPOINT_URL#http://}
    # A link from before the cluster has no port for it.
    [[ ! -e $W/link.log || -n $(link_address "$CLUSTER_ENDPOINT") ]] || daemon_stop link
    fleet
    SPEEDY_STORE=$SPEEDY_STORE-$RANDOM$RANDOM
}

# through_link COMMAND...: what it starts reaches the store through the link.
through_link() {
    local address
    address=http://$(link_address "$CLUSTER_ENDPOINT")
    AWS_ENDPOINT_URL=$address AWS_ENDPOINT=$address "$@"
}
store_fault() { link_fault "$(link_address "$CLUSTER_ENDPOINT")" "$@"; }

stand_in_ends() {
    [[ ! -e $W/stand-in.pid ]] || daemon_stop stand-in KILL
    rm -f "$W/stand-in.log"
}
