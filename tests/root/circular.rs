//! Neither daemon nor keeper runs from what the daemon serves, or keeps anything there.

use std::fs;
use std::path::Path;
use std::process::Command;

use speedy::layer::attach::{Attacher, Mode};
use speedy::sys::mount::{self, Unmount};

use crate::maker::{Maker, Node};
use crate::process::require_root;

const SPEEDY: &str = env!("CARGO_BIN_EXE_speedy");

/// The exit code and what was said.
fn refused(program: &Path, arguments: &[&Path]) -> (i32, String) {
    let output = Command::new(program).env_clear().args(arguments).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn who_would_wait_for_himself_does_not_start() {
    require_root();
    let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["l", "upper", "work", "merged"] {
        fs::create_dir(at(name)).unwrap();
    }
    Maker::new().with("etc", Node::dir()).make().write(&at("a.erofs"));
    let attacher = Attacher::open(dir.path(), Mode::Loop).unwrap();
    attacher.attach(&at("a.erofs"), &attacher.point(7)).unwrap();
    let options = ["lowerdir", "upperdir", "workdir"]
        .iter()
        .zip(["l/7/fs", "upper", "work"])
        .map(|(option, name)| format!("{option}={}", at(name).display()));
    let options = options.collect::<Vec<_>>().join(",");
    let mount =
        Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(at("merged")).status();
    assert!(mount.unwrap().success());
    fs::copy(SPEEDY, at("merged/speedy")).unwrap();

    let [serve, keeper, root, address, socket] =
        ["serve", "keeper", "--root", "--address", "--socket"].map(Path::new);
    let (container, own) = (at("merged/speedy"), Path::new(SPEEDY).to_owned());
    // The keeper's socket is beside the daemon's.
    let daemon = |program: &Path, store: &str, listens: &str| {
        refused(program, &[serve, root, &at(store), address, &at(listens)])
    };
    let cases = [
        (1, "the program", daemon(&container, "r", "s.sock")),
        (1, "the root", daemon(&own, "merged/r", "s.sock")),
        (1, "the root", daemon(&own, "l/7/r", "s.sock")),
        (1, "the keeper's socket", daemon(&own, "r", "merged/s.sock")),
        (78, "the program", refused(&container, &[keeper, socket, &at("k.sock")])),
        (78, "the keeper's socket", refused(&own, &[keeper, socket, &at("merged/k.sock")])),
    ];
    for made in ["r", "merged/r", "s.sock", "merged/s.sock", "k.sock", "merged/k.sock"] {
        assert!(!at(made).exists(), "{made}");
    }
    mount::unmount(&at("merged"), Unmount::FromSight).unwrap();
    attacher.detach(&attacher.point(7)).unwrap();
    for (code, what, (found, said)) in cases {
        assert!(
            found == code && said.contains(what) && said.contains("lies on layers"),
            "{what}: {found}: {said}"
        );
    }
}
