# contrib/bench image-delay [--rounds N] [--store ceph|versity] [--mbit N] [--delay D] [IMAGE...]: what an image's absence adds to the time until its program
# prints "ready": `nerdctl run` with the image absent, less `nerdctl run` with everything local, the page cache dropped before
# both. Another node has published the images. Registry and store are behind one link, by default
# 1000 Mbit/s and 1 ms each way; `overlayfs`, and `speedy` in turn with fetch.lazy off (`eager`), on but without traces (`lazy`), and with
# the trace of one start (`traced`), which is recorded beforehand.
# shellcheck shell=bash

bench_image_delay() {
    local name how round took here names=("$@") hows=(overlayfs eager lazy traced)
    # A view that waits for an image's data gives up when containerd wants to collect, and nerdctl with it: not on a thin link.
    ((MBIT >= 500)) || hows=(overlayfs lazy traced)
    ((${#names[@]})) || names=(python big)
    second_node "${names[@]}"
    for name in "${names[@]}"; do step "Record a start of $name" record_start "$name" "$ENDPOINT"; done
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${names[@]}"; do
            for how in "${hows[@]}"; do
                link_post "link?mbit=$MBIT&delay=$DELAY"
                on b restart_as "$how" "$ENDPOINT"
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
    table "image delay" --ratio "lazy: 1/=overlayfs: delay, s/lazy: delay, s" \
        --ratio "traced: 1/=overlayfs: delay, s/traced: delay, s"
    say
    say "The second node's daemon used $(on b peak_memory) MB at most."
}

# record_start NAME STORE-ENDPOINT: node b starts the image lazily, writes what the start read, and is empty again.
record_start() {
    link_post "link?mbit=$MBIT&delay=$DELAY"
    on b restart_as traced "$2"
    on b ready speedy "$1" >/dev/null
    link_post "link?mbit=0&delay=0"
    wait_for 90 "the start to be recorded" on b is_recorded
    on b filled 120
    on b empty_node
}
is_recorded() { [[ $(status_of .traces.written) == 1 ]]; }
