# contrib/bench image-delay [--rounds N] [--mbit N] [--delay D] [IMAGE...]: what an image's absence adds to the time until its program
# prints "ready": `nerdctl run` with the image absent, less `nerdctl run` with everything local, the page cache dropped before
# both. Another node has published the images. Registry and store (a Ceph cluster in memory) are behind one link, by default
# 1000 Mbit/s and 1 ms each way; `overlayfs`, and `speedy` with fetch.lazy off and on, in turn.
# shellcheck shell=bash

bench_image_delay() {
    local name how round took here endpoint names=("$@")
    ((${#names[@]})) || names=(python big)
    for name in "${names[@]}"; do step "Make and push $name" push_image "$name"; done
    step "Start Ceph" start_store
    endpoint=${AWS_ENDPOINT_URL#http://}
    start_link -registry "127.0.0.1:0=$REGISTRY" -listen "127.0.0.1:0=$endpoint"
    quiet_collector
    start_speedy --store "$SPEEDY_STORE"
    start_containerd "$CONTAINERD_VERSION"
    step "Pull and publish on the first node" publish_names "${names[@]}"
    KEY=$("$SPEEDY" trust --root "$SPEEDY_ROOT" --address "$SPEEDY_ADDRESS" | grep -oE 'ed25519:[A-Za-z0-9+/=_-]+' | head -n 1)
    on b start_behind_link "$endpoint" "$KEY"
    daemon_stop containerd
    daemon_stop speedy
    machine
    say "Link: $MBIT Mbit/s, $DELAY each way."
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for how in overlayfs eager lazy; do
                on b restart_as "$how" "$endpoint"
                link_post "link?mbit=$MBIT&delay=$DELAY"
                cold
                link_post reset
                took=$(on b ready "$(snapshotter_of "$how")" "$name")
                record "$name" "$how: MB over the link until ready" "$(link_counters '.down / 1000000 | floor')"
                link_post "link?mbit=0&delay=0"
                [[ $how == overlayfs ]] || on b filled 120
                cold
                here=$(on b ready_here "$(snapshotter_of "$how")" "$name")
                record "$name" "$how: absent, s" "$(seconds_of "$took")"
                record "$name" "$how: local, s" "$(seconds_of "$here")"
                record "$name" "$how: delay, s" "$(seconds_of "$((took > here ? took - here : 0))")"
                note "round $round: $name, $how: absent $(seconds_of "$took") s, local $(seconds_of "$here") s"
                on b empty_node
            done
        done
    done
    say
    table "image delay" --only "overlayfs: delay, s,eager: delay, s,lazy: delay, s" --ratio "lazy: 1/=overlayfs: delay, s/lazy: delay, s" 2>/dev/null ||
        table "image delay"
    say
    table "all"
    say
    say "The second node's daemon used $(on b peak_memory) MB at most."
}

snapshotter_of() { if [[ $1 == overlayfs ]]; then echo overlayfs; else echo speedy; fi; }

# restart_as HOW STORE-ENDPOINT: this node's Speedy, lazy or not.
restart_as() {
    local address lazy=off
    [[ $1 != lazy ]] || lazy=auto
    [[ $1 != overlayfs ]] || return 0
    address=http://$(link_address "$2")
    daemon_stop "$(node_daemon speedy)"
    AWS_ENDPOINT_URL=$address AWS_ENDPOINT=$address SPEEDY_TRUST_KEYS=$KEY SPEEDY_PUBLISH_POLICY=off SPEEDY_FETCH_LAZY=$lazy \
        start_speedy --store "$SPEEDY_STORE"
    wait_for 15 "containerd to find Speedy again" speedy_is_found
}
speedy_is_found() { ctr snapshots --snapshotter speedy prepare "found-$RANDOM$RANDOM" && remove_found; }
remove_found() {
    local key
    for key in $(ctr snapshots --snapshotter speedy ls | awk '$1 ~ /^found-/ { print $1 }'); do ctr snapshots --snapshotter speedy rm "$key"; done
}
