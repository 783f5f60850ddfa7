//! From a URL and settings to a store.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use tokio::sync::OnceCell;
use url::Url;

use super::credentials::FileCredentials;
use super::failure::{Failure, of_io};
use super::{ObjectError, StoreOptions};
use crate::sys::blocking;

/// Endpoints and credentials, by the names of environment variables: `AWS_*`, `GOOGLE_*`, `AZURE_*`.
#[derive(Clone, Default)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Those of the environment that concern object stores and are not empty.
    pub fn from_env() -> Settings {
        let of_stores =
            |name: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
        let pairs =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        pairs.filter(|(name, _)| of_stores(name)).collect()
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn parsed<K: std::str::FromStr>(&self) -> impl Iterator<Item = (K, &String)> {
        self.0.iter().filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value)))
    }
}

impl FromIterator<(String, String)> for Settings {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Settings {
        Settings(pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect())
    }
}

/// Names only: the values are secrets.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The store behind the calls.
pub(super) enum Engine {
    /// Asked over the network, or in memory.
    Remote(Arc<dyn ObjectStore>),
    /// A directory, looked at when it is first used: it may be on a file server that does not answer now.
    Directory { root: PathBuf, opened: OnceCell<Arc<LocalFileSystem>> },
}

/// What a URL stands for.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) engine: Engine,
    pub(super) prefix: Path,
    /// What is added to a refusal.
    pub(super) hint: Option<&'static str>,
    /// Those that may become others.
    pub(super) credentials: Option<FileCredentials>,
}

impl Opened {
    /// Without a prefix and without credentials.
    pub(super) fn plain(engine: Engine) -> Opened {
        Opened { engine, prefix: Path::default(), hint: None, credentials: None }
    }
}

pub(super) fn open(text: &str, options: &StoreOptions) -> Result<Opened, ObjectError> {
    let wrong = |problem: String| ObjectError::Url { url: without_secrets(text), problem };
    let url = Url::parse(text).map_err(|error| wrong(format!("{error}; expected {EXPECTED}")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong(
            "credentials do not belong into the URL; use the environment (AWS_ACCESS_KEY_ID, ...)".into(),
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("a store's URL has no query and no fragment".into()));
    }
    if url.scheme() == "file" {
        let root = url.to_file_path().map_err(|()| wrong("expected file:///DIR".into()))?;
        if url.host_str().is_some_and(|host| !host.is_empty()) || root == FilePath::new("/") {
            return Err(wrong("expected file:///DIR, a directory for the store alone".into()));
        }
        return Ok(Opened::plain(Engine::Directory { root, opened: OnceCell::new() }));
    }
    let bucket = url
        .host_str()
        .filter(|host| !host.is_empty())
        .ok_or_else(|| wrong(format!("names no bucket; expected {EXPECTED}")))?;
    if url.port().is_some() {
        return Err(wrong("the endpoint is given by AWS_ENDPOINT_URL, not by the URL".into()));
    }
    let prefix = Path::from_url_path(url.path()).map_err(|error| wrong(error.to_string()))?;
    let (mut hint, mut credentials) = (None, None);
    let store: Result<Arc<dyn ObjectStore>, _> = match url.scheme() {
        "s3" => {
            (hint, credentials) = (s3_hint(&options.settings), FileCredentials::of(&options.settings));
            s3(bucket, options, credentials.clone()).map(|s| Arc::new(s) as _)
        }
        "gs" => gcs(bucket, options).map(|s| Arc::new(s) as _),
        "az" | "azure" => azure(bucket, options).map(|s| Arc::new(s) as _),
        other => return Err(wrong(format!("{other} is no kind of store; expected {EXPECTED}"))),
    };
    let store = store.map_err(|error| match Failure::from(error) {
        Failure::Transient(problem) | Failure::TooSoon(problem) => wrong(problem),
        Failure::Final(error) => wrong(error.to_string()),
    })?;
    Ok(Opened { engine: Engine::Remote(store), prefix, hint, credentials })
}

const EXPECTED: &str = "file:///DIR, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX";

fn without_secrets(text: &str) -> String {
    let plain = text.split(['?', '#']).next().unwrap_or_default();
    match (plain.find("://"), plain.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &plain[..scheme], &plain[at..]),
        _ => plain.to_owned(),
    }
}

fn client(options: &StoreOptions) -> ClientOptions {
    // Time is watched by the calls, which know what is awaited; a limit for whole answers would cut off slow links.
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(options.attempt.min(Duration::from_secs(5)))
        .with_pool_idle_timeout(Duration::from_secs(50))
}

fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn s3(
    bucket: &str,
    options: &StoreOptions,
    credentials: Option<FileCredentials>,
) -> object_store::Result<object_store::aws::AmazonS3> {
    let settings = &options.settings;
    let endpoint = settings.get("AWS_ENDPOINT_URL_S3").or_else(|| settings.get("AWS_ENDPOINT_URL"));
    let plain_http = endpoint.is_some_and(|url| url.starts_with("http://"));
    let mut builder = AmazonS3Builder::new()
        .with_client_options(client(options))
        // TLS keeps the bytes whole; SHA-256 of every body would only cost time. Without TLS it is what guards them.
        .with_unsigned_payload(!plain_http)
        // One by one: not every S3 has the call that deletes many.
        .with_disable_bulk_delete(true);
    for (key, value) in settings.parsed::<AmazonS3ConfigKey>() {
        builder = builder.with_config(key, value);
    }
    if plain_http {
        builder = builder.with_allow_http(true);
    }
    if s3_hint(settings).is_some() && endpoint.is_some() {
        // Not Amazon's, so there is no instance metadata to ask for credentials: try as anybody.
        builder = builder.with_skip_signature(true);
    }
    if let Some(credentials) = credentials {
        builder = builder.with_credentials(Arc::new(credentials));
    }
    builder.with_retry(no_retries()).with_bucket_name(bucket).build()
}

/// Said with a refusal when there was nothing to identify us with.
fn s3_hint(settings: &Settings) -> Option<&'static str> {
    const SOURCES: [&str; 6] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_METADATA_ENDPOINT",
    ];
    let none = SOURCES.iter().all(|name| settings.get(name).is_none());
    none.then_some(
        "no credentials are set: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE",
    )
}

fn gcs(bucket: &str, options: &StoreOptions) -> object_store::Result<object_store::gcp::GoogleCloudStorage> {
    let mut builder = GoogleCloudStorageBuilder::new().with_client_options(client(options));
    for (key, value) in options.settings.parsed::<GoogleConfigKey>() {
        builder = builder.with_config(key, value);
    }
    builder.with_retry(no_retries()).with_bucket_name(bucket).build()
}

fn azure(
    container: &str,
    options: &StoreOptions,
) -> object_store::Result<object_store::azure::MicrosoftAzure> {
    let mut builder = MicrosoftAzureBuilder::new().with_client_options(client(options));
    for (key, value) in options.settings.parsed::<AzureConfigKey>() {
        builder = builder.with_config(key, value);
    }
    if options.settings.get("AZURE_STORAGE_ENDPOINT").is_some_and(|url| url.starts_with("http://")) {
        builder = builder.with_allow_http(true);
    }
    builder.with_retry(no_retries()).with_container_name(container).build()
}

/// Without the client's configuration, which holds credentials.
impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Engine::Remote(store) => write!(f, "{store}"),
            Engine::Directory { root, .. } => write!(f, "{}", root.display()),
        }
    }
}

impl Engine {
    /// The store; a directory is made at its first use.
    pub(super) async fn store(&self) -> Result<Arc<dyn ObjectStore>, Failure> {
        match self {
            Engine::Remote(store) => Ok(Arc::clone(store)),
            Engine::Directory { root, opened } => {
                let opened = opened.get_or_try_init(|| open_directory(root.clone())).await?;
                Ok(Arc::clone(opened) as _)
            }
        }
    }

    /// Whether a second request could be answered sooner than the first.
    pub(super) fn is_worth_hedging(&self) -> bool {
        matches!(self, Engine::Remote(_))
    }

    /// Where all files are, if objects are files.
    pub(super) fn top(&self) -> Option<PathBuf> {
        match self {
            Engine::Remote(_) => None,
            Engine::Directory { root, .. } => Some(root.clone()),
        }
    }

    /// The file of an object, if objects are files.
    pub(super) async fn file(&self, name: &Path) -> Result<Option<PathBuf>, Failure> {
        let Engine::Directory { root, opened } = self else { return Ok(None) };
        let opened = opened.get_or_try_init(|| open_directory(root.clone())).await?;
        Ok(Some(opened.path_to_filesystem(name)?))
    }
}

/// Only its owner may look in: chunks are pieces of images that not every local user may read. A directory that is there
/// keeps its mode.
async fn open_directory(root: PathBuf) -> Result<Arc<LocalFileSystem>, Failure> {
    let open = move || {
        let missing = !root.exists();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(|error| failed(&error))?;
        if let (true, Some(above)) = (missing, root.parent()) {
            std::fs::File::open(above).and_then(|dir| dir.sync_all()).map_err(|error| failed(&error))?;
        }
        let store = LocalFileSystem::new_with_prefix(&root)?;
        Ok(Arc::new(store.with_fsync(true)))
    };
    blocking(open).await
}

/// An error of a directory's own.
pub(super) fn failed(error: &std::io::Error) -> Failure {
    of_io(error).unwrap_or_else(|| Failure::Transient(error.to_string()))
}
