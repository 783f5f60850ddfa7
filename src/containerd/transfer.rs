//! Blobs of an image, fetched by containerd's own transfer service: with its configuration of registries, its retries, and its
//! checks of every digest.
//!
//! Source: containerd's `core/transfer/registry` (the stream on which it asks for credentials) and `core/transfer/local/pull.go`.
//! An image store without unpacking as the destination has every blob fetched that is not there.

use std::fmt;

use prost::Message;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::image::Image;
use super::manifest::Platform;
use super::{Containerd, ContainerdError, MESSAGE_LIMIT};
use crate::proto::containerd::services::streaming::v1::StreamInit;
use crate::proto::containerd::services::streaming::v1::streaming_client::StreamingClient;
use crate::proto::containerd::services::transfer::v1::TransferRequest;
use crate::proto::containerd::services::transfer::v1::transfer_client::TransferClient;
use crate::proto::containerd::types;
use crate::proto::containerd::types::transfer::{
    AuthRequest, AuthResponse, AuthType, ImageStore, OciRegistry, RegistryResolver,
};

/// Who somebody is to a registry.
#[derive(Clone)]
pub struct Credentials {
    /// The host that is told of them, and no other: a mirror that asks too gets nothing.
    pub host: String,
    /// The name; empty where the secret is a token.
    pub user: String,
    /// The password or the token.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({} at {})", self.user, self.host)
    }
}

/// What is to be fetched, and how the registry is reached.
#[derive(Debug, Clone)]
pub struct Fetch {
    /// From where: a full reference with a digest.
    pub reference: String,
    /// For which platform.
    pub platform: Platform,
    /// Where containerd looks for its configuration of registries; empty for nowhere.
    pub hosts_dir: String,
    /// For registries that want to know.
    pub credentials: Option<Credentials>,
}

impl Containerd {
    /// Has containerd fetch every blob of an image that it does not have; the image stays what it is. Takes as long as it takes, and
    /// containerd stops when this is dropped.
    pub async fn fetch(&self, image: &Image, fetch: &Fetch) -> Result<(), ContainerdError> {
        let Some(credentials) = fetch.credentials.clone() else {
            return self.transfer(image, fetch, String::new()).await;
        };
        let id = format!("speedy-fetch-{}-{}", std::process::id(), image.target.digest);
        let (send, requests) = self.auth_stream(&id).await?;
        let transfer = self.transfer(image, fetch, id);
        let answering = async {
            if let Err(error) = answer(requests, &send, &credentials).await {
                tracing::debug!(%error, "containerd asks for no more credentials");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            done = transfer => done,
            () = answering => Ok(()),
        }
    }

    async fn transfer(
        &self,
        image: &Image,
        fetch: &Fetch,
        auth_stream: String,
    ) -> Result<(), ContainerdError> {
        let host_dir = fetch.hosts_dir.clone();
        let resolver = RegistryResolver { auth_stream, host_dir, ..RegistryResolver::default() };
        let reference = fetch.reference.clone();
        let source = any("OCIRegistry", &OciRegistry { reference, resolver: Some(resolver) });
        let Platform { os, architecture, variant } = fetch.platform.clone();
        let platform = types::Platform { os, architecture, variant, ..types::Platform::default() };
        // The image is stored again: with the labels that it has, or they would be gone.
        let (name, labels) = (image.name.clone(), image.labels.clone());
        let store = ImageStore { name, labels, platforms: vec![platform], ..ImageStore::default() };
        let destination = any("ImageStore", &store);
        let request = TransferRequest { source: Some(source), destination: Some(destination), options: None };
        let mut client = TransferClient::new(self.channel.clone());
        client.transfer(self.stream(request)).await?;
        Ok(())
    }

    /// A stream on which containerd asks for credentials, and the way to answer.
    async fn auth_stream(&self, id: &str) -> Result<(mpsc::Sender<Any>, Streaming<Any>), ContainerdError> {
        let (send, sent) = mpsc::channel(4);
        let init = StreamInit { id: id.to_owned() };
        let init = Any {
            type_url: "containerd.services.streaming.v1.StreamInit".to_owned(),
            value: init.encode_to_vec(),
        };
        // There is room for it.
        drop(send.try_send(init));
        let mut client = StreamingClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let mut requests = client.stream(self.stream(ReceiverStream::new(sent))).await?.into_inner();
        // It says that the stream is known.
        requests.message().await?;
        Ok((send, requests))
    }
}

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("containerd.types.transfer.{name}"), value: message.encode_to_vec() }
}

/// Answers until containerd has no more questions.
async fn answer(
    mut requests: Streaming<Any>,
    send: &mpsc::Sender<Any>,
    credentials: &Credentials,
) -> Result<(), tonic::Status> {
    while let Some(request) = requests.message().await? {
        let Ok(request) = AuthRequest::decode(request.value.as_slice()) else { continue };
        if send.send(any("AuthResponse", &response(&request, credentials))).await.is_err() {
            break;
        }
    }
    Ok(())
}

fn response(request: &AuthRequest, credentials: &Credentials) -> AuthResponse {
    if request.host != credentials.host {
        return AuthResponse::default();
    }
    let kind = if credentials.user.is_empty() { AuthType::Refresh } else { AuthType::Credentials };
    AuthResponse {
        auth_type: kind.into(),
        username: credentials.user.clone(),
        secret: credentials.secret.clone(),
        expire_at: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_registry_itself_is_told_who_somebody_is() {
        let credentials = |user: &str| Credentials {
            host: "r.example:5000".into(),
            user: user.into(),
            secret: "secret".into(),
        };
        let request = |host: &str| AuthRequest { host: host.into(), ..AuthRequest::default() };
        let told = response(&request("r.example:5000"), &credentials("me"));
        assert_eq!((told.auth_type(), told.username.as_str()), (AuthType::Credentials, "me"));
        assert_eq!(response(&request("r.example:5000"), &credentials("")).auth_type(), AuthType::Refresh);
        for other in ["", "r.example", "mirror.example", "127.0.0.1:5051"] {
            assert_eq!(response(&request(other), &credentials("me")), AuthResponse::default());
        }
        assert!(!format!("{:?}", credentials("me")).contains("secret"));
    }
}
