# Thin volumes beside containerd's devmapper snapshotter. Sourced by contrib/bench.
# shellcheck shell=bash

need_rust
need_go
need_packages strace
[[ -x $SPEEDY ]] || step "Build Speedy" cargo build --locked --release --manifest-path "$REPO/Cargo.toml"
(cd "$REPO/tests/conformance" && go test -c -o "$REPO/target/conformance" .)
SPEEDY_BIN=$SPEEDY TEST_THIN_BENCH=$ROUNDS "$REPO/contrib/vm" --memory 2560 --limit 1800 --file "$SPEEDY" --file "$(command -v blkdiscard)" --file "$(command -v strace)" -- \
    "$REPO/target/conformance" -test.root -test.v -test.run '^TestThinBench$'
