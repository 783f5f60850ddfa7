# Debian's kernels for the virtual machines of contrib/vm, kept with the other tools. Needs tools.sh.
# shellcheck shell=bash

# What a machine may need; what these need comes along. Those that a kernel has built in are none.
VM_MODULES=(virtio_pci virtio_blk virtio_rng loop overlay erofs fuse dm_thin_pool dm_flakey dm_log_writes xfs)

# kernel_release VERSION: the Debian release that has it.
kernel_release() {
    case $1 in
        6.1) echo bookworm ;;
        6.12) echo trixie ;;
        *) die "no kernel $1: there are 6.1 and 6.12" ;;
    esac
}

# apt-get on package lists of one release, which are no others' business. Where Debian's packages are had from is what this
# machine says; none: it is another distribution's.
make_kernel() {
    local version=$1 dir=$2 release site package modules module path file
    release=$(kernel_release "$version")
    site=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
    [[ -n $site ]] || { echo "this machine has no package lists of Debian's"; return 1; }
    mkdir -p "$dir/apt/lists/partial" "$dir/apt/cache/archives/partial"
    cd "$dir"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $release main" >apt/sources.list
    touch apt/status
    local apt=(-qq -o Dir::Etc::SourceList="$dir/apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$dir/apt/lists"
        -o Dir::Cache="$dir/apt/cache" -o Dir::State::status="$dir/apt/status" -o APT::Architecture=amd64 -o APT::Architectures=amd64
        -o APT::Sandbox::User=root -o Acquire::Languages=none)
    apt-get "${apt[@]}" update
    package=$(apt-cache "${apt[@]}" depends linux-image-cloud-amd64 | awk '$1 == "Depends:" { print $2; exit }')
    apt-get "${apt[@]}" download "$package"
    dpkg-deb -x ./*.deb root
    mv root/boot/vmlinuz-* kernel
    # Newer packages have them in usr/lib, and packed.
    path=$(find root -type d -path '*lib/modules/*' -prune -print -quit)
    find "$path" -name '*.ko.xz' -exec unxz {} +
    mkdir -p tree/lib/modules modules
    mv "$path" tree/lib/modules/
    module=$(ls tree/lib/modules)
    PATH=$PATH:/usr/sbin:/sbin depmod -b tree "$module"
    for modules in "${VM_MODULES[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin modprobe -S "$module" -d tree --show-depends "$modules" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >order
    while read -r file; do
        cp "$file" modules/
        basename "$file"
    done <order >modules/order
    rm -rf apt root tree order ./*.deb
    [[ -s modules/order ]]
}

kernel_path() { tool_path "kernel-$1"; }

# need_kernel VERSION: the directory $(kernel_path VERSION) has `kernel` and `modules/`, with their order in `modules/order`.
need_kernel() {
    [[ -d $(kernel_path "$1") ]] || need_packages kmod xz-utils debian-archive-keyring ca-certificates
    build_tool "kernel-$1" make_kernel "$1"
}
