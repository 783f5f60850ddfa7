# The link of contrib/tools/link in a world of private.sh: bandwidth, delay, byte counters and faults in front of the
# registry and the object store.
# shellcheck shell=bash

# start_link [FLAG...]: the flags of the program, such as -registry 127.0.0.1:0=$REGISTRY.
start_link() {
    : >"$W/link.log"
    daemon link "$(link_tool)" "$@"
    wait_for 10 "the link" grep -q '^control ' "$W/link.log" || { cat "$W/link.log" >&2; return 1; }
}

link_control() { awk '$1 == "control" { print $2 }' "$W/link.log"; }

# link_address TARGET: where the link listens for it.
link_address() {
    awk -v target="$1" '$1 == "listening" && substr($2, index($2, "=") + 1) == target { address = $2 } END { sub("=.*", "", address); print address }' "$W/link.log"
}

# link_post PATH...: such as "fault?kind=none" or "link?mbit=1000&delay=1ms".
link_post() {
    local path
    for path in "$@"; do curl -sS --fail-with-body -X POST "http://$(link_control)/$path" >/dev/null; done
}

# link_counters [JQ-FILTER]
link_counters() { curl -sSf "http://$(link_control)/counters" | jq -r "${1:-.}"; }

# link_fault ADDRESS KIND [PARAMETERS]: for one port, such as: link_fault "$STORE_ADDRESS" stall after=1000
link_fault() { link_post "fault?port=${1##*:}&kind=$2${3:+&$3}"; }
