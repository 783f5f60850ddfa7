# Layers that are looked up before containerd asks for them.
# shellcheck shell=bash

foreseen() { metric speedy_remote_lookups_foreseen_total; }
# requests: those that the store was sent, of every kind.
requests() { curl -sSf "http://$(metrics_address)/metrics" | awk '/^speedy_store_request_duration_seconds_count/ { sum += $2; seen = 1 } END { if (seen) print sum }'; }

test_fleet_layers_are_foreseen() {
    local client before
    need_speedy
    STORE=$(file_store)
    fresh_fleet "$STORE"
    publish_all pause more aba large
    for client in ctr nerdctl crictl; do
        trusting fresh_b --store "$STORE"
        expect_from_store "$client" more "$([[ $client == crictl ]] && echo 10 || echo 9)"
        # The news of the configuration may come after a layer or two were asked for.
        (($(on b foreseen) >= 5)) || fail "$client: of 9 layers $(on b foreseen) were foreseen"
    done
    # A layer that an image has twice is found under both of its chains at once, and here once.
    trusting fresh_b --store "$STORE"
    expect_from_store ctr aba 2
    on b ctr images rm --sync "$(image aba)" >/dev/null
    # Not for another snapshotter, whose images are nothing to us.
    before=$(on b requests)
    ((before > 0)) || fail "no requests are counted"
    on b ctr images pull --hosts-dir "$W/b/certs.d" --snapshotter overlayfs "$(image large)" >/dev/null
    sleep 1
    expect_equal "$before" "$(on b requests)" "requests to the store, with a pull for overlayfs"
    on b ctr images rm --sync "$(image large)" >/dev/null
    fresh_b
    fresh_speedy
}
