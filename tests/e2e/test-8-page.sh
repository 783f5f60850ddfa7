# The status page in a real browser without a window.
# shellcheck shell=bash

# need_browser: sets $BROWSER; Debian's is installed if there is none.
need_browser() {
    local name
    for name in chromium-headless-shell chromium google-chrome chrome; do
        BROWSER=$(command -v "$name") && return
    done
    (need_packages chromium-headless-shell fonts-dejavu-core) >&2 || skip "no browser: there is none here, and chromium-headless-shell cannot be installed"
    BROWSER=$(command -v chromium-headless-shell) || skip "no browser: chromium-headless-shell was installed and is not there"
}

# browse OPTION...: the page of this node.
browse() {
    timeout 60 "$BROWSER" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --user-data-dir="$W/browser" \
        "$@" "http://$(metrics_address)/" 2>"$W/browser.log" || { cat "$W/browser.log" >&2; fail "the browser does not show the page"; }
}

# background FILE: the colour of the page's corner, which is its own style sheet's.
background() { python3 "$HERE/pixel.py" "$1"; }

test_page_in_a_browser() {
    # Node b with layers from the store and one of its own: what an operator sees, in the light and in the dark.
    local page
    need_speedy
    need_browser
    fresh_fleet "$(file_store)"
    publish_all more large
    on b pull eight --local
    on b pull more
    on b pull large
    on b ctr_start page-1 more
    wait_for 30 "the layers to be durable" on b all_durable
    page=$(on b browse --dump-dom)
    expect_contains "$page" "<h1>Speedy on $(uname -n)</h1>" "the node's name"
    expect_contains "$page" '<span class="badge good">ok</span>' "a healthy node"
    expect_equal "$(on b layers_where true)" "$(grep -c '<code>sha256:' <<<"$page")" "rows of layers"
    on b browse --window-size=1180,760 --screenshot="$W/light.png"
    expect_equal '#f6f7f9' "$(background "$W/light.png")" "the page without a dark mode"
    on b browse --window-size=1180,760 --screenshot="$W/dark.png" --blink-settings=preferredColorScheme=0
    expect_equal '#11151c' "$(background "$W/dark.png")" "the page in dark mode"
    [[ -z ${PAGE_PNG:-} ]] || cp "$W/light.png" "$PAGE_PNG"
    on b ctr_remove page-1
}

test_page_of_a_hostile_store() {
    # What a store says of itself ends up in messages, and those on the page: no browser takes any of it for markup.
    local store page hostile="<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    need_speedy
    need_browser
    store=$(file_store)
    jq -n --arg evil "$hostile" '{format: 1, cutting: {block: 4096, min: 65536, average: 262144, max: 1048576, hole: 65536}, hash: $evil,
        compression: "zstd"}' >"${store#file://}/speedy.json"
    fresh_speedy --store "$store"
    pull eight
    wait_for 30 "a failure to publish" publish_fails
    page=$(browse --dump-dom)
    expect_contains "$page" '&lt;script&gt;document.title=' "the store's words, as text"
    expect_contains "$page" SpeedyPublishStuck "what the page says of it"
    [[ $page != *'<title>owned'* && $page != *'<script'* && $page != *'<img'* ]] || fail "the page runs what the store says: $page"
    fresh_speedy
}
publish_fails() { [[ $(status_of '.publish.problems | length') != 0 ]]; }
