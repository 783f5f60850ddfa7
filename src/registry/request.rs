//! What is asked of a registry: pure reading of paths and parameters that anybody may have written.
//!
//! Source: OCI's distribution specification ("Pull"), the reference grammar of distribution/reference, and containerd's
//! `core/remotes/docker`, which tells the registry in the parameter `ns` and allows a path in front of `/v2/`.

use std::fmt;
use std::net::IpAddr;

use url::{Host, Url, form_urlencoded};

use crate::oci::Digest;

/// The longest name of a registry or a repository, in bytes.
const LONGEST_NAME: usize = 255;
/// The longest tag.
const LONGEST_TAG: usize = 128;
/// In front of `/v2/`, for registries that speak HTTP without TLS: `speedy config hosts --plain-http` writes it.
pub const PLAIN: &str = "/http";

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// Whether this is a registry.
    Version,
    /// Something of an image.
    Object(Object),
}

/// Something of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) upstream: Upstream,
    /// Without the registry.
    pub(super) repository: String,
    pub(super) name: Name,
}

/// By what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    /// The manifest or index with this tag.
    Tag(String),
    /// The manifest or index with this digest.
    Manifest(Digest),
    /// The blob with this digest.
    Blob(Digest),
}

/// Who answers for a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Upstream {
    registry: String,
    url: Url,
}

/// Why a request is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    #[error("there is nothing but /v2/, manifests and blobs here")]
    NoPath,
    #[error(
        "the parameter ns is missing, which names the registry; containerd sends it to every host that is not the registry itself"
    )]
    NoRegistry,
    #[error("the parameter ns is no registry")]
    Registry,
    #[error("this is no repository")]
    Repository,
    #[error("this is neither a tag nor a SHA-256 digest")]
    Reference,
}

impl Object {
    /// Its repository with its registry, as references begin.
    pub(super) fn full_repository(&self) -> String {
        format!("{}/{}", self.upstream.registry, self.repository)
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repository = self.full_repository();
        match &self.name {
            Name::Tag(tag) => write!(f, "{repository}:{tag}"),
            Name::Manifest(digest) | Name::Blob(digest) => write!(f, "{repository}@{digest}"),
        }
    }
}

impl Upstream {
    /// Of this registry; `plain` says that it speaks HTTP without TLS. Those of this machine do so, as containerd has it, but on
    /// the ports of TLS. `None` if nobody can be called so.
    pub fn of(registry: &str, plain: bool) -> Option<Upstream> {
        let known = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
        if registry.is_empty() || registry.len() > LONGEST_NAME || !registry.bytes().all(known) {
            return None;
        }
        // Who answers for Docker Hub is called otherwise.
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let url = |scheme: &str| Url::parse(&format!("{scheme}://{host}/v2/")).ok();
        let secure = url("https")?;
        let here = is_local(&secure) && secure.port().is_some();
        let url = if plain || here { url("http")? } else { secure };
        Some(Upstream { registry: registry.to_owned(), url })
    }

    /// Somebody at this address, for tests.
    #[cfg(test)]
    pub(super) fn at(url: &str) -> Upstream {
        Upstream { registry: url.to_owned(), url: Url::parse(url).unwrap() }
    }

    /// What references to its images begin with.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Where it says that it is there.
    pub fn url(&self) -> &Url {
        &self.url
    }
}

fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::V4(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => false,
    }
}

/// What a request with this path and query asks for.
pub(super) fn read(path: &str, query: &str) -> Result<Asked, RequestError> {
    let (plain, path) = match path.strip_prefix(PLAIN) {
        Some(rest) => (true, rest),
        None => (false, path),
    };
    let path = path.strip_prefix("/v2").ok_or(RequestError::NoPath)?;
    if path.is_empty() || path == "/" {
        return Ok(Asked::Version);
    }
    let path = path.strip_prefix('/').ok_or(RequestError::NoPath)?;
    // From the right: a repository may be called `manifests/manifests`.
    let mut parts = path.rsplitn(3, '/');
    let (Some(reference), Some(kind), Some(repository)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(RequestError::NoPath);
    };
    if !matches!(kind, "manifests" | "blobs") {
        return Err(RequestError::NoPath);
    }
    let registry = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "ns");
    let (_, registry) = registry.ok_or(RequestError::NoRegistry)?;
    let upstream = Upstream::of(&registry, plain).ok_or(RequestError::Registry)?;
    if !is_repository(repository) {
        return Err(RequestError::Repository);
    }
    let name = match (Digest::parse(reference), kind) {
        (Ok(digest), "blobs") => Name::Blob(digest),
        (Ok(digest), _) => Name::Manifest(digest),
        (Err(_), "manifests") if is_tag(reference) => Name::Tag(reference.to_owned()),
        _ => return Err(RequestError::Reference),
    };
    Ok(Asked::Object(Object { upstream, repository: repository.to_owned(), name }))
}

fn is_repository(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let part = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().copied().is_some_and(letter)
            && bytes.last().copied().is_some_and(letter)
            && bytes.iter().all(|b| letter(*b) || b"._-".contains(b))
    };
    text.len() <= LONGEST_NAME && text.split('/').all(part)
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= LONGEST_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(path: &str, query: &str) -> Result<String, RequestError> {
        read(path, query).map(|asked| match asked {
            Asked::Version => "version".to_owned(),
            Asked::Object(object) => format!("{object} from {}", object.upstream.url()),
        })
    }

    #[test]
    fn what_containerd_asks_is_understood() {
        let hex = "0123456789abcdef".repeat(4);
        let (tag, digest) =
            ("/v2/library/alpine/manifests/3.22", format!("/v2/a/manifests/blobs/sha256:{hex}"));
        for (path, query, expected) in [
            ("/v2/", "", "version".to_owned()),
            ("/v2", "ns=docker.io", "version".to_owned()),
            ("/http/v2/", "", "version".to_owned()),
            (
                tag,
                "ns=docker.io",
                "docker.io/library/alpine:3.22 from https://registry-1.docker.io/v2/".into(),
            ),
            (tag, "x=1&ns=r.io%3A5000", "r.io:5000/library/alpine:3.22 from https://r.io:5000/v2/".into()),
            (
                tag,
                "ns=127.0.0.1:5000",
                "127.0.0.1:5000/library/alpine:3.22 from http://127.0.0.1:5000/v2/".into(),
            ),
            (tag, "ns=localhost", "localhost/library/alpine:3.22 from https://localhost/v2/".into()),
            (tag, "ns=[::1]:5000", "[::1]:5000/library/alpine:3.22 from http://[::1]:5000/v2/".into()),
            ("/http/v2/a/manifests/b", "ns=r.io", "r.io/a:b from http://r.io/v2/".into()),
            (&digest, "ns=r.io", format!("r.io/a/manifests@sha256:{hex} from https://r.io/v2/")),
        ] {
            assert_eq!(object(path, query), Ok(expected), "{path}?{query}");
        }
    }

    #[test]
    fn what_nobody_should_ask_is_refused() {
        let tag = "/v2/library/alpine/manifests/3.22";
        for query in [
            "",
            "ns",
            "ns=",
            "namespace=docker.io",
            "ns=a/b",
            "ns=user@host",
            "ns=host%20",
            "ns=a%0Ab",
            "ns=h%3Fx",
            "ns=h%23",
            "ns=h%5Cx",
            "ns=..%2F",
            "ns=host:port",
            "ns=host:99999",
            "ns=[::1",
            "ns=:5000",
            "ns=h%00",
        ] {
            assert!(object(tag, query).is_err(), "{query}");
        }
        assert!(object(tag, &format!("ns={}", "h".repeat(LONGEST_NAME + 1))).is_err());
        let hex = "0123456789abcdef".repeat(4);
        for path in [
            "",
            "/",
            "/v1/",
            "/v2x",
            "/metrics",
            "/v2/_catalog",
            "/v2/a/tags/list",
            "/v2/a/manifests/",
            "/v2//manifests/b",
            "/v2/manifests/b",
            "/v2/a/../b/manifests/c",
            "/v2/A/manifests/b",
            "/v2/a//b/manifests/c",
            "/v2/a/manifests/.b",
            "/v2/a/manifests/b:c",
            "/v2/a/manifests/%62",
            "/v2/-a/manifests/b",
            "/v2/a/blobs/latest",
            "/v2/a/blobs/uploads/",
            "/v2/a/manifests/b/",
            "http/v2/",
            "/http/http/v2/",
            &format!("/v2/a/blobs/sha512:{hex}{hex}"),
            &format!("/v2/a/blobs/sha256:{}", hex.to_uppercase()),
            &format!("/v2/a/manifests/{}", "t".repeat(LONGEST_TAG + 1)),
            &format!("/v2/{}/manifests/b", "r".repeat(256)),
        ] {
            assert!(object(path, "ns=docker.io").is_err(), "{path}");
        }
    }
}
