# contrib/bench second-node [--rounds N] [--mbit N] [--delay D] [IMAGE...]: a second node starts an image that the first one has
# published. Registry and store (a Ceph cluster in memory) are behind one link, by default 1000 Mbit/s and 1 ms each way; `overlayfs`
# from the registry and `speedy` from the store in turn, by `nerdctl run --pull always` until the program's first line.
# shellcheck shell=bash

bench_second_node() {
    local name snapshotter round took names=("$@") endpoint key
    ((${#names[@]})) || names=(python big)
    for name in "${names[@]}"; do step "Make and push $name" push_image "$name"; done
    step "Start Ceph" start_store
    endpoint=${AWS_ENDPOINT_URL#http://}
    start_link -registry "127.0.0.1:0=$REGISTRY" -listen "127.0.0.1:0=$endpoint"
    quiet_collector
    start_speedy --store "$SPEEDY_STORE"
    start_containerd "$CONTAINERD_VERSION"
    step "Pull and publish on the first node" publish_names "${names[@]}"
    key=$("$SPEEDY" trust --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" | grep -oE 'ed25519:[A-Za-z0-9+/=_-]+' | head -n 1)
    on b start_behind_link "$endpoint" "$key"
    # The first node has nothing more to do.
    daemon_stop containerd
    daemon_stop speedy
    link_post "link?mbit=$MBIT&delay=$DELAY"
    machine
    say "Link: $MBIT Mbit/s, $DELAY each way."
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for snapshotter in overlayfs speedy; do
                cold
                link_post reset
                took=$(on b ready "$snapshotter" "$name")
                record "$name" "$snapshotter: ready, s" "$(seconds_of "$took")"
                record "$name" "$snapshotter: MB over the link" "$(link_counters '.down / 1000000 | floor')"
                note "round $round: $name on $snapshotter: ready after $(seconds_of "$took") s"
                on b empty_node
            done
        done
    done
    say
    table "second node" --ratio "ratio=speedy: ready, s/overlayfs: ready, s"
    say
    say "The second node's daemon used $(on b peak_memory) MB at most."
}
