# A private containerd, registry and Speedy under one temporary directory $W, side by side with
# whatever the machine runs. Used by the end-to-end tests and by the demo.
# shellcheck shell=bash
#
# Every daemon has a name; $W/NAME.pid and $W/NAME.log are its own. Paths in $W are short, because a
# unix socket's path ends at 107 bytes.
#
# A node is a containerd and a Speedy with directories and sockets of their own, below $N. The first node is the world's own
# ($N is $W); `on b COMMAND...` is for node b what COMMAND is for the first one. Registry and stores are shared.

# world_make: makes $W. world_remove undoes all of it; call that from a trap.
world_make() {
    W=$(mktemp -d "${TMPDIR:-/tmp}/spd.XXXXXX")
    chmod 711 "$W" # a container in a user namespace walks through it
    # Names the containers' cgroups and containerd namespaces apart from everybody else's.
    WORLD=spd-${W##*.}
    [[ -e /run/containerd ]] || touch "$W/alone"
    ((${#W} < 80)) || die "TMPDIR is too long for unix sockets: $W"
    NODE=''
    node_paths
    node_make
}

# node_paths: where things are on node $NODE.
node_paths() {
    N=$W${NODE:+/$NODE}
    CONTAINERD_ADDRESS=$N/containerd.sock
    SPEEDY_ADDRESS=$N/speedy.sock
    SPEEDY_ROOT=$N/speedy
}

node_make() { mkdir -p "$N"/{conf.d,certs.d,speedy,fifo,tmp}; }

# on NODE COMMAND...: COMMAND, which may be a function of these files, on another node.
on() {
    local NODE=$1 N CONTAINERD_ADDRESS SPEEDY_ADDRESS SPEEDY_ROOT
    shift
    node_paths
    "$@"
}

# node_daemon NAME: what NAME is called on this node. Daemons, containerd's namespaces and cgroups have the node's name in
# theirs: runc keeps all of them in one place.
node_daemon() { printf '%s%s' "$1" "${NODE:+-$NODE}"; }

# daemon NAME COMMAND...: starts it in the background, in a session of its own.
daemon() {
    local name=$1
    shift
    setsid "$@" </dev/null >>"$W/$name.log" 2>&1 &
    echo $! >"$W/$name.pid"
}

daemon_pid() { cat "$W/$1.pid" 2>/dev/null; }

# daemon_names KIND: those of that kind that run, on whatever node.
daemon_names() {
    local file name
    for file in "$W/$1".pid "$W/$1"-*.pid; do
        name=$(basename "$file" .pid)
        if [[ -e $file ]] && daemon_runs "$name"; then printf '%s\n' "$name"; fi
    done
}

# A zombie has ended, only nobody has asked yet; but not while another of its threads waits for a disk, with all locks held.
pid_runs() {
    local stat threads
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    threads=("/proc/$1/task"/*)
    [[ ${stat##*) } != Z* ]] || ((${#threads[@]} > 1))
}
daemon_runs() { local pid; pid=$(daemon_pid "$1") && pid_runs "$pid"; }
daemon_ended() { ! daemon_runs "$1"; }

# daemon_stop NAME [SIGNAL]: sends the signal and waits for the end; after 15 s it is killed, which
# counts as a failure.
daemon_stop() {
    local name=$1 signal=${2:-TERM} pid status=0
    pid=$(daemon_pid "$name") || return 0
    kill "-$signal" "$pid" 2>/dev/null || true
    if ! wait_for 15 "the end of $name" daemon_ended "$name"; then
        kill -KILL "$pid" 2>/dev/null || true
        status=1
    fi
    rm -f "$W/$name.pid"
    return "$status"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# start_registry: a registry on a free port of 127.0.0.1, known to containerd as plain http; sets $REGISTRY.
start_registry() {
    local port
    port=$(free_port)
    REGISTRY=127.0.0.1:$port
    cat >"$W/registry.yml" <<END
version: 0.1
log: { level: warn }
storage: { filesystem: { rootdirectory: $W/registry } }
http: { addr: "$REGISTRY" }
END
    run_registry
    registry_host "$REGISTRY"
}

# run_registry: on the port that it has.
run_registry() {
    OTEL_TRACES_EXPORTER=none daemon registry "$(tool_path "registry-$REGISTRY_VERSION")/registry" serve "$W/registry.yml"
    wait_for 10 "the registry" curl -sf "http://$REGISTRY/v2/"
}

# registry_host ADDRESS: where this node's containerd finds what it calls $REGISTRY.
registry_host() {
    mkdir -p "$N/certs.d/$REGISTRY"
    cat >"$N/certs.d/$REGISTRY/hosts.toml" <<END
server = "http://$1"
[host."http://$1"]
  capabilities = ["pull", "resolve", "push"]
END
}

# make_images NAME...: makes test images and pushes them to the registry.
make_images() {
    python3 "$REPO/tests/e2e/mkimage.py" "$REGISTRY" "$W/expected" "$@"
}

# containerd_config SOURCE: the repository's own example, with this node's paths. What only a test
# machine needs is laid over it as a fragment, through the example's own `imports`. DIFFER=walking leaves Speedy's differ out.
containerd_config() {
    sed -e "s|/var/lib/containerd|$N/lib|; s|/run/containerd/containerd.sock|$CONTAINERD_ADDRESS|" \
        -e "s|\"/run/containerd\"|\"$N/run\"|; s|/etc/containerd/|$N/|" \
        -e "s|/run/speedy/speedy.sock|$SPEEDY_ADDRESS|; s|/var/lib/speedy|$SPEEDY_ROOT|" \
        "$1" >"$N/containerd.toml"
    if [[ ${SNAPSHOTTER:-speedy} != speedy || ${DIFFER:-} == walking ]]; then
        edit_config '/^\[proxy_plugins.speedy-diff/ { drop = 1; next } /^\[/ { drop = 0 } !drop' \
            -e '/^ *differ = "speedy-diff"/d; s/"speedy-diff", *//'
    fi
    if [[ ${SNAPSHOTTER:-speedy} != speedy ]]; then
        # Without Speedy: a plugin that nobody answers for would hold up every garbage collection.
        edit_config '/^\[proxy_plugins/ { drop = 1 } /^\[+plugins/ { drop = 0 } !drop' \
            -e "s|snapshotter = \"speedy\"|snapshotter = \"$SNAPSHOTTER\"|"
    fi
    cat >"$N/conf.d/private.toml" <<END
version = 3
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE, as in many test machines, no process may lower its oom score.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "${REGISTRY:-}/pause:1"
[plugins.'io.containerd.internal.v1.opt']
  path = "$N/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
END
}

# edit_config AWK SED-ARGUMENT...
edit_config() {
    awk "$1" "$N/containerd.toml" | sed "${@:2}" >"$N/containerd.toml.new"
    mv "$N/containerd.toml.new" "$N/containerd.toml"
}

# start_containerd VERSION [CONFIGURATION]
start_containerd() {
    TOOLS=$(tool_path "containerd-$1")
    containerd_config "${2:-$REPO/config/containerd.toml}"
    # The shim is found through PATH; temporary mounts go to TMPDIR.
    PATH="$TOOLS:$PATH" TMPDIR="$N/tmp" daemon "$(node_daemon containerd)" "$TOOLS/containerd" --config "$N/containerd.toml"
    if ! wait_for 20 containerd containerd_answers; then
        tail -n 20 "$W/$(node_daemon containerd).log" >&2
        return 1
    fi
}
containerd_answers() { "$TOOLS/ctr" -a "$CONTAINERD_ADDRESS" version; }

# start_speedy [FLAG...]: the daemon on this node's root and socket.
start_speedy() {
    daemon "$(node_daemon speedy)" "$SPEEDY" serve --address "$SPEEDY_ADDRESS" --root "$SPEEDY_ROOT" \
        --containerd "$CONTAINERD_ADDRESS" "$@"
    if ! wait_for 20 speedy speedy_answers; then
        tail -n 20 "$W/$(node_daemon speedy).log" >&2
        return 1
    fi
}
# Connecting is enough: the socket is made when the store behind it is open.
speedy_answers() {
    daemon_runs "$(node_daemon speedy)" && python3 -c 'import socket, sys
s = socket.socket(socket.AF_UNIX); s.settimeout(1); s.connect(sys.argv[1])' "$SPEEDY_ADDRESS"
}

ctr() { "$TOOLS/ctr" -a "$CONTAINERD_ADDRESS" -n "${NAMESPACE:-$(node_daemon "$WORLD")}" "$@"; }

# start_node NAME VERSION [SPEEDY-FLAG...]: another node, with a containerd that reaches the registry as the first one does.
start_node() {
    on "$1" node_make
    on "$1" registry_host "$REGISTRY"
    [[ ${SNAPSHOTTER:-speedy} != speedy ]] || on "$1" start_speedy "${@:3}"
    on "$1" start_containerd "$2"
}

# node_remove: ends this node's daemons and removes its directory.
node_remove() {
    local mount
    daemon_stop "$(node_daemon containerd)"
    daemon_stop "$(node_daemon speedy)"
    # Attached layer images stay when their daemon ends.
    for mount in $(mounts_below "$N"); do umount "$mount"; done
    rm -rf --one-file-system "$N"
}

# namespaces: those of the private containerd.
namespaces() { NAMESPACE='' ctr namespaces ls -q 2>/dev/null || true; }

# remove_containers: of every namespace, running or not.
remove_containers() {
    local namespace id
    for namespace in $(namespaces); do
        for id in $(NAMESPACE=$namespace ctr tasks ls -q 2>/dev/null); do
            NAMESPACE=$namespace ctr tasks rm -f "$id" >/dev/null 2>&1 || true
        done
        for id in $(NAMESPACE=$namespace ctr containers ls -q 2>/dev/null); do
            NAMESPACE=$namespace ctr containers rm "$id" >/dev/null 2>&1 || true
        done
    done
}

# kill_rest: shims outlive containerd, and a script that was killed may have left a daemon; ours have $W in their arguments.
kill_rest() {
    local cmdline pid
    for cmdline in /proc/[0-9]*/cmdline; do
        pid=${cmdline#/proc/}
        pid=${pid%/cmdline}
        if { tr '\0' ' ' <"$cmdline"; } 2>/dev/null | grep -qF -- "$W/" && ((pid != $$)); then
            # The shim's children are the containers' first processes.
            kill -KILL $(cat "/proc/$pid/task/"*/children 2>/dev/null) "$pid" 2>/dev/null || true
        fi
    done
}

mounts_below() {
    awk -v top="$1/" 'index($5, top) == 1 { print $5 }' /proc/self/mountinfo | sort -r
}

# speedy_is_reached: by containerd.
# Not `ls`: without snapshots containerd answers that by itself.
speedy_is_reached() {
    local key=reached-$RANDOM$RANDOM
    ctr snapshots --snapshotter speedy prepare "$key" && ctr snapshots --snapshotter speedy rm "$key"
}

# boot_id_back: the kernel's own, where a test that reboots a node has put another one in its place.
boot_id_back() {
    while awk -v ours="/${W##*/}/boot_id" '$5 == "/proc/sys/kernel/random/boot_id" && substr($4, length($4) - length(ours) + 1) == ours { found = 1 } END { exit !found }' /proc/self/mountinfo; do
        umount /proc/sys/kernel/random/boot_id || return 0
    done
}

# world_remove: leaves no container, process, mount or directory of this world behind.
world_remove() {
    [[ -n ${W:-} && -d $W ]] || return 0
    local name node mount directory
    for name in $(daemon_names containerd); do
        node=${name#containerd}
        [[ -z ${TOOLS:-} ]] || on "${node#-}" remove_containers
    done
    # Who asks is stopped before who answers.
    for name in buildkitd $(daemon_names containerd) $(daemon_names speedy) link registry; do
        daemon_stop "$name" || true
    done
    kill_rest
    for mount in $(mounts_below "$W"); do
        umount "$mount" 2>/dev/null || umount -l "$mount" || true
    done
    boot_id_back
    # Of an attached layer image, should its mount have gone first.
    losetup -n -O NAME,BACK-FILE 2>/dev/null | awk -v top="$W/" 'index($2, top) == 1 { print $1 }' | xargs -r losetup -d 2>/dev/null || true
    for directory in $(find /sys/fs/cgroup -maxdepth 4 -type d -name "$WORLD*" 2>/dev/null | sort -r); do
        find "$directory" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    # Where runc, the shims and clients keep their state is shared. What was not there before goes, once empty.
    rmdir "/run/containerd/runc/$WORLD"* 2>/dev/null || true
    if [[ -e $W/alone ]]; then
        find /run/containerd -depth -type d -exec rmdir {} + 2>/dev/null || true
    fi
    rm -rf --one-file-system "$W"
}
