//! The command line as a user meets it: the real binary.

use std::process::{Command, Output};

fn speedy(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
    command.args(args).env_clear().output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const VERBS: [&str; 15] = [
    "serve",
    "keeper",
    "check",
    "publish",
    "fetch",
    "gc",
    "images",
    "fsck",
    "trust",
    "config",
    "status",
    "layers",
    "explain",
    "completion",
    "man",
];

#[test]
fn help_names_every_verb() {
    let help = String::from_utf8(speedy(&["--help"]).stdout).unwrap();
    for verb in VERBS {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is not in\n{help}");
    }
}

#[test]
fn the_keepers_help_teaches() {
    let help = String::from_utf8(speedy(&["keeper", "--help"]).stdout).unwrap();
    for text in
        ["--socket <SOCKET>", "--dead-man <SECONDS>", "default: 100", "speedy-keeper.service", "SIGUSR2"]
    {
        assert!(help.contains(text), "{text} is not in\n{help}");
    }
    assert!(!help.contains("--adopt"), "{help}");
    let wrong = speedy(&["keeper", "--dead-man", "0"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", stderr(&wrong));
}

#[test]
fn completion_and_manual_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let output = speedy(&["completion", shell]);
        assert!(output.status.success(), "{shell}: {output:?}");
        let script = String::from_utf8(output.stdout).unwrap();
        for word in VERBS.iter().chain(&["from-registry", "ignore-damage", "hosts"]) {
            assert!(script.contains(word), "{shell} completes no {word}");
        }
    }
    let page = String::from_utf8(speedy(&["man"]).stdout).unwrap();
    assert!(page.starts_with(".ie") || page.contains(".TH speedy"), "{page}");
    assert!(page.contains("speedy config hosts") && page.contains("plain\\-http"), "the verbs below verbs");
    for verb in VERBS {
        assert!(page.contains(&format!("speedy {verb}")), "the manual has no {verb}");
    }
    assert!(page.contains("from\\-registry") && page.contains("ignore\\-damage"), "{page}");
}

#[test]
fn a_configuration_mistake_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("speedy.toml");
    std::fs::write(&file, "rooot = \"/x\"\n").unwrap();
    let output = speedy(&["config", "--config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.contains("rooot") && message.contains("did you mean \"root\""), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

#[test]
fn hosts_need_an_address_and_a_registry() {
    let hosts = |args: &[&str]| speedy(&[&["config", "hosts"], args].concat());
    let none = hosts(&["docker.io"]);
    assert!(stderr(&none).contains("registry = \"127.0.0.1:5051\""), "{}", stderr(&none));
    let wrong = hosts(&["--registry", "127.0.0.1:5051", "https://docker.io"]);
    assert!(stderr(&wrong).contains("expected a host"), "{}", stderr(&wrong));
    let good = hosts(&["--registry", "127.0.0.1:5051", "docker.io"]);
    let text = String::from_utf8(good.stdout).unwrap();
    assert!(text.starts_with("# /etc/containerd/certs.d/docker.io/hosts.toml\n"), "{text}");
    assert!(text.contains("\nserver = \"http://127.0.0.1:5051\"\n"), "{text}");
    let json = hosts(&["--registry", "127.0.0.1:5051", "docker.io", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["path"], "/etc/containerd/certs.d/docker.io/hosts.toml");
    // The verb above it is as it was.
    let config = String::from_utf8(speedy(&["config", "--registry", "[::1]:5051"]).stdout).unwrap();
    assert!(config.contains("\nregistry") && config.contains("\"[::1]:5051\""), "{config}");
}

#[test]
fn a_root_that_holds_something_else_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("snapshots/1/fs")).unwrap();
    let address = dir.path().join("s.sock");
    let serve = ["serve", "--root", root.to_str().unwrap(), "--address", address.to_str().unwrap()];
    let output = speedy(&serve);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nothing was touched"), "{}", stderr(&output));
    let left: Vec<_> = std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["snapshots"]);

    std::fs::write(root.join("metadata.db"), vec![0; 32768]).unwrap();
    let output = speedy(&serve);
    assert!(stderr(&output).contains("not a metadata file of Speedy"), "{}", stderr(&output));
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 2);
}

/// Two minutes went by in silence.
#[test]
fn a_store_that_does_not_answer_is_told_soon() {
    let dir = tempfile::tempdir().unwrap();
    for (verb, code) in [("fsck", 2), ("images", 1), ("gc", 1)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_speedy"));
        command
            .args([verb, "--store", "s3://bucket/prefix", "--containerd", "/nonexistent", "--root"])
            .arg(dir.path());
        command.env_clear().env("AWS_ENDPOINT_URL", "http://127.0.0.1:1").env("AWS_ALLOW_HTTP", "true");
        command
            .env("AWS_ACCESS_KEY_ID", "x")
            .env("AWS_SECRET_ACCESS_KEY", "y")
            .env("AWS_REGION", "us-east-1");
        let began = std::time::Instant::now();
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{verb}: {output:?}");
        assert!(stderr(&output).contains("store is not reachable"), "{output:?}");
        assert!(began.elapsed().as_secs() < 30, "{verb}: {:?}", began.elapsed());
    }
}

/// A store whose file system was not mounted was clean, and had no images.
#[test]
fn a_store_that_is_not_there_is_not_called_sound() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("store");
    let (store, root) = (format!("file://{}", top.display()), dir.path().join("root"));
    let ask = |verb: &str| {
        let flags = ["--root", root.to_str().unwrap(), "--containerd", "/nonexistent", "--store", &store];
        speedy(&[&[verb], &flags[..]].concat())
    };
    for (verb, code) in [("fsck", 2), ("images", 1), ("gc", 1)] {
        let output = ask(verb);
        assert_eq!(output.status.code(), Some(code), "{verb}: {output:?}");
        assert!(stderr(&output).contains(&format!("there is nothing at {store}")), "{output:?}");
    }
    // Its description is lost, and something is left.
    let hash = "ab".repeat(32);
    std::fs::create_dir_all(top.join("refs/ab").join(&hash)).unwrap();
    std::fs::write(top.join("refs/ab").join(hash).join("0123456789abcdef"), "no ref").unwrap();
    let output = ask("fsck");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
