#!/bin/sh
# What tests/e2e/thin does in its virtual machine. busybox is all the userland there is.
set -eu
PATH=$TEST_PATH:$PATH:/usr/sbin
export CONTAINERD_ADDRESS=/run/containerd.sock CONTAINERD_NAMESPACE=test OTEL_TRACES_EXPORTER=none
PASSED=0

say() { echo "[$(cut -d. -f1 /proc/uptime) s] $*"; }
passed() { PASSED=$((PASSED + 1)) && say "ok      $*"; }
failed() {
    tail -n 30 /scratch/speedy.log /scratch/containerd.log | cut -c1-400
    echo "$PASSED passed, 1 failed, 0 skipped"
}
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
trap 'status=$? && [ "$status" = 0 ] || failed "status $status"' EXIT
expect_equal() { [ "$1" = "$2" ] || fail "$3: want $1, got $2"; }
# within SECONDS COMMAND...
within() {
    left=$(($1 * 2))
    shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || fail "gave up waiting for: $*"
        sleep 0.5
    done
}
image() { echo "$TEST_REGISTRY/$1:1"; }
pull() { ctr images pull --hosts-dir "$TEST_WORLD/certs.d" --snapshotter "$1" "$(image "$2")" >/scratch/pull.log 2>&1 || { tail -n 3 /scratch/pull.log; fail "cannot pull $2 on $1"; }; }
# The root of this machine is its first file system, which pivot_root(2) refuses to leave.
run() { ctr run --no-pivot --snapshotter speedy-thin --log-uri file:///scratch/out --rm "$@" && cat /scratch/out && rm -f /scratch/out; }
exec_in() { box=$1 && shift && ctr tasks exec --exec-id "x$PASSED" --log-uri file:///scratch/out "$box" "$@" && cat /scratch/out && rm -f /scratch/out; }
snapshots() { ctr snapshots --snapshotter speedy-thin "$@"; }
task_is() { ctr tasks ls | grep "^$1 " | grep -q "$2"; }
# What the image's own /bin/listing prints, but for numbers of links: below an overlay a link that an upper layer removed still counts.
listing() { sed 's/^\(f [^ ]* [^ ]* [^ ]*\) [0-9]* /\1 /' | LC_ALL=C sort; }
require_eight() {
    run "$(image eight)" "$1" | listing >/scratch/got.txt
    listing <"$TEST_WORLD/expected/eight.txt" >/scratch/want.txt
    cmp /scratch/want.txt /scratch/got.txt || { diff /scratch/want.txt /scratch/got.txt | head -n 20; fail "the container sees something else than the image has"; }
}
# What of the pool is in use: blocks of data, and devices beside the pool's own.
used() { dmsetup status --target thin-pool | sed 's/.*thin-pool [0-9]* [^ ]* \([0-9]*\)\/.*/\1/'; }
devices() { dmsetup ls | grep -vc -e '-pool' || true; }
nothing_left() { [ "$(snapshots ls | wc -l)" = 1 ] && [ "$(devices)" = 0 ] && [ "$(used)" -le "$EMPTY" ]; }
remove_all() {
    for one in $(ctr tasks ls -q); do ctr tasks rm -f "$one"; done
    for one in $(ctr containers ls -q); do ctr containers rm "$one"; done
    for one in $(ctr images ls -q); do ctr images rm --sync "$one"; done
} >/dev/null

start() {
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir -p /dev/pts /dev/shm /etc /run/speedy /scratch/store
    mount -t devpts devpts /dev/pts
    : >/etc/resolv.conf
    echo "127.0.0.1 localhost" >/etc/hosts
    registry serve "$TEST_WORLD/registry.yml" >/scratch/registry.log 2>&1 &
    speedy_starts
    sed -e "s|/var/lib/containerd|/scratch/lib|; s|/run/containerd/containerd.sock|$CONTAINERD_ADDRESS|" \
        -e "s|/etc/containerd/certs.d|$TEST_WORLD/certs.d|; s|/etc/containerd/|/scratch/|; s|/var/lib/speedy|/scratch/speedy|" \
        "$TEST_CONFIG" >/scratch/containerd.toml
    mkdir -p /scratch/conf.d
    cat >/scratch/conf.d/thin.toml <<END
version = 3
[proxy_plugins.speedy-thin]
  type = "snapshot"
  address = "/run/speedy/speedy.sock"
  [proxy_plugins.speedy-thin.exports]
    root = "/scratch/thin"
    enable_remote_snapshot_annotations = "true"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "speedy"
  differ = "speedy-diff"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = "speedy-thin"
  differ = "speedy-diff"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "$(image pause)"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  NoPivotRoot = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.thin]
  runtime_type = "io.containerd.runc.v2"
  snapshotter = "speedy-thin"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.thin.options]
    NoPivotRoot = true
[plugins.'io.containerd.internal.v1.opt']
  path = "/scratch/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
END
    containerd --config /scratch/containerd.toml >/scratch/containerd.log 2>&1 &
    within 60 ctr version
}

speedy_starts() {
    SPEEDY_THIN_ROOT=/scratch/thin SPEEDY_THIN_SIZE=256MiB SPEEDY_POOL_SIZE=2GiB SPEEDY_STORE=file:///scratch/store \
        "$TEST_SPEEDY" serve --root /scratch/speedy --address /run/speedy/speedy.sock --containerd "$CONTAINERD_ADDRESS" \
        >>/scratch/speedy.log 2>&1 &
    SPEEDY_PID=$!
    within 30 test -S /run/speedy/speedy.sock
}

start
EMPTY=$(used)
say "containerd, runc and Speedy on $(uname -r); the pool has $EMPTY blocks in use"

pull speedy-thin tiny
expect_equal "hello from tiny" "$(run "$(image tiny)" tiny)" "what the container printed"
passed "an image is pulled, and a container runs on it"

pull speedy-thin eight
require_eight eight
passed "eight layers with whiteouts, links and devices look from inside as they should"

ctr run --no-pivot --snapshotter speedy-thin --null-io -d "$(image tiny)" box /bin/sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait $!; done'
exec_in box /bin/sh -c 'echo kept >/data/kept && rm /data/hello && sync'
KEY=$(ctr containers info box | sed -n 's/.*"SnapshotKey": "\(.*\)".*/\1/p')
kill -KILL "$SPEEDY_PID"
wait "$SPEEDY_PID" 2>/dev/null || true
rm -f /run/speedy/speedy.sock
speedy_starts
expect_equal kept "$(exec_in box /bin/cat /data/kept)" "a running container, after Speedy was killed"
ctr tasks kill -s TERM box
within 20 task_is box STOPPED
ctr tasks rm box >/dev/null
ctr tasks start --no-pivot --null-io -d box
expect_equal kept "$(exec_in box /bin/cat /data/kept)" "a file after the container was started again"
ctr tasks rm -f box >/dev/null
passed "a container outlives Speedy, and is started again"

snapshots commit kept "$KEY"
snapshots prepare on-top kept >/dev/null
mkdir -p /scratch/look
snapshots mounts /scratch/look on-top >/scratch/mount.sh
sh -e /scratch/mount.sh
expect_equal kept "$(cat /scratch/look/data/kept)" "the committed snapshot, in one on top of it"
[ ! -e /scratch/look/data/hello ] || fail "a removed file is back"
umount /scratch/look
snapshots rm on-top
snapshots rm kept
ctr containers rm box
passed "a container's snapshot is committed, and another stands on it"

remove_all
within 90 nothing_left
passed "with the images everything goes: devices, snapshots and blocks"

pull speedy eight
within 60 sh -c 'test "$(find /scratch/store/refs -type f | wc -l)" -ge 8'
remove_all
ctr content ls -q | xargs -r ctr content rm >/dev/null 2>&1 || true
pull speedy-thin eight
expect_equal 2 "$(ctr content ls -q | wc -l)" "what containerd has fetched: manifest and configuration"
require_eight stored
remove_all
within 90 nothing_left
passed "layers that an overlayfs node has published become volumes, without a pull"

cri() { crictl --config /scratch/crictl.yaml --timeout 120s -r "unix://$CONTAINERD_ADDRESS" -i "unix://$CONTAINERD_ADDRESS" "$@"; }
: >/scratch/crictl.yaml
mkdir -p /scratch/logs
cat >/scratch/pod.json <<END
{"metadata": {"name": "pod", "namespace": "default", "uid": "pod", "attempt": 1}, "log_directory": "/scratch/logs",
 "linux": {"cgroup_parent": "/cri", "security_context": {"namespace_options": {"network": 2}}}}
END
cat >/scratch/container.json <<END
{"metadata": {"name": "one"}, "image": {"image": "$(image eight)"}, "log_path": "one.log", "linux": {},
 "command": ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"]}
END
cri pull "$(image eight)" >/dev/null
POD=$(cri runp --runtime thin /scratch/pod.json)
ID=$(cri create "$POD" /scratch/container.json /scratch/pod.json)
cri start "$ID" >/dev/null
expect_equal "changed in layer six" "$(cri exec --sync "$ID" cat /data/changed)" "a file of the image in the pod"
MOUNTED=$(grep " /run/containerd/io.containerd.runtime.v2.task/k8s.io/$ID/rootfs " /proc/mounts | cut -d' ' -f1,3)
case $MOUNTED in
    /dev/mapper/speedy-*' ext4') ;;
    *) fail "the container's root is $MOUNTED" ;;
esac
cri rmp -fa >/dev/null 2>&1
cri rmi --all >/dev/null 2>&1
passed "a pod of a RuntimeClass with this snapshotter"

"$TEST_SPEEDY" check --root /scratch/thin >/scratch/check.txt 2>&1 || true
grep -i 'pool' /scratch/check.txt || true
kill -TERM "$SPEEDY_PID"
wait "$SPEEDY_PID" || fail "Speedy did not end well"
for pass in 1 2 3; do for name in $(dmsetup ls | cut -f1 | sort -r); do dmsetup remove "$name" 2>/dev/null || true; done; done
pdata_tools thin_check /scratch/thin/pool/metadata >/scratch/check.txt 2>&1 || { cat /scratch/check.txt; fail "thin_check"; }
passed "thin_check finds nothing"
echo "$PASSED passed, 0 failed, 0 skipped"
