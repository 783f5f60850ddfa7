//! The directions of the code, as `src/lib.rs` draws them, and its sizes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Module → tier. A module imports from lower tiers and its own folder only; `telemetry` may be imported by all.
const TIERS: [(&str, u8); 19] = [
    ("cli", 9),
    ("daemon", 8),
    ("config", 7),
    ("service", 6),
    ("snapshot", 5),
    ("driver", 4),
    ("layer", 4),
    ("registry", 4),
    ("content", 3),
    ("image", 2),
    ("chunk", 2),
    ("containerd", 1),
    ("keeper", 1),
    ("object", 1),
    ("oci", 0),
    ("sys", 0),
    ("telemetry", 0),
    ("proto", 0),
    ("design", 0),
];

/// Foreign crate → the only places that may name it.
const FOREIGN: [(&str, &[&str]); 19] = [
    ("tonic", &["service", "containerd", "cli/check", "cli/ask"]),
    ("rusqlite", &["snapshot/metastore", "snapshot/schema"]),
    ("rustix", &["sys"]),
    ("libc", &["sys"]),
    ("clap", &["cli"]),
    ("toml", &["config"]),
    ("prometheus_client", &["telemetry"]),
    ("askama", &["service/page"]),
    ("axum", &["service"]),
    ("hyper", &["registry"]),
    ("reqwest", &["registry"]),
    ("anyhow", &["cli"]),
    ("aws_lc_rs", &["oci"]),
    ("object_store", &["object"]),
    ("zstd", &["chunk/codec", "image/compression"]),
    ("flate2", &["image/compression"]),
    ("tar_core", &["image/tar", "cli/publish/archive"]),
    ("ed25519_dalek", &["content/trust"]),
    ("devicemapper", &["driver/thin/device"]),
];

const LONGEST_FILE: usize = 600;
const LONGEST_FUNCTION: usize = 70;

struct Source {
    /// Below `src`, without the extension: `snapshot/filter/tests`.
    name: String,
    module: String,
    text: String,
}

impl Source {
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate();
        lines.filter(|(_, line)| !line.trim_start().starts_with("//")).map(|(at, line)| (at + 1, line))
    }

    /// The file without its unit tests.
    fn without_tests(&self) -> &str {
        self.text.split("\n#[cfg(test)]\nmod tests {").next().unwrap()
    }

    fn is_test(&self) -> bool {
        self.name.ends_with("tests") || self.name.contains("/tests/")
    }
}

fn sources() -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&top, &mut files);
    assert!(files.len() > 20, "found only {files:?}");
    let source = |path: PathBuf| {
        let name = path.strip_prefix(&top).unwrap().with_extension("").display().to_string();
        let module = name.split('/').next().unwrap().to_owned();
        Source { text: std::fs::read_to_string(path).unwrap(), name, module }
    };
    files.into_iter().map(source).collect()
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// The modules of this crate that a line of code names: `use crate::{a, b::c}` spread over lines counts where each stands.
fn named_modules(line: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut modules = Vec::new();
    for after in line.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(group) => modules.extend(group.split(',').map(|part| word(part.trim()))),
            None => modules.push(word(after)),
        }
    }
    modules
}

#[test]
fn imports_point_downwards() {
    let tiers: BTreeMap<&str, u8> = TIERS.into();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| s.name != "main" && s.name != "lib") {
        let tier =
            tiers.get(source.module.as_str()).unwrap_or_else(|| panic!("{} has no tier", source.module));
        for (at, line) in source.code() {
            for module in named_modules(line).into_iter().filter(|m| *m != source.module && m != "telemetry")
            {
                match tiers.get(module.as_str()) {
                    Some(other) if other < tier => {}
                    Some(_) => wrong.push(format!("{}:{at} names {module}", source.name)),
                    None => {}
                }
            }
        }
    }
    assert!(wrong.is_empty(), "upward or sideways imports:\n{}", wrong.join("\n"));
}

#[test]
fn foreign_crates_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (at, line) in source.code() {
            for (name, rooms) in FOREIGN {
                let names = |c: char| !(c.is_alphanumeric() || c == '_');
                let used = line
                    .match_indices(&format!("{name}::"))
                    .any(|(at, _)| at == 0 || line[..at].ends_with(names) && !line[..at].ends_with("::"));
                if used && !rooms.iter().any(|room| source.name.starts_with(room)) {
                    wrong.push(format!("{}:{at} names {name}", source.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "foreign crates outside their rooms:\n{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stays_in_sys() {
    for source in sources().iter().filter(|s| s.module != "sys") {
        for (at, line) in source.code() {
            // `unsafe-inline` is a word of HTTP's.
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-');
            assert!(!words.any(|w| w == "unsafe"), "{}:{at}", source.name);
        }
    }
}

#[test]
fn files_and_functions_stay_short() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines = source.without_tests().lines().count();
        if lines > LONGEST_FILE && !source.is_test() {
            wrong.push(format!("{} has {lines} lines", source.name));
        }
        for (name, lines) in functions(source.without_tests()) {
            if lines > LONGEST_FUNCTION && !source.is_test() {
                wrong.push(format!("{}: {name} has {lines} lines", source.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Each function with its length: from the line with `fn` to the closing brace of the same indentation.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some((before, name)) = line.trim_start().split_once("fn ") else { continue };
        let is_item = before.split_whitespace().all(|w| {
            matches!(w, "pub" | "async" | "const" | "unsafe" | "pub(super)" | "pub(crate)" | "pub(in")
        });
        if !is_item || line.trim_end().ends_with(';') {
            continue;
        }
        let end = format!("{}}}", " ".repeat(indent));
        if let Some(length) = lines[at..].iter().position(|l| *l == end) {
            found.push((name.split('(').next().unwrap_or_default().to_owned(), length + 1));
        }
    }
    found
}

/// `SPEEDY_FUZZ_SECONDS` was exported for the tests, and every daemon of the end-to-end tests warned of a setting that it does not
/// have.
#[test]
fn what_the_tests_export_is_no_setting() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/test");
    let text = std::fs::read_to_string(script).unwrap();
    let exported = text.lines().filter(|line| line.trim_start().starts_with("export "));
    let ours: Vec<&str> = exported.filter(|line| line.contains("SPEEDY_")).collect();
    assert!(ours.is_empty(), "{ours:?}");
}
