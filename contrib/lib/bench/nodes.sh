# contrib/bench nodes [--rounds N] [--mbit N] [--delay D] [IMAGE [COUNT]]: COUNT (4) nodes that have nothing start one image at the same
# time, lazily and without a trace; and COUNT containers of it start at the same time on one node that has nothing. Bytes that came over the link
# until all of them were ready, beside those of one start alone. Store and registry are behind one link, as for image-delay.
# shellcheck shell=bash
. "$REPO/contrib/lib/bench/image-delay.sh"

bench_nodes() {
    local name=${1:-python} count=${2:-4} round node nodes=() same=()
    publish_behind_link "$name"
    while ((${#nodes[@]} < count)); do nodes+=("n${#nodes[@]}") same+=(n0); done
    for node in "${nodes[@]}"; do on "$node" start_behind_link "$ENDPOINT" "$KEY"; done
    machine
    say "Link: $MBIT Mbit/s, $DELAY each way."
    for ((round = 1; round <= ROUNDS; round++)); do
        together "one start" "$ENDPOINT" "$name" "${nodes[0]}"
        together "$count nodes at once" "$ENDPOINT" "$name" "${nodes[@]}"
        together "$count containers on one node at once" "$ENDPOINT" "$name" "${same[@]}"
    done
    say
    table "$name, until all are ready" --digits 1
}

# together WHAT STORE-ENDPOINT NAME NODE...: a start on each of the nodes, at the same time.
together() {
    local what=$1 name=$3 node began start starts=() number=0
    for node in $(printf '%s\n' "${@:4}" | sort -u); do on "$node" restart_as lazy "$2"; done
    link_post "link?mbit=$MBIT&delay=$DELAY"
    cold
    link_post reset
    began=$(now_ms)
    for node in "${@:4}"; do
        number=$((number + 1))
        (on "$node" ready speedy "$name") >"$W/ready-$number" &
        starts+=("$!")
    done
    # Not all jobs: the daemons are some, too.
    for start in "${starts[@]}"; do wait "$start" || die "not all were ready"; done
    record "$what" "s" "$(seconds_of "$(($(now_ms) - began))")"
    record "$what" "MB over the link" "$(link_counters '.down / 100000 | floor / 10')"
    link_post "link?mbit=0&delay=0"
    for node in $(printf '%s\n' "${@:4}" | sort -u); do
        on "$node" filled 120
        on "$node" empty_node
    done
}
