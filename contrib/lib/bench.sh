# What the benchmarks with real images share. Sourced after private.sh, link.sh and images.sh.
# shellcheck shell=bash

ROUNDS=3
# Layers go with their images, so that each round begins with an empty node.
export SPEEDY_LAYERS_BUDGET=0

# record ROW COLUMN VALUE: one measurement.
record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$W/results"; }

# table HEADING [OPTION...]: what was recorded as markdown; see bench.py.
table() { python3 "$REPO/contrib/lib/bench.py" "$W/results" "$@"; }

machine() {
    say "containerd $CONTAINERD_VERSION, Linux $(uname -r), $(nproc) cores ($(cpu_features)), $(stat -f -c %T "$W"), load $(cut -d' ' -f1 /proc/loadavg)"
}
cpu_features() {
    local flag found=''
    for flag in sha_ni avx2 avx512f; do
        if grep -qw "$flag" /proc/cpuinfo; then found+="${found:+, }$flag"; else found+="${found:+, }no $flag"; fi
    done
    printf '%s' "$found"
}

# seconds_of MS: for a number of milliseconds.
seconds_of() { printf '%d.%03d' "$(($1 / 1000))" "$(($1 % 1000))"; }

# timed COMMAND...: its milliseconds, on standard output; what it prints goes to a log.
timed() {
    local start
    start=$(now_ms)
    "$@" >>"$W/commands.log" 2>&1 || { tail -n 5 "$W/commands.log" >&2; return 1; }
    printf '%d' "$(($(now_ms) - start))"
}

# cold: nothing waits to be written, and nothing of the disk is in memory but what the registry serves.
cold() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    [[ ! -d $W/registry ]] || find "$W/registry" -type f -size +64k -exec cat {} + >/dev/null
}

image() { printf '%s/%s:1' "$REGISTRY" "$1"; }
status_of() { "$SPEEDY" status --json --address "$SPEEDY_ADDRESS" | jq -r "$1"; }
published() { [[ $(status_of .publish.pending) == 0 ]]; }
# filled SECONDS: when all layers are on this node's disk. Asked by one process: a shell that asks takes a fifth of two processors.
filled() { timeout "$1" "$SPEEDY" layers --wait --address "$SPEEDY_ADDRESS" >/dev/null || die "not all layers are on the disk"; }
publish_names() {
    local name
    for name in "$@"; do
        pull_by ctr speedy "$name" >/dev/null
        wait_for 600 "publishing of $name" published
    done
}

# publish_behind_link NAME...: the images are on a store, published by the first node, which has nothing more to do then. ENDPOINT is
# the store's, KEY the publisher's; registry and store are behind one link.
publish_behind_link() {
    local name
    for name in "$@"; do step "Make and push $name" push_image "$name"; done
    publish_pushed "$@"
}

# publish_pushed NAME...: the same for images that are in the registry.
publish_pushed() {
    step "Start the store ($STORE)" start_store
    ENDPOINT=${AWS_ENDPOINT_URL#http://}
    start_link -registry "127.0.0.1:0=$REGISTRY" -listen "127.0.0.1:0=$ENDPOINT"
    publish_to "$SPEEDY_STORE" "$@"
}

# publish_to STORE NAME...: by the first node, which is stopped then. KEY is the publisher's.
publish_to() {
    quiet_collector
    start_speedy --store "$1"
    start_containerd "$CONTAINERD_VERSION"
    step "Pull and publish on the first node" publish_names "${@:2}"
    KEY=$(own_key)
    daemon_stop containerd
    daemon_stop speedy
}

# own_key: this node's, as other nodes trust it.
own_key() { "$SPEEDY" trust --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" | grep -oE 'ed25519:[A-Za-z0-9+/=_-]+' | head -n 1; }

# second_node NAME...: node b, empty, with these images on a store behind the link as it was asked for; says what that is.
second_node() {
    publish_behind_link "$@"
    on b start_behind_link "$ENDPOINT" "$KEY"
    link_post "link?mbit=$MBIT&delay=$DELAY"
    machine
    say "Link: $MBIT Mbit/s, $DELAY each way."
}

# speedy_behind_link STORE-ENDPOINT KEY: this node's Speedy.
speedy_behind_link() {
    local address
    address=http://$(link_address "$1")
    AWS_ENDPOINT_URL=$address AWS_ENDPOINT=$address SPEEDY_TRUST_KEYS=$2 SPEEDY_PUBLISH_POLICY=off start_speedy --store "$SPEEDY_STORE"
}

# start_behind_link STORE-ENDPOINT KEY: this node.
start_behind_link() {
    node_make
    quiet_collector
    registry_host "$(link_address "$REGISTRY")"
    speedy_behind_link "$1" "$2"
    start_containerd "$CONTAINERD_VERSION"
}

# pull_by CLIENT SNAPSHOTTER NAME
pull_by() {
    case $1 in
        ctr) ctr images pull --hosts-dir "$N/certs.d" --snapshotter "$2" "$(image "$3")" ;;
        nerdctl) nerdctl "$2" pull --quiet "$(image "$3")" ;;
    esac
}

# nerdctl SNAPSHOTTER ARGUMENT...
nerdctl() {
    PATH="$TOOLS:$PATH" "$(tool_path "nerdctl-$NERDCTL_VERSION")/nerdctl" -a "$CONTAINERD_ADDRESS" \
        --hosts-dir "$N/certs.d" --data-root "$N/nerdctl" --cgroup-manager cgroupfs --namespace "$(node_daemon "$WORLD-nerdctl")" \
        --snapshotter "$1" "${@:2}"
}

# empty_node: no image, no content, no snapshot; waits until the space is free.
empty_node() {
    local namespace images
    for namespace in $(namespaces); do
        images=$(NAMESPACE=$namespace ctr images ls -q)
        # shellcheck disable=SC2086 # a list of references without spaces
        [[ -z $images ]] || NAMESPACE=$namespace ctr images rm --sync $images >>"$W/commands.log" 2>&1
    done
    wait_for 60 "the removed layers to go" nothing_is_there
}
nothing_is_there() {
    [[ -z $(find "$N/lib/io.containerd.content.v1.content/blobs" -type f 2>/dev/null) ]] &&
        [[ -z $(find "$SPEEDY_ROOT/layer" -type f 2>/dev/null) ]]
}

# ready SNAPSHOTTER NAME: an image that is not there is pulled and run; milliseconds until its first line, which must be "ready".
# ready_here: the same with an image that is there.
ready() { run_until_ready "$1" "$2" always; }
ready_here() { run_until_ready "$1" "$2" never; }
run_until_ready() {
    local start line end
    start=$(now_ms)
    exec {output}< <(nerdctl "$1" run --rm --net none --pull "$3" --quiet --cgroup-parent "/$WORLD-nerdctl" "$(image "$2")" 2>>"$W/commands.log")
    read -r line <&"$output" || true
    end=$(now_ms)
    cat <&"$output" >/dev/null
    exec {output}<&-
    [[ $line == *ready* ]] || { tail -n 5 "$W/commands.log" >&2; die "$2 on $1 printed: $line"; }
    printf '%d' "$((end - start))"
}

snapshotter_of() { if [[ $1 == overlayfs ]]; then echo overlayfs; else echo speedy; fi; }

# restart_as HOW STORE-ENDPOINT: this node's Speedy, lazy or not, with traces or without.
restart_as() {
    local lazy=off traces=off
    [[ $1 != lazy && $1 != traced ]] || lazy=auto
    [[ $1 != traced ]] || traces=auto
    [[ $1 != overlayfs ]] || return 0
    daemon_stop "$(node_daemon speedy)"
    SPEEDY_FETCH_LAZY=$lazy SPEEDY_FETCH_TRACES=$traces speedy_behind_link "$2" "$KEY"
    wait_for 15 "containerd to find Speedy again" speedy_is_reached
}

# resident_memory: of this node's Speedy now, in MB. peak_memory: at most since it started.
resident_memory() { awk '$1 == "VmRSS:" { printf "%d", $2 / 1000 }' "/proc/$(daemon_pid "$(node_daemon speedy)")/status"; }
peak_memory() { awk '$1 == "VmHWM:" { printf "%d", $2 / 1000 }' "/proc/$(daemon_pid "$(node_daemon speedy)")/status"; }

# start_store: one that keeps everything in memory, as a store elsewhere would not need this machine's disk. STORE is ceph, a cluster that shares
# the processors with the nodes, or versity, a process that takes little of them, for a store elsewhere would take nothing.
start_store() {
    "start_$STORE"
    # shellcheck source=/dev/null
    . "$W/store.env"
}
start_ceph() { "$REPO/contrib/ceph" start "$W/ceph" --memory >"$W/store.env"; }
start_versity() {
    local port
    port=$(free_port)
    mkdir "$W/versity"
    mount -t tmpfs -o size=8G,mode=700 versity "$W/versity"
    mkdir "$W/versity/speedy"
    cat >"$W/store.env" <<END
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ENDPOINT=http://127.0.0.1:$port AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=benchmark AWS_SECRET_ACCESS_KEY=no-secret SPEEDY_STORE=s3://speedy/store
END
    daemon versity env ROOT_ACCESS_KEY_ID=benchmark ROOT_SECRET_ACCESS_KEY=no-secret \
        "$(versity_tool)" --port "127.0.0.1:$port" --keep-alive --quiet --noacl posix --nometa "$W/versity"
    wait_for 10 "the store" store_answers
}
# shellcheck source=/dev/null
store_answers() { (. "$W/store.env" && python3 "$REPO/contrib/lib/s3.py" ls s3://speedy) >/dev/null 2>&1; }
