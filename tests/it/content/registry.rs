//! What containerd gets from the registry port, asked over HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use speedy::containerd::manifest::Platform;
use speedy::content::ContentStore;
use speedy::content::document::Document;
use speedy::content::name::ImageName;
use speedy::content::trust::Trust;
use speedy::object::{Objects, layout};
use speedy::oci::{ChainId, Digest};
use speedy::registry::{self, Mirror, Probe, Reach, Upstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::support::{Image, digest, key, node};
use crate::support::runtime;

/// A registry that is there when it is told to, and remembers who was asked for.
#[derive(Debug, Clone, Default)]
struct Switch {
    there: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Probe for Switch {
    async fn probe(&self, upstream: &Upstream) -> Reach {
        self.asked.lock().push(upstream.url().to_string());
        if self.there.load(Ordering::SeqCst) { Reach::There } else { Reach::Away }
    }
}

/// A node that answers for registries.
struct Node {
    address: std::net::SocketAddr,
    objects: Objects,
    content: Arc<ContentStore>,
    mirror: Arc<Mirror>,
    switch: Switch,
    stop: CancellationToken,
    serving: JoinSet<()>,
}

impl Node {
    async fn open(objects: &Objects, own: u8, trust: Trust) -> Node {
        let content = Arc::new(node(objects, key(own), trust).0);
        let switch = Switch::default();
        let mirror = Arc::new(Mirror::new(Arc::clone(&content), Box::new(switch.clone())));
        let port = registry::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (address, stop) = (port.local_addr().unwrap(), CancellationToken::new());
        let mut serving = JoinSet::new();
        serving.spawn(registry::serve(port, Arc::clone(&mirror), stop.clone()));
        Node { address, objects: objects.clone(), content, mirror, switch, stop, serving }
    }

    async fn get(&self, target: &str) -> Answer {
        self.ask("GET", target).await
    }

    async fn ask(&self, method: &str, target: &str) -> Answer {
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address);
        self.raw(request.as_bytes()).await
    }

    async fn raw(&self, request: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // It may answer before it has read all.
        stream.write_all(request).await.unwrap_or_default();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap_or_default();
        Answer::read(&bytes)
    }

    async fn stop(mut self) {
        self.stop.cancel();
        self.serving.join_next().await.unwrap().unwrap();
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn read(bytes: &[u8]) -> Answer {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(bytes.len());
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Answer { status, head, body: bytes.get(end + 4..).unwrap_or_default().to_vec() }
    }

    fn header(&self, name: &str) -> &str {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("{name} in {}", self.head))
    }

    /// OCI's code of an error.
    fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        body["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

/// The documents of an image: index, manifest, configuration.
fn documents(text: &str) -> [Document; 3] {
    let document = |value: &Value| Document::of(Bytes::from(value.to_string()));
    let config = document(&json!({ "text": text }));
    let blob =
        |document: &Document| json!({ "digest": document.digest().as_str(), "size": document.bytes().len() });
    let manifest = document(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": blob(&config), "layers": [],
    }));
    let index = document(&json!({ "schemaVersion": 2, "manifests": [blob(&manifest)] }));
    [index, manifest, config]
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const LAYER: &str = "the layer of all images here";

async fn publish(content: &ContentStore, reference: &str, platform: &str, documents: &[Document]) {
    let chain = ChainId(digest(LAYER));
    let digests: Vec<Digest> = documents.iter().map(|document| document.digest().clone()).collect();
    let name = ImageName {
        reference: reference.into(),
        platform: platform.into(),
        target_media_type: INDEX.into(),
        target: digests.first().cloned().unwrap_or_else(|| digest("config")),
        media_type: MANIFEST.into(),
        manifest: digests.get(1).cloned().unwrap_or_else(|| digest("config")),
        documents: digests,
        chains: vec![chain],
    };
    content.publish_name(&name, documents).await.unwrap();
}

/// A node whose store has `docker.io/library/app:1`, with its documents.
async fn published() -> (Node, [Document; 3]) {
    let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
    let node = Node::open(&objects, 1, Trust::Keys(Vec::new())).await;
    let image = Image::make(dir.path(), 1, 100_000);
    image.publish(&node.content, &[ChainId(digest(LAYER))]).await.unwrap();
    let documents = documents("app");
    publish(&node.content, "docker.io/library/app:1", &Platform::host().to_string(), &documents).await;
    (node, documents)
}

const TAG: &str = "/v2/library/app/manifests/1?ns=docker.io";

#[test]
fn an_image_is_given_while_its_registry_is_away() {
    runtime().block_on(async {
        let (node, [index, manifest, config]) = published().await;
        let at = |kind: &str, of: &Document| format!("/v2/library/app/{kind}/{}?ns=docker.io", of.digest());
        for (target, of, media_type) in [
            (TAG.to_owned(), &index, INDEX),
            (at("manifests", &index), &index, INDEX),
            (at("manifests", &manifest), &manifest, MANIFEST),
            (at("blobs", &config), &config, "application/octet-stream"),
            // containerd asks so for a digest when there is no manifest.
            (at("blobs", &manifest), &manifest, "application/octet-stream"),
        ] {
            for method in ["GET", "HEAD"] {
                let answer = node.ask(method, &target).await;
                assert_eq!(answer.status, 200, "{target}: {answer:?}");
                assert_eq!(answer.header("content-type"), media_type);
                assert_eq!(answer.header("docker-content-digest"), of.digest().as_str());
                assert_eq!(answer.header("content-length"), of.bytes().len().to_string());
                let body = if method == "GET" { of.bytes().clone() } else { Bytes::new() };
                assert_eq!(answer.body, body);
            }
        }
        assert_eq!(*node.switch.asked.lock(), ["https://registry-1.docker.io/v2/"]);
        assert_eq!(node.mirror.counts().served, 10);
        let version = node.get("/v2/").await;
        assert_eq!(
            (version.status, version.header("docker-distribution-api-version")),
            (200, "registry/2.0")
        );
        node.stop().await;
    });
}

#[test]
fn r1_while_the_registry_answers_nothing_is_given() {
    runtime().block_on(async {
        let (node, [index, _, config]) = published().await;
        node.switch.there.store(true, Ordering::SeqCst);
        for (target, code) in [
            (TAG.to_owned(), "MANIFEST_UNKNOWN"),
            (format!("/v2/library/app/manifests/{}?ns=docker.io", index.digest()), "MANIFEST_UNKNOWN"),
            (format!("/v2/library/app/blobs/{}?ns=docker.io", config.digest()), "BLOB_UNKNOWN"),
        ] {
            let answer = node.get(&target).await;
            assert_eq!((answer.status, answer.code().as_str()), (404, code));
        }
        assert_eq!(node.mirror.counts().reachable, 3);
        node.stop().await;
    });
}

/// Any local process can ask, with any `ns`: it would make the daemon connect wherever it likes, and tell what answers there.
#[test]
fn r3_nobody_is_probed_whom_no_publisher_has_named() {
    runtime().block_on(async {
        let (node, [index, ..]) = published().await;
        let digest = index.digest();
        for target in [
            "/v2/library/app/manifests/1".to_owned(),
            "/v2/library/app/manifests/1?ns=169.254.169.254".into(),
            "/v2/library/app/manifests/1?ns=registry-1.docker.io".into(),
            "/v2/library/app/manifests/2?ns=docker.io".into(),
            "/v2/library/other/manifests/1?ns=docker.io".into(),
            format!("/v2/library/app/manifests/{digest}?ns=169.254.169.254"),
            format!("/v2/library/other/manifests/{digest}?ns=docker.io"),
            format!("/v2/library/app/manifests/{}?ns=docker.io", self::digest("nothing")),
            "/v2/library/app/tags/list?ns=docker.io".into(),
            "/metrics".into(),
        ] {
            let answer = node.get(&target).await;
            assert_eq!(answer.status, 404, "{target}: {answer:?}");
            assert!(!answer.code().is_empty());
        }
        assert_eq!(node.switch.asked.lock().len(), 0);
        for method in ["POST", "PUT", "PATCH", "DELETE"] {
            assert_eq!(node.ask(method, TAG).await.status, 405);
        }
        node.stop().await;
    });
}

#[test]
fn r2_what_a_stranger_names_is_not_given() {
    runtime().block_on(async {
        let (node, documents) = published().await;
        let other = Node::open(&node.objects, 2, Trust::Keys(Vec::new())).await;
        let by_digest = format!("/v2/library/app/manifests/{}?ns=docker.io", documents[0].digest());
        for target in [TAG, &by_digest] {
            assert_eq!(other.get(target).await.status, 404);
        }
        assert_eq!(other.switch.asked.lock().len(), 0);
        let friend = Node::open(&node.objects, 3, Trust::Keys(vec![*key(1).public()])).await;
        // By digest first: the names on the store are listed.
        for target in [&by_digest, TAG] {
            assert_eq!(friend.get(target).await.status, 200);
        }
        // What was named since is found too, but the names are not listed for every stranger's question.
        let later = self::documents("later");
        publish(&node.content, "r.example:5000/later:1", "linux/s390x", &later).await;
        let target = format!("/v2/later/blobs/{}?ns=r.example:5000", later[2].digest());
        let fresh = Node::open(&node.objects, 4, Trust::Keys(vec![*key(1).public()])).await;
        assert_eq!(fresh.get(&target).await.status, 200);
        assert_eq!(*fresh.switch.asked.lock(), ["https://r.example:5000/v2/"]);
        for node in [node, other, friend, fresh] {
            node.stop().await;
        }
    });
}

#[test]
fn r2_damage_is_never_given() {
    runtime().block_on(async {
        let (node, [index, manifest, _]) = published().await;
        for wrong in [&b""[..], b"rubbish", &[b'x'; 1 << 16]] {
            node.objects.put(&layout::document(index.digest()), Bytes::copy_from_slice(wrong)).await.unwrap();
            let answer = node.get(TAG).await;
            assert_eq!((answer.status, answer.code().as_str()), (404, "MANIFEST_UNKNOWN"));
        }
        assert_eq!(node.mirror.counts().failed, 3);
        node.objects.delete(&layout::document(manifest.digest())).await.unwrap();
        let target = format!("/v2/library/app/manifests/{}?ns=docker.io", manifest.digest());
        assert_eq!(node.get(&target).await.status, 404);
        assert_eq!(node.switch.asked.lock().len(), 0);
        node.stop().await;
    });
}

#[test]
fn what_is_no_manifest_is_not_given_as_one() {
    runtime().block_on(async {
        let (node, [.., config]) = published().await;
        let target = format!("/v2/library/app/manifests/{}?ns=docker.io", config.digest());
        assert_eq!(node.get(&target).await.status, 404);
        // The name of an archive has no documents.
        publish(&node.content, "docker.io/library/archive:1", &Platform::host().to_string(), &[]).await;
        assert_eq!(node.get("/v2/library/archive/manifests/1?ns=docker.io").await.status, 404);
        // Of another platform only.
        publish(&node.content, "docker.io/library/arm:1", "linux/s390x", &documents("arm")).await;
        assert_eq!(node.get("/v2/library/arm/manifests/1?ns=docker.io").await.status, 404);
        node.stop().await;
    });
}

#[test]
fn r4_clients_that_are_wrong_or_slow_do_not_keep_others_out() {
    runtime().block_on(async {
        let (node, _) = published().await;
        let rubbish: [&[u8]; 4] =
            [b"rubbish\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n"];
        for request in rubbish {
            let answer = node.raw(request).await;
            assert!(matches!(answer.status, 0 | 400 | 505), "{answer:?}");
        }
        let headers = "X-More: x\r\n".repeat(1000);
        let many = node.raw(format!("GET {TAG} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await;
        assert!(matches!(many.status, 0 | 431), "{many:?}");
        let long = format!("GET {TAG}&x={} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(1 << 20));
        let long = node.raw(long.as_bytes()).await;
        assert!(matches!(long.status, 0 | 414 | 431), "{long:?}");

        // Half a request each, and more of them than there is room for: they are cut off, and then others are served.
        let mut slow = Vec::new();
        for _ in 0..40 {
            let mut stream = TcpStream::connect(node.address).await.unwrap();
            stream.write_all(b"GET /v2/ HTTP/1.1\r\nHost:").await.unwrap();
            slow.push(stream);
        }
        let answer = tokio::time::timeout(Duration::from_secs(60), node.get(TAG)).await.unwrap();
        assert_eq!(answer.status, 200);
        node.stop().await;
    });
}

#[test]
fn fuzz_requests() {
    runtime().block_on(async {
        let (node, _) = published().await;
        let corpus = [
            format!("GET {TAG} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
            format!(
                "HEAD /http/v2/a/blobs/{}?ns=r.io%3A5000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                digest("a")
            ),
        ];
        let corpus: Vec<Vec<u8>> = corpus.iter().map(|text| text.clone().into_bytes()).collect();
        let address = node.address;
        let fuzzed = tokio::task::spawn_blocking(move || {
            crate::fuzz::run("registry", &corpus, |input| {
                use std::io::{Read, Write};
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                stream.write_all(input).unwrap_or_default();
                stream.shutdown(std::net::Shutdown::Write).unwrap_or_default();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).unwrap_or_default();
                let answer = Answer::read(&answer);
                assert!(matches!(answer.status, 0 | 200 | 400..=431 | 505), "{answer:?}");
            });
        });
        fuzzed.await.unwrap();
        // By the scheme that the path begins with: half of one request may be joined to half of another.
        let known = ["https://registry-1.docker.io/v2/", "http://registry-1.docker.io/v2/"];
        let asked = node.switch.asked.lock().clone();
        assert!(asked.iter().all(|url| known.contains(&url.as_str())), "{asked:?}");
        assert_eq!(node.get(TAG).await.status, 200);
        node.stop().await;
    });
}
