# Layers that are looked up before containerd asks for them.
# shellcheck shell=bash

foreseen() { metric speedy_remote_lookups_foreseen_total; }
# lookups: all of them, whatever they came to.
lookups() { curl -sSf "http://$(metrics_address)/metrics" | awk '/^speedy_remote_lookups_total/ { sum += $2 } END { print sum + 0 }'; }

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
        (($(on b foreseen) >= 5)) || fail "$client: of 9 layers $(on b foreseen) were foreseen, $(on b lookups) looked up"
    done
    # A layer that an image has twice is found under both of its chains at once, and here once.
    trusting fresh_b --store "$STORE"
    expect_from_store ctr aba 2
    on b ctr images rm --sync "$(image aba)" >/dev/null
    # Not for another snapshotter, whose images are nothing to us.
    before=$(on b lookups)
    on b ctr images pull --hosts-dir "$W/b/certs.d" --snapshotter overlayfs "$(image large)" >/dev/null
    expect_equal "$before" "$(on b lookups)" "layers that were looked up for overlayfs"
    on b ctr images rm --sync "$(image large)" >/dev/null
    # What was looked up and not asked for is thrown away.
    wait_for 40 "no layer that nobody uses" on b nothing_reserved
    fresh_b
    fresh_speedy
}
nothing_reserved() { [[ -z $(find "$SPEEDY_ROOT/layer" -type f 2>/dev/null) ]]; }
