//! S3 credentials from a file that somebody replaces while we run: AWS's shared credentials file.
//!
//! The file is looked at once a second while requests are made, and read again when it is another one; and at once after the
//! store has refused a request, which is then made again if the file had something new. So keys rotate without a restart, in
//! whatever order they are replaced in the file and in the store.
//!
//! **When it fails.** A file that cannot be read or understood any more leaves the credentials that were read last in use. Its
//! words, which are secrets, are in no message.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::open::Settings;
use crate::sys::blocking;

/// How old what is known of the file may be.
const LOOK: Duration = Duration::from_secs(1);
/// No credentials file has more bytes.
const LONGEST: u64 = 1 << 20;

/// The credentials of one profile of a file. Cheap to clone.
#[derive(Clone)]
pub(super) struct FileCredentials(Arc<Shared>);

struct Shared {
    file: PathBuf,
    profile: String,
    /// How often other credentials were found.
    generation: AtomicU64,
    known: Mutex<Known>,
    /// Only one looks at the file at a time.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    credential: Option<Arc<AwsCredential>>,
    looked: Option<Instant>,
    stamp: Option<Stamp>,
}

/// What tells one file from another of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Why a file gives no credentials. Holds nothing of what is in it.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("has more than {LONGEST} bytes")]
    TooLong,
    #[error("has no profile {0:?}; AWS_PROFILE names another")]
    NoProfile(String),
    #[error("has no {1} for profile {0:?}")]
    NoKey(String, &'static str),
}

impl From<tokio::task::JoinError> for Problem {
    fn from(error: tokio::task::JoinError) -> Problem {
        Problem::Read(std::io::Error::other(error))
    }
}

/// Without the credentials.
impl fmt::Debug for FileCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileCredentials").field("file", &self.0.file).finish_non_exhaustive()
    }
}

impl FileCredentials {
    /// Those that the settings name, unless they have keys of their own.
    pub(super) fn of(settings: &Settings) -> Option<FileCredentials> {
        if settings.get("AWS_ACCESS_KEY_ID").is_some() {
            return None;
        }
        let file = settings.get("AWS_SHARED_CREDENTIALS_FILE")?;
        let profile = settings.get("AWS_PROFILE").unwrap_or("default");
        Some(FileCredentials(Arc::new(Shared {
            file: file.into(),
            profile: profile.to_owned(),
            generation: AtomicU64::new(0),
            known: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        })))
    }

    /// Another number after other credentials were found.
    pub(super) fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Whether there are other credentials than those that were in use when [`FileCredentials::generation`] answered `before`;
    /// looks at the file if need be.
    pub(super) async fn are_newer_than(&self, before: u64) -> bool {
        if self.generation() == before {
            let _turn = self.0.turn.lock().await;
            if self.generation() == before {
                self.look().await;
            }
        }
        self.generation() != before
    }

    async fn current(&self) -> Result<Arc<AwsCredential>, Problem> {
        if let Some(fresh) = self.0.known.lock().fresh() {
            return Ok(fresh);
        }
        let _turn = self.0.turn.lock().await;
        if let Some(fresh) = self.0.known.lock().fresh() {
            return Ok(fresh);
        }
        let problem = self.look().await;
        match (self.0.known.lock().credential.clone(), problem) {
            (Some(credential), _) => Ok(credential),
            (None, Some(problem)) => Err(problem),
            (None, None) => Err(Problem::NoProfile(self.0.profile.clone())),
        }
    }

    /// Looks whether the file is another one, and takes what it says then; answers what is wrong with it.
    async fn look(&self) -> Option<Problem> {
        let shared = Arc::clone(&self.0);
        let seen = self.0.known.lock().stamp;
        let read = blocking(move || shared.read(seen)).await;
        let mut known = self.0.known.lock();
        known.looked = Some(Instant::now());
        match read {
            Ok(None) => None,
            Ok(Some((stamp, Ok(credential)))) => {
                known.stamp = Some(stamp);
                if known.credential.as_deref() != Some(&credential) {
                    let again = known.credential.replace(Arc::new(credential)).is_some();
                    self.0.generation.fetch_add(1, Ordering::AcqRel);
                    tracing::info!(file = %self.0.file.display(), again, "credentials of the store were read");
                }
                None
            }
            Ok(Some((stamp, Err(problem)))) => {
                known.stamp = Some(stamp);
                self.complain(&problem, &known);
                // It is said again to whoever has nothing else.
                known.stamp = known.stamp.filter(|_| known.credential.is_some());
                Some(problem)
            }
            Err(problem) => {
                if known.stamp.take().is_some() {
                    self.complain(&problem, &known);
                }
                Some(problem)
            }
        }
    }

    fn complain(&self, problem: &Problem, known: &Known) {
        let file = self.0.file.display();
        if known.credential.is_some() {
            tracing::warn!(%file, %problem, "the credentials file of the store is of no use; those that were read before are used");
        }
    }
}

impl Known {
    fn fresh(&self) -> Option<Arc<AwsCredential>> {
        let is_fresh = self.looked.is_some_and(|at| at.elapsed() < LOOK);
        self.credential.clone().filter(|_| is_fresh)
    }
}

impl Shared {
    /// What the file says, if it is another one than `seen`. Blocking.
    #[expect(clippy::type_complexity, reason = "a file that is there may still be of no use")]
    fn read(&self, seen: Option<Stamp>) -> Result<Option<(Stamp, Result<AwsCredential, Problem>)>, Problem> {
        let file = std::fs::File::open(&self.file)?;
        let stamp = Stamp::of(&file.metadata()?);
        if seen == Some(stamp) {
            return Ok(None);
        }
        let mut text = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut text)?;
        if text.len() as u64 > LONGEST {
            return Ok(Some((stamp, Err(Problem::TooLong))));
        }
        Ok(Some((stamp, parse(&String::from_utf8_lossy(&text), &self.profile))))
    }
}

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Stamp {
        Stamp { inode: meta.ino(), size: meta.size(), changed: (meta.ctime(), meta.ctime_nsec()) }
    }
}

/// The credentials of a profile: `[profile]`, then `name = value` lines; comments begin a line with `#` or `;`.
fn parse(text: &str, profile: &str) -> Result<AwsCredential, Problem> {
    let (mut inside, mut found) = (false, false);
    let (mut key_id, mut secret_key, mut token) = (None, None, None);
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(name, _)| name)
        {
            inside = name.trim() == profile;
            found |= inside;
            continue;
        }
        let Some((name, value)) = line.split_once('=').filter(|_| inside) else { continue };
        let value = Some(value.trim()).filter(|value| !value.is_empty()).map(str::to_owned);
        match name.trim().to_ascii_lowercase().as_str() {
            "aws_access_key_id" => key_id = value,
            "aws_secret_access_key" => secret_key = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    let missing = |what| match found {
        true => Problem::NoKey(profile.to_owned(), what),
        false => Problem::NoProfile(profile.to_owned()),
    };
    let key_id = key_id.ok_or_else(|| missing("aws_access_key_id"))?;
    let secret_key = secret_key.ok_or_else(|| missing("aws_secret_access_key"))?;
    Ok(AwsCredential { key_id, secret_key, token })
}

#[async_trait::async_trait]
impl CredentialProvider for FileCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.current().await.map_err(|problem| {
            let path = self.0.file.display().to_string();
            let source = format!("the credentials file {path} {problem}").into();
            Error::Unauthenticated { path, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# rotated\n[other]\naws_access_key_id = NO\naws_secret_access_key=no\n\n[ default ]\n\
                        region = x\naws_access_key_id=AK\n;aws_access_key_id=WRONG\naws_secret_access_key = se=cret\r\n\
                        [ops]\naws_access_key_id = OPS\naws_secret_access_key = ops\naws_session_token = tok\n";

    fn credential(key_id: &str, secret_key: &str, token: Option<&str>) -> AwsCredential {
        let (key_id, secret_key) = (key_id.to_owned(), secret_key.to_owned());
        AwsCredential { key_id, secret_key, token: token.map(str::to_owned) }
    }

    fn of(file: &std::path::Path, more: &[(&str, &str)]) -> Option<FileCredentials> {
        let file = ("AWS_SHARED_CREDENTIALS_FILE".to_owned(), file.display().to_string());
        let more = more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        FileCredentials::of(&std::iter::once(file).chain(more).collect())
    }

    #[test]
    fn a_profile_is_read_as_others_read_it() {
        assert_eq!(parse(FILE, "default").unwrap(), credential("AK", "se=cret", None));
        assert_eq!(parse(FILE, "ops").unwrap(), credential("OPS", "ops", Some("tok")));
        let refused = |text: &str, profile: &str| parse(text, profile).unwrap_err().to_string();
        assert_eq!(refused(FILE, "dev"), "has no profile \"dev\"; AWS_PROFILE names another");
        let half = "[default]\naws_access_key_id = AK\naws_secret_access_key =\n";
        assert_eq!(refused(half, "default"), "has no aws_secret_access_key for profile \"default\"");
        assert!(matches!(parse("\0\u{1b}[[[=]=", "default"), Err(Problem::NoProfile(_))));
    }

    #[test]
    fn keys_of_the_environment_win() {
        let path = std::path::Path::new("/nowhere");
        assert!(of(path, &[("AWS_ACCESS_KEY_ID", "AK")]).is_none());
        assert!(FileCredentials::of(&Settings::default()).is_none());
        let debug = format!("{:?}", of(path, &[]).unwrap());
        assert!(debug.contains("/nowhere"), "{debug}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_replaced_is_read_again_and_one_that_is_spoilt_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let replace = |text: &str| {
            std::fs::write(dir.path().join("new"), text).unwrap();
            std::fs::rename(dir.path().join("new"), &path).unwrap();
        };
        let file = of(&path, &[("AWS_PROFILE", "ops")]).unwrap();
        let said = file.get_credential().await.unwrap_err().to_string();
        assert!(said.contains("cannot be read") && said.contains("credentials file"), "{said}");
        replace(FILE);
        assert_eq!(*file.get_credential().await.unwrap(), credential("OPS", "ops", Some("tok")));
        let first = file.generation();

        replace("[ops]\naws_access_key_id = A2\naws_secret_access_key = s2\n");
        assert_eq!(file.get_credential().await.unwrap().key_id, "OPS", "not looked at each time");
        tokio::time::advance(LOOK).await;
        assert_eq!(*file.get_credential().await.unwrap(), credential("A2", "s2", None));
        assert_ne!(file.generation(), first);

        for useless in ["", "[ops]\naws_access_key_id = A3\n", &"x".repeat((1 << 20) + 1)] {
            replace(useless);
            tokio::time::advance(LOOK).await;
            assert_eq!(file.get_credential().await.unwrap().key_id, "A2");
        }
        std::fs::remove_file(&path).unwrap();
        tokio::time::advance(LOOK).await;
        assert_eq!(file.get_credential().await.unwrap().key_id, "A2");

        // A refusal of the store makes it look at once.
        let before = file.generation();
        assert!(!file.are_newer_than(before).await);
        replace("[ops]\naws_access_key_id = A4\naws_secret_access_key = s4\n");
        assert!(file.are_newer_than(before).await);
        assert_eq!(file.get_credential().await.unwrap().key_id, "A4");
    }
}
