# nerdctl: pull, run, commit, build.
# shellcheck shell=bash

nerdctl() {
    PATH="$TOOLS:$PATH" "$(tool_path "nerdctl-$NERDCTL_VERSION")/nerdctl" -a "$CONTAINERD_ADDRESS" \
        --hosts-dir "$N/certs.d" --data-root "$N/nerdctl" --cgroup-manager cgroupfs --namespace "$(node_daemon "$WORLD-nerdctl")" \
        --snapshotter "$SNAPSHOTTER" "$@"
}
# Without a network: no CNI plugins are needed, and none are touched.
nerdctl_run() { nerdctl run --net none --cgroup-parent "/$WORLD-nerdctl" "$@"; }

test_nerdctl_pull_and_run() {
    nerdctl pull --quiet "$(image tiny)"
    expect_equal "hello from tiny" "$(nerdctl_run --rm "$(image tiny)")" "what the container printed"
    nerdctl_run --rm "$(image tiny)" sh -c 'echo x > /data/hello && rm -r /var && test ! -e /var'
}

test_nerdctl_eight_layers_inside() {
    nerdctl_run --rm --pull always --quiet "$(image eight)" | LC_ALL=C sort >"$W/got.txt"
    same_files "$W/expected/eight.txt" "$W/got.txt" "the container sees something else than the image has"
}

test_nerdctl_128_layers() {
    expect_equal 128 "$(nerdctl_run --rm --quiet "$(image deep)")" "the file of the top layer"
}

test_nerdctl_exec_cp_restart() {
    nerdctl_run -d --name worker --quiet "$(image pause)" >/dev/null
    nerdctl exec worker sh -c 'echo kept > /data/kept'
    nerdctl restart --time 5 worker >/dev/null
    expect_equal kept "$(nerdctl exec worker cat /data/kept)" "a file after the restart"
    nerdctl rm -f worker >/dev/null
}

test_nerdctl_commit() {
    nerdctl_run --name author --quiet "$(image eight)" sh -c \
        'echo new > /data/new; rm -r /data/keep; rm /attrs/user; chmod 0700 /special; ln /links/one /links/four'
    nerdctl commit author committed:1 >/dev/null
    nerdctl rm author >/dev/null
    nerdctl_run --rm committed:1 sh -c \
        'cat /data/new; stat -c %a /special; stat -c %h /links/four; ls -d /data/keep /attrs/user 2>/dev/null | wc -l; cat /data/changed' >"$W/got"
    printf '%s\n' new 700 2 0 'changed in layer six' >"$W/want"
    same_files "$W/want" <(tr -d '\r' <"$W/got" | sed 's/six$/six\n/' | sed '/^$/d') "the committed image"
    # Nine layers now: eight of the image and one of the container.
    expect_equal 9 "$(nerdctl image inspect committed:1 | jq '.[0].RootFS.Layers | length')" "layers of the committed image"
}

start_buildkit() {
    cat >"$W/buildkitd.toml" <<END
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "$CONTAINERD_ADDRESS"
  namespace = "$WORLD-nerdctl"
  snapshotter = "$SNAPSHOTTER"
  networkMode = "host"
  defaultCgroupParent = "/$WORLD-build"
[registry."$REGISTRY"]
  http = true
[otel]
  socketPath = "$W/otel.sock"
END
    daemon buildkitd "$BUILDKIT/buildkitd" --config "$W/buildkitd.toml" --addr "unix://$W/buildkitd.sock" --root "$W/buildkit"
    wait_for 20 buildkitd "$BUILDKIT/buildctl" --addr "unix://$W/buildkitd.sock" debug workers
}

test_nerdctl_build() {
    # BuildKit with containerd as its worker unpacks, mounts and commits through Speedy.
    local BUILDKIT
    BUILDKIT=$(tool_path "buildkit-$BUILDKIT_VERSION")
    [[ -d $BUILDKIT ]] || skip "BuildKit is not here; contrib/test --long builds it"
    start_buildkit || { tail -n 20 "$W/buildkitd.log" >&2; fail "BuildKit does not start"; }
    mkdir -p "$W/build"
    echo copied >"$W/build/file"
    cat >"$W/build/Dockerfile" <<END
FROM $(image eight) AS first
RUN echo built > /data/built && rm -r /data/keep
FROM $(image eight)
COPY --from=first /data/built /data/built
COPY file /data/file
RUN rm /data/changed && chmod 0700 /special
END
    PATH="$BUILDKIT:$PATH" nerdctl build --buildkit-host "unix://$W/buildkitd.sock" --progress plain -t built:1 "$W/build"
    expect_equal "built copied 700 19" \
        "$(nerdctl_run --rm built:1 sh -c 'echo $(cat /data/built /data/file) $(stat -c %a /special) $(ls /data/keep | wc -l); test ! -e /data/changed')" \
        "the built image"
    "$BUILDKIT/buildctl" --addr "unix://$W/buildkitd.sock" prune --all >/dev/null
    daemon_stop buildkitd
}

test_nerdctl_removal_leaves_nothing() {
    nerdctl images -q | sort -u | xargs -r -n 100 "$(tool_path "nerdctl-$NERDCTL_VERSION")/nerdctl" -a "$CONTAINERD_ADDRESS" \
        --data-root "$N/nerdctl" --namespace "$(node_daemon "$WORLD-nerdctl")" --snapshotter "$SNAPSHOTTER" rmi -f >/dev/null
    remove_everything
    expect_nothing_left
}
