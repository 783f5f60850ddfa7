//! OCI's documents: what an image consists of.
//!
//! Only what is needed to find an image's layers is read. Docker's own documents have the same shape under other media types.
//! Whatever they come from, they are hostile input: bounded before they are read, and every number and digest in them is parsed.
//!
//! Source: the OCI image specification (descriptor.md, manifest.md, image-index.md, config.md).

use std::fmt;

use serde::Deserialize;

use crate::oci::{ChainId, DiffId, Digest};

/// The longest document that is read, in bytes. containerd refuses manifests of more than 8 MiB too.
pub const LONGEST_DOCUMENT: u64 = 8 << 20;
/// The most layers of an image.
const MOST_LAYERS: usize = 1024;

/// Why an image's documents cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A document is not what its place says.
    #[error("{what} {digest} cannot be read: {source}")]
    Malformed {
        /// What it should have been.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The image is not for this platform.
    #[error("the image has nothing for {wanted}; it has {}", offered.join(", "))]
    NoPlatform {
        /// The platform.
        wanted: Platform,
        /// What it is for.
        offered: Vec<String>,
    },
    /// Not an image: an artifact, or a document of a kind that is not known.
    #[error("{digest} is no container image: {problem}")]
    NoImage {
        /// The manifest.
        digest: Digest,
        /// How one can tell.
        problem: &'static str,
    },
}

/// A blob as a document names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// An operating system and a processor: `os/architecture` or `os/architecture/variant`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Such as `linux`.
    pub os: String,
    /// Such as `amd64`.
    pub architecture: String,
    /// Such as `v7`; empty where there is none.
    pub variant: String,
}

/// What is wrong with a text that should have been a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no platform: expected os/architecture or os/architecture/variant, such as linux/arm64")]
pub struct PlatformError(String);

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl Platform {
    /// That of this machine.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "x86" => ("386", ""),
            "aarch64" => ("arm64", ""),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            "loongarch64" => ("loong64", ""),
            other => (other, ""),
        };
        Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// Parses `os/architecture` or `os/architecture/variant`, with the names that OCI uses.
    pub fn parse(text: &str) -> Result<Platform, PlatformError> {
        let wrong = || PlatformError(text.to_owned());
        let mut parts = text.split('/');
        let mut part = || parts.next().unwrap_or_default().to_owned();
        let (os, architecture, variant) = (part(), part(), part());
        let word = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if os.is_empty() || architecture.is_empty() || parts.next().is_some() {
            return Err(wrong());
        }
        if ![&os, &architecture, &variant].into_iter().all(|text| word(text)) || text.ends_with('/') {
            return Err(wrong());
        }
        Ok(Platform { os, architecture, variant }.normal())
    }

    /// arm64 without a variant is v8, and arm without one is v7.
    fn normal(self) -> Platform {
        let variant = match (self.architecture.as_str(), self.variant.as_str()) {
            ("arm64", "v8") => String::new(),
            ("arm", "") => "v7".to_owned(),
            _ => self.variant,
        };
        Platform { variant, ..self }
    }

    /// This platform, and those whose images run on it because its processor does what an older one did; the best first.
    pub fn and_older(&self) -> Vec<Platform> {
        let variants = ["v8", "v7", "v6", "v5", "v4", "v3", "v2", ""];
        let others =
            variants.map(|variant| Platform { variant: variant.to_owned(), ..self.clone() }.normal());
        let mut found = vec![self.clone()];
        for other in others {
            if self.takes(&other) && !found.contains(&other) {
                found.push(other);
            }
        }
        found
    }

    /// Whether an image that is for `offered` is one for this platform.
    pub fn takes(&self, offered: &Platform) -> bool {
        self.rank(offered).is_some()
    }

    /// How well what is offered runs here: 0 is best; `None` if it does not.
    fn rank(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        // An older variant runs on a newer one: the nearest is best. No variant is the oldest.
        let number = |variant: &str| match variant {
            "" => Some(0),
            text => text.strip_prefix('v').and_then(|number| number.parse::<u32>().ok()),
        };
        number(&self.variant)?.checked_sub(number(&offered.variant)?)
    }
}

/// What a target turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An index: this manifest is the one for the platform.
    Index(Descriptor),
    /// A manifest.
    Manifest(Manifest),
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, from the bottom up.
    pub layers: Vec<Descriptor>,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its blob.
    pub blob: Descriptor,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// The layers up to and with it.
    pub chain: ChainId,
}

/// What an image is for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// As its configuration says.
    pub platform: Platform,
    /// What its name points at: an index, or the manifest.
    pub target: Descriptor,
    /// Its manifest; its configuration, without a media type, where there is no manifest (a docker archive).
    pub manifest: Descriptor,
    /// The digests of its documents, from the target down to the configuration; none where there is no manifest.
    pub documents: Vec<Digest>,
    /// Its layers, from the bottom up.
    pub layers: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u32,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
    #[serde(default)]
    rootfs: RawRootfs,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

fn descriptor(raw: RawDescriptor) -> Option<Descriptor> {
    Some(Descriptor { media_type: raw.media_type, digest: Digest::parse(&raw.digest).ok()?, size: raw.size })
}

/// Reads the document with this digest: an index, of which the manifest for `platform` is taken, or a manifest.
pub fn read_document(bytes: &[u8], digest: &Digest, platform: &Platform) -> Result<Document, ManifestError> {
    let document: RawDocument = serde_json::from_slice(bytes).map_err(|source| ManifestError::Malformed {
        what: "manifest",
        digest: digest.clone(),
        source,
    })?;
    let no_image = |problem| ManifestError::NoImage { digest: digest.clone(), problem };
    // A document that is both would be read differently by different readers.
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => pick(manifests, platform).map(Document::Index),
        (None, Some(config), Some(layers)) => {
            if layers.len() > MOST_LAYERS {
                return Err(no_image("it has more layers than an image can have"));
            }
            let layers: Option<Vec<_>> = layers.into_iter().map(descriptor).collect();
            let (Some(config), Some(layers)) = (descriptor(config), layers) else {
                return Err(no_image("a digest in it is not a SHA-256"));
            };
            Ok(Document::Manifest(Manifest { config, layers }))
        }
        _ if document.schema_version == 1 => {
            Err(no_image("its manifest is Docker's schema 1; pull it anew from a registry that has another"))
        }
        _ => Err(no_image("it is neither a manifest nor an index")),
    }
}

fn pick(manifests: Vec<RawDescriptor>, wanted: &Platform) -> Result<Descriptor, ManifestError> {
    let mut best: Option<(u32, Descriptor)> = None;
    let mut offered = Vec::new();
    for raw in manifests {
        let platform = match &raw.platform {
            Some(platform) => Platform {
                os: platform.os.clone(),
                architecture: platform.architecture.clone(),
                variant: platform.variant.clone(),
            },
            // Without a platform it is for whoever finds it.
            None => wanted.clone(),
        };
        let platform = platform.normal();
        let rank = wanted.rank(&platform);
        offered.push(platform.to_string());
        let Some((rank, candidate)) = rank.zip(descriptor(raw)) else { continue };
        if best.as_ref().is_none_or(|(known, _)| rank < *known) {
            best = Some((rank, candidate));
        }
    }
    offered.retain(|platform| platform != "unknown/unknown");
    offered.dedup();
    offered.truncate(32);
    best.map(|(_, manifest)| manifest).ok_or(ManifestError::NoPlatform { wanted: wanted.clone(), offered })
}

/// The layers of an image by its configuration alone, from the bottom up: what each makes with those below it.
pub fn chains_of(config: &[u8], digest: &Digest) -> Result<Vec<ChainId>, ManifestError> {
    let diffs = diffs(&read_config(config, digest)?, digest)?;
    Ok(diffs.into_iter().map(|(_, chain)| chain).collect())
}

fn read_config(config: &[u8], digest: &Digest) -> Result<RawConfig, ManifestError> {
    serde_json::from_slice(config).map_err(|source| ManifestError::Malformed {
        what: "configuration",
        digest: digest.clone(),
        source,
    })
}

/// The layers that a configuration lists, each with the chain that it makes.
fn diffs(config: &RawConfig, digest: &Digest) -> Result<Vec<(DiffId, ChainId)>, ManifestError> {
    let no_image = |problem| ManifestError::NoImage { digest: digest.clone(), problem };
    if config.rootfs.diff_ids.len() > MOST_LAYERS {
        return Err(no_image("it has more layers than an image can have"));
    }
    let mut diffs: Vec<(DiffId, ChainId)> = Vec::with_capacity(config.rootfs.diff_ids.len());
    for diff in &config.rootfs.diff_ids {
        let diff = DiffId(Digest::parse(diff).map_err(|_| no_image("a diff ID in it is not a SHA-256"))?);
        let chain = ChainId::of(diffs.last().map(|(_, below)| below), &diff);
        diffs.push((diff, chain));
    }
    Ok(diffs)
}

impl Manifest {
    /// The layers with the names that the configuration gives to them, and the platform that it says the image is for.
    pub fn layers(&self, config: &[u8]) -> Result<(Vec<Layer>, Platform), ManifestError> {
        let digest = &self.config.digest;
        let config = read_config(config, digest)?;
        let no_image = |problem| ManifestError::NoImage { digest: digest.clone(), problem };
        if config.rootfs.diff_ids.len() != self.layers.len() {
            return Err(no_image("its configuration has another number of layers than its manifest"));
        }
        let layers = self.layers.iter().cloned().zip(diffs(&config, digest)?);
        let layers = layers.map(|(blob, (diff_id, chain))| Layer { blob, diff_id, chain }).collect();
        let Platform { os, architecture, .. } = Platform::host();
        let or = |said: String, else_: String| if said.is_empty() { else_ } else { said };
        let platform = Platform {
            os: or(config.os, os),
            architecture: or(config.architecture, architecture),
            variant: config.variant,
        };
        Ok((layers, platform.normal()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::oci::Sha256;

    fn digest(text: &str) -> Digest {
        let mut hasher = Sha256::default();
        hasher.update(text.as_bytes());
        hasher.digest()
    }

    fn platform(text: &str) -> Platform {
        Platform::parse(text).unwrap()
    }

    fn read(document: &Value, wanted: &str) -> Result<Document, ManifestError> {
        read_document(document.to_string().as_bytes(), &digest("document"), &platform(wanted))
    }

    fn entry(text: &str) -> Value {
        let mut parts = text.split('/');
        let mut part = || parts.next().unwrap_or_default().to_owned();
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(text).as_str(),
            "size": 7,
            "platform": { "os": part(), "architecture": part(), "variant": part() },
        })
    }

    fn picked(offered: &[&str], wanted: &str) -> Option<String> {
        let manifests: Vec<Value> = offered.iter().map(|text| entry(text)).collect();
        match read(&json!({ "schemaVersion": 2, "manifests": manifests }), wanted) {
            Ok(Document::Index(found)) => {
                offered.iter().find(|text| digest(text) == found.digest).map(|text| (*text).to_owned())
            }
            Ok(other) => panic!("{other:?}"),
            Err(ManifestError::NoPlatform { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn the_best_manifest_for_a_platform_is_picked() {
        let all = [
            "linux/amd64",
            "linux/arm/v5",
            "linux/arm/v7",
            "linux/arm64/v8",
            "unknown/unknown",
            "windows/amd64",
        ];
        for (wanted, expected) in [
            ("linux/amd64", Some("linux/amd64")),
            ("linux/arm64", Some("linux/arm64/v8")),
            ("linux/arm64/v8", Some("linux/arm64/v8")),
            ("linux/arm", Some("linux/arm/v7")),
            ("linux/arm/v6", Some("linux/arm/v5")),
            ("linux/arm/v8", Some("linux/arm/v7")),
            ("linux/amd64/v3", Some("linux/amd64")),
            ("linux/s390x", None),
            ("freebsd/amd64", None),
        ] {
            assert_eq!(picked(&all, wanted).as_deref(), expected, "{wanted}");
        }
        assert_eq!(picked(&["linux/amd64/v2", "linux/amd64"], "linux/amd64").as_deref(), Some("linux/amd64"));
        assert_eq!(picked(&["linux/amd64/v3"], "linux/amd64"), None);
        let error =
            read(&json!({ "manifests": [entry("linux/riscv64"), entry("unknown/unknown")] }), "linux/amd64");
        assert_eq!(
            error.unwrap_err().to_string(),
            "the image has nothing for linux/amd64; it has linux/riscv64"
        );
    }

    #[test]
    fn a_platform_is_two_or_three_words() {
        assert_eq!(platform("linux/arm64/v8").to_string(), "linux/arm64");
        assert_eq!(platform("linux/arm").to_string(), "linux/arm/v7");
        assert_eq!(Platform::parse(&Platform::host().to_string()).unwrap(), Platform::host());
        for bad in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "linux/amd64/",
            "linux/amd64/v2/x",
            "lin ux/amd64",
            "linux/am\nd64",
        ] {
            assert!(Platform::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_older_variant_runs_on_a_newer_one() {
        let older = |text: &str| {
            platform(text).and_older().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(older("linux/amd64"), "linux/amd64");
        assert_eq!(older("linux/amd64/v3"), "linux/amd64/v3 linux/amd64/v2 linux/amd64");
        assert!(older("linux/arm/v7").starts_with("linux/arm/v7 linux/arm/v6 linux/arm/v5"));
        assert!(older("linux/arm64").starts_with("linux/arm64"));
    }

    fn manifest(layers: usize) -> Value {
        let blob = |text: &str| json!({ "mediaType": "x", "digest": digest(text).as_str(), "size": 1 });
        let layers: Vec<Value> = (0..layers).map(|n| blob(&n.to_string())).collect();
        json!({ "schemaVersion": 2, "config": blob("config"), "layers": layers })
    }

    #[test]
    fn layers_have_the_names_of_the_configuration() {
        let Document::Manifest(found) = read(&manifest(2), "linux/amd64").unwrap() else { panic!() };
        let diff_ids = [digest("a").to_string(), digest("b").to_string()];
        let config = json!({ "architecture": "arm", "rootfs": { "diff_ids": diff_ids } }).to_string();
        let (layers, platform) = found.layers(config.as_bytes()).unwrap();
        assert_eq!(platform.to_string(), "linux/arm/v7");
        assert_eq!(layers[0].chain.0, digest("a"));
        assert_eq!(layers[1].chain, ChainId::of(Some(&layers[0].chain), &DiffId(digest("b"))));
        assert_eq!(layers[1].blob.digest, digest("1"));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let no_image = |document: &Value| {
            assert!(
                matches!(read(document, "linux/amd64"), Err(ManifestError::NoImage { .. })),
                "{document}"
            );
        };
        let mut both = manifest(1);
        both["manifests"] = json!([entry("linux/amd64")]);
        no_image(&both);
        no_image(&json!({ "schemaVersion": 1, "fsLayers": [] }));
        no_image(&json!({}));
        no_image(&manifest(MOST_LAYERS + 1));
        let mut wrong = manifest(1);
        wrong["layers"][0]["digest"] = json!("sha512:00");
        no_image(&wrong);
        let malformed = |text: &str| read_document(text.as_bytes(), &digest("x"), &Platform::host());
        for text in ["", "[]", "{\"layers\": 3}", "{\"config\": {\"digest\": \"x\", \"size\": -1}}"] {
            assert!(matches!(malformed(text), Err(ManifestError::Malformed { .. })), "{text}");
        }
        // An artifact has no layers of a root file system, whatever its manifest says.
        let Document::Manifest(found) = read(&manifest(1), "linux/amd64").unwrap() else { panic!() };
        assert!(matches!(found.layers(b"{}"), Err(ManifestError::NoImage { .. })));
        assert!(matches!(found.layers(b"\xff"), Err(ManifestError::Malformed { .. })));
        let config = json!({ "rootfs": { "diff_ids": ["latest"] } }).to_string();
        assert!(matches!(found.layers(config.as_bytes()), Err(ManifestError::NoImage { .. })));
    }
}
