//! Who may say what a layer is: ed25519 keys of publishers.
//!
//! **What.** [`PublisherKey`] is a node's own key, made at its first start; [`PublicKey`] is what others know of it, in the text
//! form `ed25519:<base64>`; [`Trust`] says whose word a node takes. The only module that knows the signature crate.
//!
//! **Where.** Called by [`super::reference`] and [`super::name`], which say what is signed, and by `cli` and `daemon`, which open
//! the key.
//!
//! **Words.** A *publisher* is whoever holds a key. A key's *id* is the first 8 bytes of its BLAKE3-256 hash in hexadecimal: the
//! last part of the names of what it signed, so that publishers never overwrite one another. It is a name and no proof: whoever
//! reads the object checks the whole key.
//!
//! **Invariants.**
//! * What is signed begins with a context text and its version, so that a signature made for one purpose is none for another.
//! * A secret key never leaves this module but into its own file, which only its owner can read.
//!
//! **When it fails.** A key file that others can read is refused: a key that may have been copied is not a key. A crash while a
//! key is made leaves no key, or a whole one, and perhaps a file `<name>.new-<digits>` beside it that can be deleted.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, KeypairBytes};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use self::base64::{decode, encode};

mod base64;

/// The name of a node's key file in its root.
pub const KEY_FILE: &str = "publisher.key";
/// What the text form of a key begins with.
const SCHEME: &str = "ed25519:";
/// More than any key file has.
const LONGEST_FILE: u64 = 16 * 1024;
/// Permission bits of a file that others than its owner can use.
const OTHERS: u32 = 0o077;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or made.
    #[error("key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than the owner can read or change it.
    #[error(
        "key file {} can be used by others (mode {mode:03o}): if nobody can have copied it, `chmod 600` it; else delete it, so that \
         a new key is made, and replace the old one in `trust.keys` of the other nodes",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else.
    #[error(
        "key file {} does not hold an ed25519 key (PKCS#8, PEM): restore it, or delete it, so that a new one is made",
        path.display()
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
}

/// Why a text or some bytes are no public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a public key: expected ed25519: and 44 characters of base64, as `speedy trust` prints them")]
pub struct PublicKeyError;

/// What is known of a publisher: its key for checking signatures, 32 bytes that are a point of the curve.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Parses `ed25519:<base64>` and nothing else.
    pub fn parse(text: &str) -> Result<PublicKey, PublicKeyError> {
        let bytes = text.strip_prefix(SCHEME).and_then(decode).ok_or(PublicKeyError)?;
        PublicKey::from_bytes(&bytes)
    }

    /// From the 32 bytes of the key. A key that is weak, so that one signature fits many messages, is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<PublicKey, PublicKeyError> {
        let bytes = <&[u8; 32]>::try_from(bytes).map_err(|_| PublicKeyError)?;
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| PublicKeyError)?;
        if key.is_weak() { Err(PublicKeyError) } else { Ok(PublicKey(*bytes)) }
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key's id: 16 hexadecimal digits.
    pub fn id(&self) -> String {
        blake3::hash(self.as_bytes()).to_hex()[..16].to_owned()
    }

    /// Whether this key signed this message in this context.
    pub(super) fn signed(&self, context: &str, message: &[u8], signature: &[u8]) -> bool {
        let (Ok(key), Ok(signature)) = (VerifyingKey::from_bytes(&self.0), Signature::from_slice(signature))
        else {
            return false;
        };
        key.verify_strict(&statement(context, message), &signature).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", encode(self.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A publisher's own key.
pub struct PublisherKey {
    secret: SigningKey,
    public: PublicKey,
}

impl fmt::Debug for PublisherKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublisherKey({})", self.public)
    }
}

impl PublisherKey {
    /// The key in this file, which is made where it is absent: PKCS#8 in PEM, as `openssl pkey` reads it, mode 0600. Durable on
    /// return; of two processes that make one at the same time, both get the same.
    pub fn open_or_create(path: &Path) -> Result<PublisherKey, KeyError> {
        match PublisherKey::open(path)? {
            Some(key) => Ok(key),
            None => {
                create(path).map_err(|source| KeyError::Io { path: path.to_owned(), source })?;
                let made = PublisherKey::open(path)?;
                made.ok_or_else(|| KeyError::Io {
                    path: path.to_owned(),
                    source: io::ErrorKind::NotFound.into(),
                })
            }
        }
    }

    /// The key in this file, or `None` where there is no file.
    pub fn open(path: &Path) -> Result<Option<PublisherKey>, KeyError> {
        let failed = |source| KeyError::Io { path: path.to_owned(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        if metadata.mode() & OTHERS != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o777 });
        }
        let mut text = String::new();
        match file.take(LONGEST_FILE).read_to_string(&mut text) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(failed(error)),
        }
        match SigningKey::from_pkcs8_pem(&text) {
            Ok(secret) => Ok(Some(PublisherKey::of(secret))),
            Err(_) => Err(KeyError::NoKey { path: path.to_owned() }),
        }
    }

    /// A key that is always the same for the same seed, for tests.
    pub fn from_seed(seed: [u8; 32]) -> PublisherKey {
        PublisherKey::of(SigningKey::from_bytes(&seed))
    }

    /// Puts it into a file where there is none, for tests.
    #[cfg(test)]
    pub(crate) fn save(&self, path: &Path) {
        save(path, self.secret.to_bytes()).expect("a test can write its key");
    }

    fn of(secret: SigningKey) -> PublisherKey {
        let public = PublicKey(secret.verifying_key().to_bytes());
        PublisherKey { secret, public }
    }

    /// What others know of it.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Its signature of this message in this context.
    pub(super) fn sign(&self, context: &str, message: &[u8]) -> [u8; 64] {
        self.secret.sign(&statement(context, message)).to_bytes()
    }
}

/// What is signed: the context, a zero byte, the message.
fn statement(context: &str, message: &[u8]) -> Vec<u8> {
    [context.as_bytes(), &[0], message].concat()
}

fn create(path: &Path) -> io::Result<()> {
    let mut seed = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    save(path, seed)
}

/// Durable on return; what another process has put there stays.
fn save(path: &Path, seed: [u8; 32]) -> io::Result<()> {
    let mut number = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut number)?;
    // Without the public half: older OpenSSL does not read a key that carries both.
    let key = KeypairBytes { secret_key: seed, public_key: None };
    let pem = key.to_pkcs8_pem(LineEnding::LF).map_err(io::Error::other)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".new-{}", u64::from_le_bytes(number)));
    let beside = PathBuf::from(beside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    let written = file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| {
        // A link, not a rename: a key that another process made meanwhile stays.
        match std::fs::hard_link(&beside, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    });
    std::fs::remove_file(&beside)?;
    written?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// Whose refs a node believes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Its own and those of these keys.
    Keys(Vec<PublicKey>),
    /// Everybody's: whoever can write to the store decides what the kernel of every such node mounts.
    Any,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_is_made_once_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("publisher.key");
        let made = PublisherKey::open_or_create(&path).unwrap();
        let again = PublisherKey::open_or_create(&path).unwrap();
        assert_eq!(made.public(), again.public());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("-----BEGIN PRIVATE KEY-----\n"));
        let other = PublisherKey::open_or_create(&dir.path().join("other")).unwrap();
        assert_ne!(made.public(), other.public());
    }

    #[test]
    fn processes_that_make_a_key_at_once_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("publisher.key");
        let made: Vec<String> = std::thread::scope(|scope| {
            let open = || PublisherKey::open_or_create(&path).unwrap().public().to_string();
            let running: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            running.into_iter().map(|made| made.join().unwrap()).collect()
        });
        assert!(made.iter().all(|key| *key == made[0]), "{made:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_key_that_others_can_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("publisher.key");
        PublisherKey::open_or_create(&path).unwrap();
        for bits in [0o644, 0o640, 0o602, 0o604] {
            mode(&path, bits);
            let refused = PublisherKey::open_or_create(&path).unwrap_err();
            assert!(matches!(refused, KeyError::Exposed { mode, .. } if mode == bits), "{refused}");
        }
        mode(&path, 0o400);
        PublisherKey::open_or_create(&path).unwrap();
    }

    #[test]
    fn a_file_without_a_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("publisher.key");
        for content in [
            &b""[..],
            b"hello",
            b"\xff\xfe",
            b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n",
        ] {
            std::fs::write(&path, content).unwrap();
            mode(&path, 0o600);
            assert!(matches!(PublisherKey::open_or_create(&path), Err(KeyError::NoKey { .. })));
            assert_eq!(std::fs::read(&path).unwrap(), content);
        }
        let absent = dir.path().join("no/such/directory");
        assert!(matches!(PublisherKey::open_or_create(&absent), Err(KeyError::Io { .. })));
    }

    #[test]
    fn a_public_key_has_one_text() {
        let key = *PublisherKey::from_seed([7; 32]).public();
        let text = key.to_string();
        // `openssl pkey -pubout` of a key whose PKCS#8 holds 32 bytes of 7.
        assert_eq!(text, "ed25519:6kpsY+KcUgq+9VB7Ey7F+ZVHdq6+vnuSQh7qaRRG0iw=");
        assert_eq!(PublicKey::parse(&text).unwrap(), key);
        assert_eq!(key.id().len(), 16);
        for bad in [
            "",
            "ed25519:",
            &text[8..],
            &text[..text.len() - 1],
            &format!("{text} "),
            &format!("{text}="),
            &text.replace("ed25519", "rsa"),
            "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            "ed25519:AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        ] {
            assert_eq!(PublicKey::parse(bad), Err(PublicKeyError), "{bad:?}");
        }
    }

    #[test]
    fn a_signature_is_for_one_key_one_context_and_one_message() {
        let (key, other) = (PublisherKey::from_seed([1; 32]), PublisherKey::from_seed([2; 32]));
        let signature = key.sign("context", b"message");
        assert!(key.public().signed("context", b"message", &signature));
        assert!(!other.public().signed("context", b"message", &signature));
        assert!(!key.public().signed("contex", b"tmessage", &signature));
        assert!(!key.public().signed("context", b"messagf", &signature));
        assert!(!key.public().signed("context", b"message", &signature[..63]));
        for bit in (0..512).step_by(7) {
            let mut wrong = signature;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!key.public().signed("context", b"message", &wrong), "bit {bit}");
        }
    }

    #[test]
    fn a_secret_key_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("publisher.key");
        let key = PublisherKey::open_or_create(&path).unwrap();
        let pem = std::fs::read_to_string(&path).unwrap();
        let secret = pem.lines().nth(1).unwrap();
        assert!(!format!("{key:?}").contains(&secret[22..40]), "{key:?}");
        assert!(format!("{key:?}").contains(&key.public().to_string()));
    }
}
