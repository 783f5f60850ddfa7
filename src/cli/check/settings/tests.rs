use super::super::Status;
use super::super::client::Plugin;
use super::*;

struct Dir(tempfile::TempDir);

impl Dir {
    fn new(files: &[(&str, &str)]) -> Dir {
        let dir = Dir(tempfile::tempdir().unwrap());
        for (name, text) in files {
            let path = dir.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self) -> Settings {
        read(&self.path("config.toml")).unwrap()
    }
}

fn expected() -> Expected<'static> {
    Expected {
        root: Path::new("/var/lib/speedy"),
        address: Path::new("/run/speedy/speedy.sock"),
        hits: false,
        registry: None,
    }
}

fn one<'a>(findings: &'a [Finding], title: &str) -> &'a Finding {
    findings
        .iter()
        .find(|finding| finding.title == title)
        .unwrap_or_else(|| panic!("no {title}: {findings:?}"))
}

/// The section of our own making, and what a containerd says that runs with it.
fn running(with_us: bool) -> Answer {
    let exports = [
        ("root", "/var/lib/speedy"),
        ("address", "/run/speedy/speedy.sock"),
        ("enable_remote_snapshot_annotations", "true"),
    ];
    let plugin = Plugin {
        kind: "io.containerd.snapshotter.v1".into(),
        id: if with_us { NAME.into() } else { "overlayfs".into() },
        exports: exports.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        capabilities: vec!["remap-ids".into()],
        init_error: None,
    };
    Answer { version: "v2.4.2".into(), revision: String::new(), pid: None, plugins: Ok(vec![plugin]) }
}

#[test]
fn imports_are_followed_once_and_laid_over() {
    let dir = Dir::new(&[
        (
            "config.toml",
            "version = 3\nimports = ['conf.d/*.toml', 'more.toml']\ndisabled_plugins = ['a']\n\
             [proxy_plugins.speedy]\ntype = 'snapshot'\naddress = '/old'\n\
             [plugins.x]\na = 1\nlist = [1]\n[plugins.x.deep]\nb = 1\n",
        ),
        ("conf.d/b.toml", "imports = ['../config.toml']\n[plugins.x]\na = 3\n"),
        ("conf.d/a.toml", "[plugins.x]\na = 2\nlist = [2]\n[plugins.x.deep]\nc = 2\n"),
        ("conf.d/skipped.txt", "not toml"),
        ("more.toml", "disabled_plugins = ['a', 'b']\n[proxy_plugins.speedy]\ntype = 'snapshot'\n"),
    ]);
    let settings = dir.read();
    let names: Vec<_> =
        settings.files.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["config.toml", "a.toml", "b.toml", "more.toml"]);
    let x = settings.plugin("x").unwrap();
    assert_eq!((&x["a"], &x["list"]), (&serde_json::json!(3), &serde_json::json!([2])));
    assert_eq!(x["deep"], serde_json::json!({ "b": 1, "c": 2 }));
    assert_eq!(settings.merged["disabled_plugins"], serde_json::json!(["a", "b"]));
}

#[test]
fn an_entry_is_replaced_whole() {
    let dir = Dir::new(&[
        (
            "config.toml",
            "version = 3\nimports = ['over.toml']\n[proxy_plugins.speedy]\ntype = 'snapshot'\naddress = '/old'\n\
             [proxy_plugins.other]\ntype = 'content'\n",
        ),
        ("over.toml", "[proxy_plugins.speedy]\ntype = 'snapshot'\ncapabilities = ['rebase']\n"),
    ]);
    let settings = dir.read();
    let entry = entry(settings.entry().unwrap());
    assert_eq!(entry, Entry { capabilities: vec!["rebase".into()], ..Entry::default() });
    assert!(settings.merged["proxy_plugins"].get("other").is_some());
}

#[test]
fn circles_and_crowds_end() {
    let dir = Dir::new(&[("config.toml", "version = 3\n")]);
    let me = dir.path("config.toml").display().to_string();
    fs::write(&me, format!("version = 3\nimports = ['{me}']\n")).unwrap();
    assert_eq!(dir.read().files.len(), 1);
    for number in 0..MAX_FILES {
        fs::create_dir_all(dir.path("many")).unwrap();
        fs::write(dir.path(&format!("many/{number}.toml")), "").unwrap();
    }
    fs::write(&me, "imports = ['many/*']\n").unwrap();
    assert!(matches!(read(Path::new(&me)), Err(SettingsError::TooMany)));
}

#[test]
fn what_cannot_be_read_is_told_apart() {
    let dir = Dir::new(&[("broken.toml", "a = = 1"), ("dangling.toml", "imports = ['gone.toml']")]);
    assert!(matches!(read(&dir.path("config.toml")), Err(SettingsError::Absent(_))));
    assert!(matches!(read(&dir.path("broken.toml")), Err(SettingsError::Syntax { .. })));
    assert!(matches!(read(&dir.path("dangling.toml")), Err(SettingsError::Read { .. })));
    let judge = |name: &str| probe(None, Some(&dir.path(name)), &expected()).remove(0).status;
    assert_eq!(judge("config.toml"), Status::Skipped);
    assert_eq!(judge("dangling.toml"), Status::Skipped);
    assert_eq!(judge("broken.toml"), Status::Failure);
}

#[test]
fn patterns_match_names() {
    for (pattern, name, expected) in [
        ("*.toml", "a.toml", true),
        ("*.toml", "a.toml.bak", false),
        ("*", "", true),
        ("a*b*c", "aXbYc", true),
        ("a*b*c", "aXcYb", false),
        ("?.toml", "ab.toml", false),
        ("a**", "a", true),
        ("", "a", false),
    ] {
        assert_eq!(glob(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
    }
}

#[test]
fn the_command_line_names_the_file() {
    let of = |words: &[&str]| file_of_command(words.join("\0").as_bytes());
    assert_eq!(of(&["containerd", "--config", "/a.toml"]), Some("/a.toml".into()));
    assert_eq!(of(&["containerd", "-c=/a.toml", "-l", "debug"]), Some("/a.toml".into()));
    assert_eq!(of(&["containerd", "--config", "a.toml"]), None, "relative to a directory we do not know");
    assert_eq!(of(&["containerd", "--config"]), None);
    assert_eq!(of(&["containerd"]), None);
}

#[test]
fn versions_are_told() {
    let judge = |text: &str| files(&Dir::new(&[("config.toml", text)]).read()).status;
    assert_eq!(judge("version = 2"), Status::Ok);
    assert_eq!(judge("version = 4"), Status::Ok);
    assert_eq!(judge(""), Status::Warning);
    assert_eq!(judge("version = 5"), Status::Warning);
}

#[test]
fn the_section_is_compared_with_the_running_containerd() {
    let ours = format!("version = 3\n{}\n", expected().section());
    let judge = |text: &str, answer: Option<&Answer>| {
        section(&Dir::new(&[("config.toml", text)]).read(), answer, &expected())
    };
    let status = |findings: &[Finding]| one(findings, "section of speedy").status;

    let same = judge(&ours, Some(&running(true)));
    assert_eq!((status(&same), same.len()), (Status::Ok, 1), "{same:?}");
    let unknown = judge(&ours, None);
    assert!(unknown.iter().all(|finding| finding.status == Status::Ok), "{unknown:?}");
    assert_eq!(unknown.len(), 6);

    let not_restarted = judge(&ours, Some(&running(false)));
    assert_eq!(status(&not_restarted), Status::Failure);
    assert_eq!(not_restarted[0].fix.as_deref(), Some("systemctl restart containerd"));

    let changed = judge(&ours.replace("/var/lib/speedy", "/elsewhere"), Some(&running(true)));
    assert_eq!(status(&changed), Status::Warning);
    assert_eq!(one(&changed, "exports.root").status, Status::Failure);

    assert_eq!(status(&judge("version = 3", None)), Status::Failure);
    assert_eq!(status(&judge("version = 3", Some(&running(true)))), Status::Warning);
    let wrong_type = judge(&ours.replace("\"snapshot\"", "\"snapshotter\""), None);
    assert_eq!(status(&wrong_type), Status::Failure);
}

#[test]
fn everything_is_judged_together() {
    let text = format!(
        "version = 3\n{}\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'speedy'\n",
        expected().section()
    );
    let dir = Dir::new(&[("config.toml", &text)]);
    let findings = probe(None, Some(&dir.path("config.toml")), &expected());
    let failed: Vec<_> = findings.iter().filter(|finding| finding.status != Status::Ok).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!((failed[0].title, failed[0].status), ("unpack_config", Status::Failure));
    // What is told to be added makes it right.
    fs::write(dir.path("config.toml"), format!("{text}\n{}\n", failed[0].fix.as_ref().unwrap())).unwrap();
    let findings = probe(None, Some(&dir.path("config.toml")), &expected());
    assert!(findings.iter().all(|finding| finding.status == Status::Ok), "{findings:?}");
}
