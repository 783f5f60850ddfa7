# contrib/bench images [NAME...]: makes the images that the others use, and says how large they are.
# shellcheck shell=bash

bench_images() {
    local name layers plain packed
    : >"$W/results"
    for name in $(image_names "$@"); do
        step "Make $name" make_image "$name"
        read -r layers plain packed < <(image_sizes "$name")
        record "$name" layers "$layers"
        record "$name" "MB plain" "$((plain / 1000000))"
        record "$name" "MB as gzip" "$((packed / 1000000))"
    done
    say
    table image --digits 0
    say
    du -sh "$SPEEDY_IMAGES"
}
