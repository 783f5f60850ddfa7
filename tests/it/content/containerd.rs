//! containerd's content, images and leases, asked of a stand-in on a real socket.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use speedy::containerd::manifest::Descriptor;
use speedy::containerd::{Containerd, ContainerdError};
use speedy::oci::Digest;
use speedy::proto::containerd::services::content::v1 as content;
use speedy::proto::containerd::services::content::v1::content_server::{Content, ContentServer};
use speedy::proto::containerd::services::images::v1 as images;
use speedy::proto::containerd::services::images::v1::images_server::{Images, ImagesServer};
use speedy::proto::containerd::services::introspection::v1 as introspection;
use speedy::proto::containerd::services::introspection::v1::introspection_server::{
    Introspection, IntrospectionServer,
};
use speedy::proto::containerd::services::leases::v1 as leases;
use speedy::proto::containerd::services::leases::v1::leases_server::{Leases, LeasesServer};
use speedy::proto::containerd::services::namespaces::v1 as namespaces;
use speedy::proto::containerd::services::namespaces::v1::namespaces_server::{Namespaces, NamespacesServer};
use speedy::proto::containerd::types;
use tempfile::TempDir;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::support::digest;
use crate::support::runtime;

type Reply<T> = Result<Response<T>, Status>;
type Stream_<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the stand-in has, in namespace `test` only.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    /// Sizes that it claims instead of the real ones.
    claims: BTreeMap<String, i64>,
    pub(super) labels: HashMap<String, String>,
    pub(super) images: BTreeMap<String, String>,
    root: Option<PathBuf>,
    leases: BTreeMap<String, (String, Vec<String>)>,
    reads: usize,
    filters: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Fake(pub(super) Arc<Mutex<State>>);

impl Fake {
    fn state<T>(&self, request: &Request<T>) -> Result<std::sync::MutexGuard<'_, State>, Status> {
        match request.metadata().get("containerd-namespace").and_then(|name| name.to_str().ok()) {
            Some("test") => Ok(self.0.lock().unwrap()),
            Some(_) => Err(Status::not_found("another namespace")),
            None => Err(Status::failed_precondition("namespace is required")),
        }
    }
}

impl State {
    fn info(&self, digest: &str) -> Result<content::Info, Status> {
        let blob = self.blobs.get(digest).ok_or_else(|| Status::not_found("no such blob"))?;
        let size = self.claims.get(digest).copied().unwrap_or_else(|| i64::try_from(blob.len()).unwrap());
        Ok(content::Info {
            digest: digest.to_owned(),
            size,
            labels: self.labels.clone(),
            ..Default::default()
        })
    }
}

#[tonic::async_trait]
impl Content for Fake {
    async fn info(&self, request: Request<content::InfoRequest>) -> Reply<content::InfoResponse> {
        let info = self.state(&request)?.info(&request.get_ref().digest)?;
        Ok(Response::new(content::InfoResponse { info: Some(info) }))
    }

    type ListStream = Stream_<content::ListContentResponse>;
    async fn list(&self, request: Request<content::ListContentRequest>) -> Reply<Self::ListStream> {
        let mut state = self.state(&request)?;
        state.filters.extend(request.into_inner().filters);
        let infos: Vec<_> = state.blobs.keys().map(|digest| state.info(digest).unwrap()).collect();
        let parts = infos.into_iter().map(|info| Ok(content::ListContentResponse { info: vec![info] }));
        Ok(Response::new(Box::pin(tokio_stream::iter(parts.collect::<Vec<_>>()))))
    }

    type ReadStream = Stream_<content::ReadContentResponse>;
    async fn read(&self, request: Request<content::ReadContentRequest>) -> Reply<Self::ReadStream> {
        let mut state = self.state(&request)?;
        state.reads += 1;
        let blob =
            state.blobs.get(&request.get_ref().digest).ok_or_else(|| Status::not_found("no such blob"))?;
        let part = |data: &[u8]| Ok(content::ReadContentResponse { offset: 0, data: data.to_vec() });
        // An empty part is no end.
        let parts: Vec<_> = blob.chunks(3).flat_map(|data| [part(data), part(b"")]).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    type WriteStream = Stream_<content::WriteContentResponse>;
    async fn write(&self, _: Request<Streaming<content::WriteContentRequest>>) -> Reply<Self::WriteStream> {
        Err(Status::unimplemented(""))
    }
    async fn update(&self, _: Request<content::UpdateRequest>) -> Reply<content::UpdateResponse> {
        Err(Status::unimplemented(""))
    }
    async fn delete(&self, _: Request<content::DeleteContentRequest>) -> Reply<()> {
        Err(Status::unimplemented(""))
    }
    async fn status(&self, _: Request<content::StatusRequest>) -> Reply<content::StatusResponse> {
        Err(Status::unimplemented(""))
    }
    async fn list_statuses(
        &self,
        _: Request<content::ListStatusesRequest>,
    ) -> Reply<content::ListStatusesResponse> {
        Err(Status::unimplemented(""))
    }
    async fn abort(&self, _: Request<content::AbortRequest>) -> Reply<()> {
        Err(Status::unimplemented(""))
    }
}

fn image(name: &str, digest: &str) -> images::Image {
    let target =
        types::Descriptor { media_type: "m".into(), digest: digest.into(), size: 7, ..Default::default() };
    images::Image { name: name.to_owned(), target: Some(target), ..Default::default() }
}

#[tonic::async_trait]
impl Images for Fake {
    async fn get(&self, request: Request<images::GetImageRequest>) -> Reply<images::GetImageResponse> {
        let state = self.state(&request)?;
        let name = &request.get_ref().name;
        let digest = state.images.get(name).ok_or_else(|| Status::not_found("no such image"))?;
        Ok(Response::new(images::GetImageResponse { image: Some(image(name, digest)) }))
    }
    async fn list(&self, request: Request<images::ListImagesRequest>) -> Reply<images::ListImagesResponse> {
        let state = self.state(&request)?;
        let images = state.images.iter().map(|(name, digest)| image(name, digest)).collect();
        Ok(Response::new(images::ListImagesResponse { images }))
    }
    async fn create(&self, _: Request<images::CreateImageRequest>) -> Reply<images::CreateImageResponse> {
        Err(Status::unimplemented(""))
    }
    async fn update(&self, _: Request<images::UpdateImageRequest>) -> Reply<images::UpdateImageResponse> {
        Err(Status::unimplemented(""))
    }
    async fn delete(&self, _: Request<images::DeleteImageRequest>) -> Reply<()> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Namespaces for Fake {
    async fn list(
        &self,
        _: Request<namespaces::ListNamespacesRequest>,
    ) -> Reply<namespaces::ListNamespacesResponse> {
        let namespace = namespaces::Namespace { name: "test".into(), ..Default::default() };
        Ok(Response::new(namespaces::ListNamespacesResponse { namespaces: vec![namespace] }))
    }
    async fn get(
        &self,
        _: Request<namespaces::GetNamespaceRequest>,
    ) -> Reply<namespaces::GetNamespaceResponse> {
        Err(Status::unimplemented(""))
    }
    async fn create(
        &self,
        _: Request<namespaces::CreateNamespaceRequest>,
    ) -> Reply<namespaces::CreateNamespaceResponse> {
        Err(Status::unimplemented(""))
    }
    async fn update(
        &self,
        _: Request<namespaces::UpdateNamespaceRequest>,
    ) -> Reply<namespaces::UpdateNamespaceResponse> {
        Err(Status::unimplemented(""))
    }
    async fn delete(&self, _: Request<namespaces::DeleteNamespaceRequest>) -> Reply<()> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Leases for Fake {
    async fn create(&self, request: Request<leases::CreateRequest>) -> Reply<leases::CreateResponse> {
        let mut state = self.state(&request)?;
        let leases::CreateRequest { id, labels } = request.into_inner();
        if state.leases.contains_key(&id) {
            return Err(Status::already_exists("lease"));
        }
        let expire = labels.get("containerd.io/gc.expire").cloned().unwrap_or_default();
        state.leases.insert(id, (expire, Vec::new()));
        Ok(Response::new(leases::CreateResponse { lease: None }))
    }
    async fn delete(&self, request: Request<leases::DeleteRequest>) -> Reply<()> {
        let removed = self.state(&request)?.leases.remove(&request.get_ref().id);
        removed.map(|_| Response::new(())).ok_or_else(|| Status::not_found("lease"))
    }
    async fn add_resource(&self, request: Request<leases::AddResourceRequest>) -> Reply<()> {
        let mut state = self.state(&request)?;
        let leases::AddResourceRequest { id, resource } = request.into_inner();
        let resource = resource.unwrap();
        assert_eq!(resource.r#type, "content");
        let lease = state.leases.get_mut(&id).ok_or_else(|| Status::not_found("lease"))?;
        lease.1.push(resource.id);
        Ok(Response::new(()))
    }
    async fn list(&self, _: Request<leases::ListRequest>) -> Reply<leases::ListResponse> {
        Err(Status::unimplemented(""))
    }
    async fn delete_resource(&self, _: Request<leases::DeleteResourceRequest>) -> Reply<()> {
        Err(Status::unimplemented(""))
    }
    async fn list_resources(
        &self,
        _: Request<leases::ListResourcesRequest>,
    ) -> Reply<leases::ListResourcesResponse> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Introspection for Fake {
    async fn plugins(
        &self,
        request: Request<introspection::PluginsRequest>,
    ) -> Reply<introspection::PluginsResponse> {
        let state = self.state(&request)?;
        assert_eq!(request.get_ref().filters, ["type==io.containerd.content.v1,id==content"]);
        let exports = state.root.iter().map(|root| ("root".to_owned(), root.display().to_string())).collect();
        let plugin = introspection::Plugin { exports, ..Default::default() };
        Ok(Response::new(introspection::PluginsResponse { plugins: vec![plugin] }))
    }
    async fn server(&self, _: Request<()>) -> Reply<introspection::ServerResponse> {
        Err(Status::unimplemented(""))
    }
    async fn plugin_info(
        &self,
        _: Request<introspection::PluginInfoRequest>,
    ) -> Reply<introspection::PluginInfoResponse> {
        Err(Status::unimplemented(""))
    }
}

/// A stand-in that serves as long as the returned values live.
pub(super) async fn start(state: State) -> (Fake, Containerd, TempDir, tokio::task::JoinSet<()>) {
    let (fake, dir) = (Fake(Arc::new(Mutex::new(state))), tempfile::tempdir().unwrap());
    let socket = dir.path().join("containerd.sock");
    let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(ContentServer::new(fake.clone()))
        .add_service(ImagesServer::new(fake.clone()))
        .add_service(NamespacesServer::new(fake.clone()))
        .add_service(LeasesServer::new(fake.clone()))
        .add_service(IntrospectionServer::new(fake.clone()));
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(async move { server.serve_with_incoming(listener).await.unwrap() });
    let client = Containerd::open(&socket, "test").await.unwrap();
    (fake, client, dir, serving)
}

fn with_blob(text: &str) -> (State, Digest) {
    let mut state = State::default();
    let digest = digest(text);
    state.blobs.insert(digest.to_string(), text.as_bytes().to_vec());
    (state, digest)
}

#[test]
fn a_blob_is_read_through_the_service_and_from_its_file() {
    runtime().block_on(async {
        let (mut state, digest) = with_blob("the bytes of a blob");
        let root = tempfile::tempdir().unwrap();
        state.root = Some(root.path().to_owned());
        let (fake, client, _dir, _serving) = start(state).await;
        let read = async |root: Option<PathBuf>| {
            let mut blob = client.open_blob(&digest, root.as_deref()).await.unwrap();
            let is_file = blob.is_file();
            let read = tokio::task::spawn_blocking(move || {
                let mut text = String::new();
                blob.read_to_string(&mut text).unwrap();
                text
            });
            assert_eq!(read.await.unwrap(), "the bytes of a blob");
            is_file
        };
        let told = client.content_root().await;
        assert_eq!(told.as_deref(), Some(root.path()));
        assert!(!read(None).await);
        assert!(!read(told.clone()).await, "there is no file");
        let blobs = root.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(&digest.as_str()[7..]), "the bytes of").unwrap();
        assert!(!read(told.clone()).await, "the file is not whole");
        let reads = fake.0.lock().unwrap().reads;
        std::fs::write(blobs.join(&digest.as_str()[7..]), "the bytes of a blob").unwrap();
        assert!(read(told.clone()).await);
        assert_eq!(fake.0.lock().unwrap().reads, reads);

        // Another namespace does not get the file because it is there.
        let other = client.in_namespace("other").unwrap();
        let refused = other.open_blob(&digest, told.as_deref()).await;
        assert!(matches!(refused, Err(ContainerdError::NoBlob { .. })));
    });
}

#[test]
fn a_document_is_bounded_and_checked() {
    runtime().block_on(async {
        let (mut state, digest) = with_blob("{\"a\": \"document\"}");
        let (liar, shrunk) = (super::support::digest("liar"), super::support::digest("shrunk"));
        state.blobs.insert(liar.to_string(), b"something else".to_vec());
        state.blobs.insert(shrunk.to_string(), vec![0; 4000]);
        state.claims.insert(shrunk.to_string(), 10);
        let (_fake, client, _dir, _serving) = start(state).await;
        assert_eq!(client.read(&digest, 100).await.unwrap().as_ref(), b"{\"a\": \"document\"}");
        let large = client.read(&digest, 10).await.unwrap_err();
        assert!(matches!(large, ContainerdError::BlobTooLarge { size: 17, limit: 10, .. }), "{large}");
        for damaged in [liar, shrunk] {
            let error = client.read(&damaged, 100).await.unwrap_err();
            assert!(matches!(error, ContainerdError::DamagedBlob { .. }), "{error}");
        }
        let missing = client.read(&super::support::digest("missing"), 100).await.unwrap_err();
        assert!(matches!(missing, ContainerdError::NoBlob { .. }), "{missing}");
    });
}

#[test]
fn blobs_are_found_by_what_they_unpack_to() {
    runtime().block_on(async {
        let (mut state, wanted) = with_blob("blob");
        state.labels.insert("containerd.io/uncompressed".into(), digest("diff").to_string());
        state.blobs.insert("sha512:00".into(), Vec::new());
        let (fake, client, _dir, _serving) = start(state).await;
        let found = client.blob_of_diff(&digest("diff")).await.unwrap().unwrap();
        assert_eq!((found.digest, found.size), (wanted, 4));
        let filter = format!("labels.\"containerd.io/uncompressed\"=={}", digest("diff"));
        assert_eq!(fake.0.lock().unwrap().filters, [filter]);
        // What is no SHA-256 is passed over.
        assert_eq!(client.blobs("", 100).await.unwrap().len(), 1);
    });
}

#[test]
fn images_are_found_by_their_names() {
    runtime().block_on(async {
        let mut state = State::default();
        let target = digest("manifest");
        state.images.insert("docker.io/library/app:1".into(), target.to_string());
        state.images.insert("registry.example/odd:1".into(), "sha512:00".into());
        let (_fake, client, _dir, _serving) = start(state).await;
        let image = client.image("docker.io/library/app:1").await.unwrap().unwrap();
        assert_eq!(image.target, Descriptor { media_type: "m".into(), digest: target, size: 7 });
        assert_eq!(client.image("app:1").await.unwrap(), None);
        assert_eq!(client.images().await.unwrap(), [image]);
    });
}

#[test]
fn a_lease_keeps_blobs_until_it_ends() {
    runtime().block_on(async {
        let (fake, client, _dir, _serving) = start(State::default()).await;
        client.create_lease("speedy-1", Duration::from_secs(60)).await.unwrap();
        client.lease_blob("speedy-1", &digest("blob")).await.unwrap();
        // Made again after a restart: what it keeps, it keeps.
        client.create_lease("speedy-1", Duration::from_secs(60)).await.unwrap();
        let (expire, kept) = fake.0.lock().unwrap().leases["speedy-1"].clone();
        assert_eq!(kept, [digest("blob").to_string()]);
        assert!(expire.len() == 20 && expire.ends_with('Z') && expire.starts_with("20"), "{expire}");
        client.delete_lease("speedy-1").await.unwrap();
        client.delete_lease("speedy-1").await.unwrap();
        assert!(fake.0.lock().unwrap().leases.is_empty());
        let lost = client.lease_blob("speedy-1", &digest("blob")).await.unwrap_err();
        assert!(matches!(lost, ContainerdError::Call(_)), "{lost}");
    });
}

#[test]
fn names_that_no_header_can_hold_are_refused() {
    runtime().block_on(async {
        let (_fake, client, dir, _serving) = start(State::default()).await;
        for bad in ["", "a\nb", "\u{7f}"] {
            assert!(matches!(client.in_namespace(bad), Err(ContainerdError::BadName(_))), "{bad:?}");
            assert!(matches!(client.under_lease(bad), Err(ContainerdError::BadName(_))), "{bad:?}");
        }
        assert_eq!(client.namespace(), "test");
        let nobody = Containerd::open(&dir.path().join("nobody"), "test").await;
        assert!(matches!(nobody, Err(ContainerdError::Connect(_))));
    });
}
