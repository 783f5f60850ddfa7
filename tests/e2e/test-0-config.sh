# The repository's own example is what all these tests run with.
# shellcheck shell=bash

test_config_is_understood() {
    # This release of containerd knows every key, and everything that depends on the snapshotter came up.
    ! grep -i 'unknown key\|failed to load plugin.*\(cri\|transfer\)' "$W/containerd.log" || fail "containerd complains about the configuration"
    ctr plugins ls >"$W/plugins"
    local plugin
    for plugin in "transfer.v1 *local" "grpc.v1 *cri" "cri.v1 *images" "snapshotter.v1 *$SNAPSHOTTER"; do
        grep -q "io.containerd.$plugin .* ok" "$W/plugins" || { cat "$W/plugins" >&2; fail "plugin $plugin is not ok"; }
    done
}

test_config_capabilities() {
    need_speedy
    local plugin
    plugin=$(ctr plugins ls -d 'id==speedy')
    expect_contains "$plugin" remap-ids "the plugin's capabilities"
    [[ $plugin != *rebase* ]] || fail "the main example advertises rebase"
    expect_contains "$plugin" "$SPEEDY_ROOT" "the plugin's root"
}
