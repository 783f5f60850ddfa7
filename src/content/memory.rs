//! Layers held in memory, read once from a JSON file: `{"sha256:<chain id>": {"etc/hello": "content", ...}, ...}`.
//!
//! For trials and tests of everything around it: as a source of layers it stands beside the object store.

use std::collections::{BTreeMap, HashMap};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::oci::{ChainId, Digest};

/// Why a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No such kind of store.
    #[error("store {url:?} is not known: use memory:FILE, or leave `store` empty for none")]
    UnknownStore {
        /// As configured.
        url: String,
    },
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The layers of a file.
#[derive(Debug)]
pub struct MemorySource {
    layers: Layers,
}

impl MemorySource {
    /// Opens the store that `url` names; an empty text is no store.
    pub fn open(url: &str) -> Result<Option<MemorySource>, MemoryError> {
        match url.split_once(':') {
            _ if url.is_empty() => Ok(None),
            Some(("memory", file)) if !file.is_empty() => {
                let path = PathBuf::from(file);
                let layers =
                    Layers::read(&path).map_err(|source| MemoryError::Unreadable { path, source })?;
                Ok(Some(MemorySource { layers }))
            }
            _ => Err(MemoryError::UnknownStore { url: url.to_owned() }),
        }
    }

    /// The layer that makes the chain `chain` when put on the layers below it, if this store has it.
    pub async fn lookup(&self, chain: &ChainId) -> Result<Option<Layer>, MemoryError> {
        Ok(self.layers.get(chain).cloned().map(Layer))
    }
}

/// A layer at hand.
#[derive(Debug, Clone)]
pub struct Layer(Tree);

impl Layer {
    /// Writes the layer's tree into the empty directory `dir`, in overlayfs's own form of a layer.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        self.0.write_to(dir)
    }
}

/// Relative path → content.
#[derive(Debug, Clone)]
struct Tree(Arc<BTreeMap<String, String>>);

impl Tree {
    fn write_to(&self, dir: &Path) -> io::Result<()> {
        for (path, content) in self.0.iter() {
            let file = dir.join(path);
            // Modes are set, not left to the umask of whoever started us.
            let mut above = dir.to_owned();
            for part in Path::new(path).parent().into_iter().flat_map(Path::components) {
                above.push(part);
                if !above.is_dir() {
                    std::fs::create_dir(&above)?;
                    std::fs::set_permissions(&above, Permissions::from_mode(0o755))?;
                }
            }
            std::fs::write(&file, content)?;
            std::fs::set_permissions(&file, Permissions::from_mode(0o644))?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Layers(HashMap<ChainId, Tree>);

impl Layers {
    fn read(file: &Path) -> io::Result<Layers> {
        let listed: BTreeMap<String, BTreeMap<String, String>> =
            serde_json::from_slice(&std::fs::read(file)?)?;
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut layers = HashMap::new();
        for (chain, tree) in listed {
            let digest = Digest::parse(&chain).map_err(|error| invalid(format!("{chain:?}: {error}")))?;
            if let Some(path) = tree.keys().find(|path| !stays_inside(path)) {
                return Err(invalid(format!("{path:?} is not a plain relative path")));
            }
            layers.insert(ChainId(digest), Tree(Arc::new(tree)));
        }
        Ok(Layers(layers))
    }

    fn get(&self, chain: &ChainId) -> Option<&Tree> {
        self.0.get(chain)
    }
}

fn stays_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> io::Result<Layers> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("layers.json");
        std::fs::write(&file, json).unwrap();
        Layers::read(&file)
    }

    #[test]
    fn a_listed_layer_is_written_as_listed() {
        let chain = format!("sha256:{}", "a".repeat(64));
        let layers = read(&format!(r#"{{"{chain}": {{"etc/hello": "world"}}}}"#)).unwrap();
        let chain = ChainId(Digest::parse(&chain).unwrap());
        let dir = tempfile::tempdir().unwrap();
        layers.get(&chain).unwrap().write_to(dir.path()).unwrap();
        assert_eq!(std::fs::read(dir.path().join("etc/hello")).unwrap(), b"world");
    }

    #[test]
    fn a_broken_file_is_refused() {
        let chain = format!("sha256:{}", "a".repeat(64));
        for bad in [
            "".to_owned(),
            "[]".into(),
            r#"{"latest": {}}"#.into(),
            format!(r#"{{"{chain}": {{"../x": ""}}}}"#),
            format!(r#"{{"{chain}": {{"/etc/x": ""}}}}"#),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
