# Images made from real packages, for the benchmarks and the long tests. Sourced after common.sh and tools.sh, as root.
# shellcheck shell=bash
#
# A layer is made by a function step_NAME, which changes the root directory it is given; the layer is what changed, as an
# overlay's upper directory. Layers and images (OCI layouts) live in $SPEEDY_IMAGES under names that hold the hash of the
# recipe: their steps' text and parameters, and those of the layers below. A second run makes nothing.
#
#   python        Debian, python3, flask + requests + pandas with their bytecode, a program: four layers
#   node          Debian, Node.js, an application of express, lodash, axios, rxjs, TypeScript and webpack: four layers, 25,000 small files
#   big           the same as python with TensorFlow: more than 1 GB
#   small-files   Debian and 50,000 files of the Linux source: two layers
#   family        six images like `python`, each with a newer pandas; only Debian's layer is shared, all above is made anew
#
# Every program prints "ready" when it has loaded what it needs, and ends.

SPEEDY_IMAGES=${SPEEDY_IMAGES:-${XDG_CACHE_HOME:-$HOME/.cache}/speedy/images}
IMAGES_DEBIAN=bookworm
IMAGES_PYTHON=3.11 # that release's
FAMILY_PANDAS=(2.2.0 2.2.1 2.2.2 2.2.3 2.3.0 2.3.1)
SMALL_FILES=50000

# image_names [NAME...]: the images that a name stands for; all of them without a name.
image_names() {
    local name
    for name in "${@:-all}"; do
        case $name in
            all) image_names python node big small-files family ;;
            family) printf 'family-%s\n' "${!FAMILY_PANDAS[@]}" ;;
            python | node | big | small-files | family-[0-9]) printf '%s\n' "$name" ;;
            *) die "there is no image $name; there are: python, node, big, small-files, family" ;;
        esac
    done
}

# --- steps: ROOT [PARAMETER...] -------------------------------------------------------------------------------------

step_debian() {
    local suite=$2
    debootstrap --variant=minbase "$suite" "$1"
    chroot "$1" apt-get clean
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/cache/ldconfig/aux-cache
}

# The second parameter only makes it another recipe: the same packages, installed again.
step_python() {
    in_root "$1" apt-get -qq update
    in_root "$1" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends python3 ca-certificates
    in_root "$1" apt-get clean
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/var/cache/ldconfig/aux-cache
}

step_wheels() {
    local root=$1 python=$2 machine
    shift 2
    machine=$(uname -m)
    "$PIP" install --quiet --no-compile --only-binary=:all: --python-version "$python" --implementation cp \
        --platform "manylinux2014_$machine" --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" \
        --target "$root/usr/local/lib/python$python/dist-packages" "$@"
    in_root "$root" python3 -m compileall -q "/usr/local/lib/python$python/dist-packages"
}

step_node() {
    in_root "$1" apt-get -qq update
    in_root "$1" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends nodejs ca-certificates
    in_root "$1" apt-get clean
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/var/cache/ldconfig/aux-cache
}

# By this machine's npm, and without scripts of the packages.
step_modules() {
    local root=$1
    shift
    mkdir -p "$root/app"
    (cd "$root/app" && npm install --no-audit --no-fund --no-update-notifier --ignore-scripts --cache "$root/../npm" "$@")
    rm -rf "$root/../npm"
}

step_script() {
    mkdir -p "$1/app"
    printf '%s\n' "$2" >"$1/app/main.js"
}

# The second parameter is the program, the third what makes two of them differ.
step_program() {
    mkdir -p "$1/app"
    printf '%s\n# %s\n' "$2" "${3:-}" >"$1/app/main.py"
    in_root "$1" python3 -m compileall -q /app
}

step_linux_source() {
    local root=$1 wanted=$2
    (
        set -e
        mkdir -p "$root/tmp/deb" "$root/usr/src/linux"
        cd "$root/tmp/deb"
        apt-get -qq -o APT::Sandbox::User=root download "$(apt-cache depends linux-source | awk '$1 == "Depends:" { print $2; exit }')"
        dpkg-deb -x ./*.deb .
        # GPU register headers are few and huge: they would make it another image of large files.
        tar -tf usr/src/linux-source-*.tar.xz | grep -v -e '/$' -e 'drivers/gpu/drm/amd/include' >all
        [[ $(wc -l <all) -ge $wanted ]] || { echo "only $(wc -l <all) files in the source"; exit 1; }
        head -n "$wanted" all >files
        tar -C "$root/usr/src/linux" --strip-components=1 -T files -xf usr/src/linux-source-*.tar.xz
    )
    rm -rf "$root/tmp/deb"
}

# in_root ROOT COMMAND...: with the name resolution of this machine, and nothing of its environment.
in_root() {
    local root=$1
    shift
    mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
    mountpoint -q "$root/etc/resolv.conf" || { touch "$root/etc/resolv.conf"; mount --bind "$(realpath /etc/resolv.conf)" "$root/etc/resolv.conf"; }
    env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} chroot "$root" "$@"
}

# --- recipes --------------------------------------------------------------------------------------------------------

READY_PYTHON='import flask, requests, pandas
print("ready", flush=True)'
READY_TENSORFLOW='import tensorflow
print("ready", flush=True)'
READY_NODE='for (const name of ["express", "lodash", "axios", "rxjs", "typescript", "webpack"]) require(name);
console.log("ready");
process.exit(0);'
RUN_PYTHON='["/usr/bin/python3", "/app/main.py"]'

# image_recipe NAME: sets RECIPE_STEPS, one "STEP PARAMETER..." quoted for `eval` each, from the bottom, and RECIPE_COMMAND.
image_recipe() {
    local anew='' pandas=2.2.3
    RECIPE_STEPS=("debian $IMAGES_DEBIAN")
    RECIPE_COMMAND=$RUN_PYTHON
    case $1 in
        python) ;;
        family-*) anew=$1 pandas=${FAMILY_PANDAS[${1#family-}]} ;;
        big)
            RECIPE_STEPS+=("python ''" "wheels $IMAGES_PYTHON tensorflow-cpu==2.18.0 numpy==1.26.4 pandas==2.2.3 scipy==1.14.1"
                "program $(printf %q "$READY_TENSORFLOW")")
            return ;;
        node)
            RECIPE_STEPS+=("node ''" "modules express@4.21.2 lodash@4.17.21 axios@1.7.9 rxjs@7.8.1 typescript@5.7.3 webpack@5.97.1 @mui/icons-material@6.4.1"
                "script $(printf %q "$READY_NODE")")
            RECIPE_COMMAND='["/usr/bin/node", "/app/main.js"]'
            return ;;
        small-files)
            RECIPE_STEPS+=("linux_source $SMALL_FILES")
            RECIPE_COMMAND='["/bin/sh", "-c", "test -e /usr/src/linux/CREDITS && echo ready"]'
            return ;;
    esac
    RECIPE_STEPS+=("python '$anew'" "wheels $IMAGES_PYTHON flask==3.1.0 requests==2.32.3 numpy==1.26.4 pandas==$pandas"
        "program $(printf %q "$READY_PYTHON") '$anew'")
}

# recipe_keys: sets RECIPE_KEYS, the name of each step's layer: a hash of all that leads to it.
recipe_keys() {
    local line below=''
    RECIPE_KEYS=()
    for line in "${RECIPE_STEPS[@]}"; do
        below=$(printf '%s\n' "$below" "$line" "$(declare -f "step_${line%% *}")" | sha256sum | cut -c1-16)
        RECIPE_KEYS+=("$below")
    done
}

# --- making ---------------------------------------------------------------------------------------------------------

make_images_pip() {
    python3 -m venv "$1"
    # The launchers of a venv name the path where it was made.
    # shellcheck disable=SC2016
    printf '#!/bin/sh\nexec "$(dirname "$0")/bin/python3" -m pip --disable-pip-version-check "$@"\n' >"$1/pip"
    chmod 755 "$1/pip"
}

need_images() {
    command -v npm >/dev/null || need_packages npm
    need_packages debootstrap python3 python3-venv ca-certificates xz-utils gzip tar debian-archive-keyring
    build_tool images-pip-1 make_images_pip
    PIP=$(tool_path images-pip-1)/pip
}

# make_layer N: the layer of RECIPE_KEYS[N], unless it is there. In a mount namespace of its own, so that no mount is left
# whatever happens.
make_layer() {
    local key=${RECIPE_KEYS[$1]} work start
    [[ -d $SPEEDY_IMAGES/layers/$key ]] && return 0
    mkdir -p "$SPEEDY_IMAGES/layers"
    work=$(mktemp -d "$SPEEDY_IMAGES/.making.XXXXXX")
    start=$(now_ms)
    if ! (
        export REPO SPEEDY_IMAGES PIP
        LINE=${RECIPE_STEPS[$1]} BELOW=${RECIPE_KEYS[*]:0:$1} WORK=$work unshare -m --propagation private \
            bash -c 'set -euo pipefail; . "$REPO/contrib/lib/common.sh"; . "$REPO/contrib/lib/tools.sh"; . "$REPO/contrib/lib/images.sh"; make_layer_inside'
    ) >"$work/log" 2>&1 </dev/null; then
        tail -n 20 "$work/log" >&2
        rm -rf --one-file-system "$work"
        die "could not make a layer: ${RECIPE_STEPS[$1]}"
    fi
    mv -T "$work/out" "$SPEEDY_IMAGES/layers/$key" 2>/dev/null || true
    rm -rf --one-file-system "$work"
    note "layer ${RECIPE_STEPS[$1]%%$'\n'*}: $(layer_size "$key"), $(seconds_since "$start") s" >&2
}

# Runs in make_layer's namespace.
make_layer_inside() {
    local lowers='' key n=0
    mkdir -p "$WORK"/{lower,upper,overlay,root,out}
    for key in $BELOW; do
        mkdir "$WORK/lower/$n"
        python3 "$REPO/contrib/lib/oci.py" unpack "$SPEEDY_IMAGES/layers/$key" "$WORK/lower/$n"
        lowers=$WORK/lower/$n${lowers:+:$lowers}
        n=$((n + 1))
    done
    if [[ -n $lowers ]]; then
        mount -t overlay overlay -o "lowerdir=$lowers,upperdir=$WORK/upper,workdir=$WORK/overlay,metacopy=off,redirect_dir=off" "$WORK/root"
    else
        mount --bind "$WORK/upper" "$WORK/root"
    fi
    eval "step_${LINE%% *} \"\$WORK/root\" ${LINE#* }"
    umount -R "$WORK/root"
    python3 "$REPO/contrib/lib/oci.py" layer "$WORK/upper" "$WORK/out"
}

layer_size() {
    python3 -c 'import json, sys
f = json.load(open(sys.argv[1]))
print("%d entries, %.1f MB, %.1f MB as gzip" % (f["entries"], f["plain"] / 1e6, f["size"] / 1e6))' "$SPEEDY_IMAGES/layers/$1/layer.json"
}

# make_image NAME: sets $LAYOUT, the directory of its OCI layout.
make_image() {
    local n key work
    image_recipe "$1"
    recipe_keys
    key=$(printf '%s\n' "${RECIPE_KEYS[@]}" "$RECIPE_COMMAND" | sha256sum | cut -c1-16)
    LAYOUT=$SPEEDY_IMAGES/$1-$key
    [[ -d $LAYOUT ]] && return 0
    for n in "${!RECIPE_KEYS[@]}"; do make_layer "$n"; done
    work=$(mktemp -d "$SPEEDY_IMAGES/.making.XXXXXX")
    python3 "$REPO/contrib/lib/oci.py" layout "$work/layout" "$RECIPE_COMMAND" "${RECIPE_KEYS[@]/#/$SPEEDY_IMAGES/layers/}"
    mv -T "$work/layout" "$LAYOUT" 2>/dev/null || true
    rm -rf "$work"
}

# push_image NAME: to $REGISTRY, as NAME:1.
push_image() {
    make_image "$1"
    python3 "$REPO/contrib/lib/oci.py" push "$LAYOUT" "$REGISTRY" "$1"
}

# image_sizes NAME: "LAYERS PLAIN-BYTES GZIP-BYTES"
image_sizes() {
    make_image "$1"
    python3 "$REPO/contrib/lib/oci.py" size "$LAYOUT"
}

# manifest_file: of the image that make_image made last.
manifest_file() { printf '%s/blobs/sha256/%s' "$LAYOUT" "$(jq -r '.manifests[0].digest' "$LAYOUT/index.json" | cut -d: -f2)"; }
