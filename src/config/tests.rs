use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::key::KEYS;
use super::*;

const EXAMPLE: &str = include_str!("../../config/speedy.toml");

/// A directory with a configuration file, and no way to see the machine's own.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new(text: &str) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("speedy.toml"), text).unwrap();
        Fixture { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("speedy.toml")
    }

    fn flags(&self) -> Flags {
        Flags { config: Some(self.path()), ..Flags::default() }
    }

    fn load(&self) -> Result<Effective, ConfigError> {
        load(&self.flags(), std::iter::empty())
    }
}

fn with_variables(variables: &[(&str, &str)]) -> Result<Effective, ConfigError> {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load_with_default(&Flags::default(), variables, Path::new("/nonexistent/speedy.toml"))
}

fn message(text: &str) -> String {
    Fixture::new(text).load().expect_err(text).to_string()
}

#[test]
fn the_documented_file_says_the_defaults_and_mentions_every_key() {
    let loaded = Fixture::new(EXAMPLE).load().unwrap();
    assert_eq!(loaded.config, Config::default());
    for key in KEYS {
        let source = loaded.sources.get(key.name);
        assert!(matches!(source, Some(Source::File(_))), "config/speedy.toml does not set {}", key.name);
    }
    assert_eq!(loaded.sources.len(), KEYS.len());
    assert!(EXAMPLE.is_ascii());
}

#[test]
fn every_key_is_a_field_and_every_field_a_key() {
    fn dotted(prefix: &str, value: &serde_json::Value, out: &mut Vec<String>) {
        match value.as_object() {
            Some(map) => map.iter().for_each(|(name, inner)| dotted(&format!("{prefix}.{name}"), inner, out)),
            None => out.push(prefix.trim_start_matches('.').to_owned()),
        }
    }
    let mut fields = Vec::new();
    dotted("", &serde_json::to_value(Config::default()).unwrap(), &mut fields);
    let mut keys: Vec<String> = KEYS.iter().map(|key| key.name.to_owned()).collect();
    fields.sort();
    keys.sort();
    assert_eq!(fields, keys);
}

#[test]
fn nothing_given_means_the_defaults() {
    let loaded = with_variables(&[("HOME", "/root"), ("SPEEDYISH", "x")]).unwrap();
    assert_eq!(loaded, Effective::defaults());
    assert!(loaded.sources.values().all(|source| *source == Source::Default));
    assert_eq!(Fixture::new("").load().unwrap(), Effective::defaults());
}

#[test]
fn later_layers_win_and_say_so() {
    let fixture = Fixture::new(
        "root = '/f/root'\naddress = '/f/sock'\ncontainerd = '/f/c'\n[log]\nlevel = 'error'\nformat = 'json'\n",
    );
    let flags = Flags {
        root: Some("/flag/root".into()),
        log_level: Some("trace".into()),
        store: Some("memory:/flag/layers.json".into()),
        metrics: Some("127.0.0.1:9890".into()),
        registry: Some("[::1]:5051".into()),
        ..fixture.flags()
    };
    let variables =
        [("SPEEDY_ROOT", "/env/root"), ("SPEEDY_ADDRESS", "/env/sock"), ("SPEEDY_STORE", "memory:/e")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let loaded = load(&flags, variables.into_iter()).unwrap();
    let config = &loaded.config;
    assert_eq!(config.root, Path::new("/flag/root"));
    assert_eq!(config.address, Path::new("/env/sock"));
    assert_eq!(config.containerd, Path::new("/f/c"));
    assert_eq!(config.log.level, LogLevel::Trace);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.store.as_str(), "memory:/flag/layers.json");
    assert_eq!(config.metrics, Some("127.0.0.1:9890".parse().unwrap()));
    assert_eq!(config.registry, Some("[::1]:5051".parse().unwrap()));
    assert_eq!(config.cleanup.time_limit.duration(), std::time::Duration::from_secs(30));
    let source = |key: &str| loaded.sources.get(key).unwrap().clone();
    assert_eq!(source("root"), Source::Flag("--root".into()));
    assert_eq!(source("address"), Source::Env("SPEEDY_ADDRESS".into()));
    assert_eq!(source("containerd"), Source::File(fixture.path()));
    assert_eq!(source("log.level"), Source::Flag("--log-level".into()));
    assert_eq!(source("store"), Source::Flag("--store".into()));
    assert_eq!(source("driver"), Source::Default);
}

#[test]
fn every_key_has_a_variable() {
    let loaded = with_variables(&[
        ("SPEEDY_ROOT", "/a//b/"),
        ("SPEEDY_ADDRESS", "/a/s"),
        ("SPEEDY_KEEPER", "/a/k"),
        ("SPEEDY_CONTAINERD", "/a/c"),
        ("SPEEDY_DRIVER", "overlayfs"),
        ("SPEEDY_STORE", ""),
        ("SPEEDY_PIN", "*/pause:*,r.example/*"),
        ("SPEEDY_METRICS", "localhost:1"),
        ("SPEEDY_REGISTRY", "127.0.0.1:5051"),
        ("SPEEDY_LOG_LEVEL", "debug"),
        ("SPEEDY_LOG_FORMAT", "human"),
        ("SPEEDY_OVERLAYFS_MOUNT_OPTIONS", "volatile, metacopy=on"),
        ("SPEEDY_OVERLAYFS_UPPERDIR_LABEL", "true"),
        ("SPEEDY_THIN_ROOT", "/a/thin"),
        ("SPEEDY_THIN_NAME", "blocks"),
        ("SPEEDY_THIN_FS", "xfs"),
        ("SPEEDY_THIN_SIZE", "20GiB"),
        ("SPEEDY_THIN_MOUNT_OPTIONS", ""),
        ("SPEEDY_THIN_DISCARD", "false"),
        ("SPEEDY_POOL_MODE", "direct"),
        ("SPEEDY_POOL_SIZE", "1TiB"),
        ("SPEEDY_POOL_DATA", "/dev/vdb"),
        ("SPEEDY_POOL_METADATA", "/dev/vdc"),
        ("SPEEDY_POOL_RESERVE", "5%"),
        ("SPEEDY_CLEANUP_TIME_LIMIT", "2m"),
        ("SPEEDY_LAYERS_SHARE", "node"),
        ("SPEEDY_LAYERS_BUDGET", "512MiB"),
        ("SPEEDY_LAYERS_KEEP_FREE", "5%"),
        ("SPEEDY_LAYERS_LIMIT", "40GiB"),
        ("SPEEDY_LIMITS_SIZE", "1TiB"),
        ("SPEEDY_LIMITS_ENTRIES", "5000"),
        ("SPEEDY_LIMITS_METADATA", "64MiB"),
        ("SPEEDY_FETCH_DEADLINE", "3s"),
        ("SPEEDY_FETCH_LAZY", "off"),
        ("SPEEDY_FETCH_TRACES", "off"),
        ("SPEEDY_FETCH_RATE", "12MiB"),
        ("SPEEDY_SCRUB_RATE", "0"),
        ("SPEEDY_SCRUB_EVERY", "24h"),
        ("SPEEDY_SCRUB_STORE", "20MiB"),
        ("SPEEDY_PUBLISH_POLICY", "off"),
        ("SPEEDY_GC_KEEP", "r.example/* age<14d newest=3"),
        ("SPEEDY_TRUST_MODE", "any"),
        ("SPEEDY_TRUST_KEYS", ""),
    ])
    .unwrap();
    assert!(loaded.sources.values().all(|source| matches!(source, Source::Env(_))));
    assert_eq!(loaded.config.root, Path::new("/a/b"));
    assert_eq!(loaded.config.overlayfs.mount_options, ["volatile", "metacopy=on"]);
    assert!(loaded.config.overlayfs.upperdir_label);
    assert_eq!(loaded.config.pin, ["*/pause:*", "r.example/*"]);
    assert_eq!(loaded.config.layers.share, LayerSharing::Node);
    assert_eq!(loaded.config.limits.entries, 5000);
    assert_eq!(loaded.config.layers.limit.to_string(), "40GiB");
    assert_eq!((loaded.config.scrub.rate.bytes(), loaded.config.scrub.every.to_string()), (0, "24h".into()));
    assert_eq!(loaded.config.scrub.store.to_string(), "20MiB");
    assert_eq!(loaded.config.fetch.rate.to_string(), "12MiB");
    assert_eq!(loaded.config.metrics.unwrap().to_string(), "127.0.0.1:1");
    assert_eq!(
        (loaded.config.thin.fs.as_str(), loaded.config.thin.size.to_string()),
        ("xfs", "20GiB".into())
    );
    assert_eq!(loaded.config.pool.metadata, Path::new("/dev/vdc"));
    let empty = with_variables(&[("SPEEDY_OVERLAYFS_MOUNT_OPTIONS", "")]).unwrap();
    assert!(empty.config.overlayfs.mount_options.is_empty());
}

#[test]
fn the_keeper_is_beside_the_daemon_unless_somebody_says_otherwise() {
    let keeper = |text: &str| Fixture::new(text).load().unwrap().config.keeper;
    for (text, path) in [
        ("", "/run/speedy/speedy-keeper.sock"),
        ("address = '/a/b.c.sock'", "/a/b.c-keeper.sock"),
        ("address = '/a/socket'", "/a/socket-keeper.sock"),
        ("address = '/a/b.sock'\nkeeper = ''", "/a/b-keeper.sock"),
        ("address = '/a/b.sock'\nkeeper = '/c/d'", "/c/d"),
    ] {
        assert_eq!(keeper(text), Path::new(path), "{text}");
    }
    let flags = Flags { keeper: Some("/f/k".into()), ..Flags::default() };
    let loaded = load_with_default(&flags, std::iter::empty(), Path::new("/nonexistent")).unwrap();
    assert_eq!(loaded.config.keeper, Path::new("/f/k"));
    assert_eq!(loaded.sources["keeper"], Source::Flag("--socket".into()));
}

#[test]
fn the_file_may_be_absent_unless_it_was_named() {
    let absent = Path::new("/nonexistent/speedy.toml");
    assert!(load_with_default(&Flags::default(), std::iter::empty(), absent).is_ok());
    let flags = Flags { config: Some(absent.into()), ..Flags::default() };
    let error = load(&flags, std::iter::empty()).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent/speedy.toml"));
    assert!(with_variables(&[("SPEEDY_CONFIG", "/nonexistent/speedy.toml")]).is_err());

    let fixture = Fixture::new("root = '/here'");
    let found = load_with_default(&Flags::default(), std::iter::empty(), &fixture.path()).unwrap();
    assert_eq!(found.config.root, Path::new("/here"));
    let named = with_variables(&[("SPEEDY_CONFIG", fixture.path().to_str().unwrap())]).unwrap();
    assert_eq!(named.config.root, Path::new("/here"));
}

#[test]
fn unknown_keys_name_file_line_key_and_the_nearest_one() {
    for (text, line, key, nearest) in [
        ("rooot = '/a'", 1, "rooot", "root"),
        ("adress = '/a'", 1, "adress", "address"),
        ("\n[overlay]\nmount_options = []", 2, "overlay.mount_options", "overlayfs.mount_options"),
        ("[log]\n\nlvl = 'x'", 3, "log.lvl", "log.level"),
        ("log-level = 'info'", 1, "log-level", "log.level"),
        ("upperdir_label = true", 1, "upperdir_label", "overlayfs.upperdir_label"),
        ("log = 'info'", 1, "log", "log.level"),
        ("root.path = '/a'", 1, "root", "root"),
        ("[cleanup]\ntime-limit = '1s'", 2, "cleanup.time-limit", "cleanup.time_limit"),
        ("[layers]\nshare = 'node'\nshared = 1", 3, "layers.shared", "layers.share"),
        ("[empty]", 1, "empty", ""),
    ] {
        let fixture = Fixture::new(text);
        let error = fixture.load().expect_err(text);
        if key == "root" {
            assert!(matches!(error, ConfigError::WrongType { found: "a table", .. }), "{error}");
            continue;
        }
        let ConfigError::UnknownKey { place, key: found, nearest: near } = &error else {
            panic!("{text}: {error}");
        };
        assert_eq!(*place, Place::File { path: fixture.path(), line }, "{text}");
        assert_eq!(found, key, "{text}");
        assert!(nearest.is_empty() || *near == nearest, "{text}: {near}");
        let shown = error.to_string();
        assert!(shown.contains(&format!("speedy.toml:{line}: unknown key {key:?}; did you mean")), "{shown}");
    }
}

#[test]
fn unknown_variables_name_the_nearest_one() {
    for (name, nearest) in [
        ("SPEEDY_ROOTS", "SPEEDY_ROOT"),
        ("SPEEDY_LOGLEVEL", "SPEEDY_LOG_LEVEL"),
        ("SPEEDY_CONFIG_FILE", "SPEEDY_CONFIG"),
        ("SPEEDY_", "SPEEDY_PIN"),
    ] {
        let effective = with_variables(&[(name, "x")]).expect(name);
        let said: Vec<String> = effective.unknown_variables.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 1);
        assert!(said[0].contains(name) && said[0].ends_with(&format!("did you mean {nearest}?")), "{said:?}");
        assert!(effective.sources.values().all(|source| *source == Source::Default));
    }
}

#[test]
fn wrong_types_say_what_is_accepted() {
    for (text, expected) in [
        ("root = 1", ":1: root is an integer; accepted: an absolute path"),
        ("root = true", ":1: root is a boolean; accepted"),
        ("root = ['/a']", ":1: root is an array; accepted"),
        ("[log]\nlevel = 1.5", ":2: log.level is a float; accepted: \"error\", \"warn\""),
        (
            "[overlayfs]\nmount_options = 'volatile'",
            ":2: overlayfs.mount_options is a string; accepted: a list",
        ),
        ("[overlayfs]\nmount_options = [1]", "is an array of other things than strings; accepted"),
        (
            "[overlayfs]\nupperdir_label = 'yes'",
            "overlayfs.upperdir_label is a string; accepted: true or false",
        ),
        ("[cleanup]\ntime_limit = 30", ":2: cleanup.time_limit is an integer; accepted: a time"),
        ("[limits]\nentries = '5000'", ":2: limits.entries is a string; accepted: a whole number"),
        ("[[log]]\nlevel = 'info'", ":1: unknown key \"log\""),
    ] {
        let shown = message(text);
        assert!(shown.contains(expected), "{text}: {shown}");
    }
    let error = with_variables(&[("SPEEDY_OVERLAYFS_UPPERDIR_LABEL", "yes")]).unwrap_err().to_string();
    assert!(error.starts_with("environment variable SPEEDY_OVERLAYFS_UPPERDIR_LABEL: "), "{error}");
}

#[test]
fn bad_values_say_why_and_what_is_accepted() {
    let long = format!("address = '/{}'", "a".repeat(107));
    let cases = [
        ("root = 'var/lib'", "is a relative path"),
        ("root = ''", "is empty"),
        ("root = '/'", "root directory of the system"),
        ("root = '/a/../b'", "\"..\""),
        ("root = '/a:b'", "meaning in mount options"),
        ("root = '/a,b'", "meaning in mount options"),
        ("root = \"/a\\u0000b\"", "control characters"),
        ("address = 'speedy.sock'", "is a relative path"),
        (long.as_str(), "the path is 108 bytes long"),
        ("keeper = 'keeper.sock'", "is a relative path"),
        ("driver = 'devicemapper'", "the driver is called \"thin\""),
        ("driver = 'btrfs'", "not a driver"),
        ("store = 's3://KEY:hush@host/b'", "\"s3://***@host/b\" holds credentials"),
        ("store = 'ftp://host/b'", "no store for \"ftp://host/b\""),
        ("metrics = '0.0.0.0:9890'", "other machines"),
        ("metrics = '10.0.0.1:9890'", "other machines"),
        ("metrics = '127.0.0.1'", "not an address with a port"),
        ("metrics = 'localhost:http'", "not an address with a port"),
        ("registry = '0.0.0.0:5051'", "other machines"),
        ("registry = ':5051'", "not an address with a port"),
        ("[log]\nlevel = 'loud'", "\"loud\" is none of them"),
        ("[log]\nformat = 'xml'", "\"xml\" is none of them"),
        ("[layers]\nshare = 'all'", "\"all\" is none of them"),
        ("[layers]\nbudget = '20GB'", "units are KiB, MiB, GiB and TiB"),
        ("[layers]\nkeep_free = '95%'", "0% to 90%"),
        ("[layers]\nlimit = '15MiB'", "out of range"),
        ("[fetch]\nrate = '63KiB'", "out of range"),
        ("[scrub]\nrate = '1KiB'", "out of range"),
        ("[scrub]\nstore = '1KiB'", "out of range"),
        ("[scrub]\nevery = '900ms'", "out of range"),
        ("[limits]\nsize = '1KiB'", "1KiB is out of range"),
        ("[limits]\nentries = 999", "999 is out of range"),
        ("[limits]\nentries = -1", "\"-1\" is not a whole number"),
        ("[limits]\nmetadata = '2GiB'", "2GiB is out of range"),
        ("[fetch]\ndeadline = '0s'", "out of range"),
        ("[publish]\npolicy = 'never'", "\"never\" is none of them"),
        ("[trust]\nmode = 'some'", "\"some\" is none of them"),
        ("[trust]\nkeys = ['ed25519:short']", "is not a public key"),
        ("[cleanup]\ntime_limit = 'soon'", "is not a time"),
        ("[cleanup]\ntime_limit = '30'", "has no unit"),
        ("[cleanup]\ntime_limit = '0s'", "out of range"),
        ("[cleanup]\ntime_limit = '2h'", "out of range"),
        ("[overlayfs]\nmount_options = ['']", "empty"),
        ("[overlayfs]\nmount_options = ['a,b']", "one option per item"),
        ("[overlayfs]\nmount_options = ['lowerdir=/a']", "sets itself"),
        ("[overlayfs]\nmount_options = ['upperdir=/a']", "sets itself"),
        ("[overlayfs]\nmount_options = ['workdir=/a']", "sets itself"),
        ("[overlayfs]\nmount_options = ['ro']", "sets itself"),
        ("[overlayfs]\nmount_options = ['X-containerd.a=b']", "sets itself"),
        ("[overlayfs]\nmount_options = ['index=on', 'index=off']", "given twice"),
    ];
    for (text, expected) in cases {
        let shown = message(text);
        assert!(shown.contains(expected) && shown.contains("; accepted: "), "{text}: {shown}");
        assert!(!shown.contains("hush"), "{shown}");
    }
}

#[test]
fn broken_files_name_the_line() {
    let shown = message("root = '/a'\nnot toml\n");
    assert!(shown.contains("speedy.toml:2: not valid TOML: "), "{shown}");
    assert!(!shown.contains('\n'), "{shown}");
    let shown = message("root = '/a'\nroot = '/b'\n");
    assert!(shown.contains("speedy.toml:2: not valid TOML: "), "{shown}");
    let fixture = Fixture::new("");
    fs::write(fixture.path(), b"root = '\xff'").unwrap();
    assert!(matches!(fixture.load(), Err(ConfigError::Read { .. })));
}

#[test]
fn paths_from_flags_must_be_text() {
    use std::os::unix::ffi::OsStrExt;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"/a\xff"));
    let flags = Flags { root: Some(path), ..Flags::default() };
    let error = load_with_default(&flags, std::iter::empty(), Path::new("/nonexistent")).unwrap_err();
    assert!(error.to_string().starts_with("flag --root: root: "), "{error}");
}

#[test]
fn the_effective_configuration_is_shown_and_can_be_used_again() {
    let fixture =
        Fixture::new("[overlayfs]\nmount_options = ['volatile', 'metacopy=on']\n[log]\nlevel = 'warn'");
    let flags = Flags { root: Some("/some \\where".into()), ..fixture.flags() };
    assert!(load(&flags, std::iter::empty()).is_err());
    let flags = Flags { root: Some("/some where".into()), ..fixture.flags() };
    let variables = [("SPEEDY_METRICS".to_owned(), "[::1]:9890".to_owned())];
    let loaded = load(&flags, variables.into_iter()).unwrap();
    let human = loaded.to_human();
    assert_eq!(human.lines().count(), KEYS.len());
    assert!(human.contains("= \"/some where\""), "{human}");
    assert!(human.contains("# --root\n") && human.contains("# SPEEDY_METRICS\n"), "{human}");
    assert!(human.contains(&format!("# {}\n", fixture.path().display())), "{human}");
    let columns: Vec<_> = human.lines().map(|line| (line.find('='), line.find('#'))).collect();
    assert!(columns.iter().all(|columns| *columns == columns_of(&human)), "{human}");
    assert_eq!(Fixture::new(&human).load().unwrap().config, loaded.config);

    let shown = loaded.to_json();
    assert_eq!(shown["config"]["root"], "/some where");
    assert_eq!(shown["config"]["metrics"], "[::1]:9890");
    assert_eq!(shown["config"]["overlayfs"]["mount_options"], json!(["volatile", "metacopy=on"]));
    assert_eq!(shown["config"]["cleanup"]["time_limit"], "30s");
    assert_eq!(shown["sources"]["root"], json!({ "from": "flag", "name": "--root" }));
    assert_eq!(shown["sources"]["metrics"], json!({ "from": "env", "name": "SPEEDY_METRICS" }));
    assert_eq!(shown["sources"]["driver"], json!({ "from": "default" }));
    assert_eq!(shown["config"], serde_json::to_value(&loaded.config).unwrap());
}

fn columns_of(text: &str) -> (Option<usize>, Option<usize>) {
    let line = text.lines().next().unwrap();
    (line.find('='), line.find('#'))
}

#[test]
fn the_files_of_others_are_read_as_json() {
    let value = toml_to_json("version = 3\n[a.'b.c']\nd = [1, 'x']\nwhen = 1979-05-27\n").unwrap();
    assert_eq!(value["version"], 3);
    assert_eq!(value["a"]["b.c"]["d"], json!([1, "x"]));
    let error = toml_to_json("a = 1\nb = = 2").unwrap_err();
    assert!(error.starts_with("line 2: "), "{error}");
}
